"""`Program.of_kernel`: functions of a linked image, by the kernel's own symbols."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.coverage.objects import compiled, function, texts
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.kallsyms import Symbols
from vmodel.coverage.object_file import STT_SECTION, ObjectFile
from vmodel.coverage.program import Program
from vmodel.span import Span

SOURCE = (
    function("__pfx_pci_probe", ".rept 16\nnop\n.endr")
    + function("pci_probe", "test %edi, %edi\njne pci_probe.cold\ncall outside\nret\nint3")
    + function("__pi_outside", "nop\nje pci_probe\nret\n.balign 16, 0xcc")
    + ".globl outside\n.set outside, __pi_outside\n"
    + function("pci_probe.cold", "mov $2, %eax\nret", section=".text.unlikely")
    + '.section .data,"awx"\n.type pci_table, @object\npci_table: .long 7\n'
)
TEXT = 0xFFFFFFFF81000000


@dataclass(frozen=True)
class Image:
    """What of KernelImage it needs."""

    elf: bytes
    path: Path
    symbols: Symbols


@cache
def image() -> Image:
    """A linked program, and its symbols as nm has them: what is in an executable section is "t", data or not."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "a.o").write_bytes(compiled(SOURCE))
        ld = ["ld", "-e", "0", f"-Ttext={TEXT:#x}", f"-Tdata={TEXT + 0x100000:#x}", "--build-id=0xabcd", "a.o"]
        subprocess.run(ld, cwd=folder, check=True, timeout=60, capture_output=True)
        elf = (Path(folder) / "a.out").read_bytes()
    file = ObjectFile(elf)
    rows = sorted(
        (s.value, s.name) for s in file.symbols if s.name and s.type != STT_SECTION and 0 < s.section < 0xFF00
    )
    code = sorted(Span(s.address, s.address + s.size - 1) for s in file.sections if s.executable and s.size)
    symbols = Symbols([value for value, _ in rows], "t" * len(rows), [name for _, name in rows], code)
    return Image(elf, Path("vmlinuz"), symbols)


def of_kernel(*prefixes: str) -> Program:
    return Program.of_kernel(image(), prefixes)  # type: ignore[arg-type]


def test_functions_by_prefix() -> None:
    found = of_kernel("pci_")
    assert (found.name, found.build_id) == ("vmlinux:pci_", "abcd")
    assert [f.name for f in found.functions] == ["pci_probe"]
    assert texts(found, "pci_probe") == [
        *("test edi, edi", "jne pci_probe.cold", "call outside", "ret", "mov eax, 2", "ret"),
    ]
    probe = found.function("pci_probe")
    assert probe.address >= TEXT
    assert [i.target for i in probe.instructions] == [None, probe.addresses[4], None, None, None, None]
    assert [(b.taken, b.not_taken) for b in found.branches()] == [(probe.addresses[4], probe.addresses[2])]


def test_several_prefixes() -> None:
    found = of_kernel("pci_", "outside")
    assert found.name == "vmlinux:pci_,outside"
    assert [f.name for f in found.functions] == ["pci_probe", "outside"]
    outside = found.function("outside")
    assert texts(found, "outside") == ["nop", "je pci_probe", "ret"]
    assert found.function("pci_probe").instructions[2].target == outside.address


def test_addresses_of_the_kernel_are_its_own() -> None:
    found = of_kernel("pci_")
    at = found.function("pci_probe").address
    assert found.text.ranges_of(0, None, [(at, at + 9)]) == [(at, at + 9)]
    assert found.text.address_of(0, None, at) == at


def test_no_such_function() -> None:
    with pytest.raises(CoverageError, match="begins with nvme_"):
        of_kernel("nvme_")
