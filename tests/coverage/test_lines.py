"""`Lines`: DWARF 2 to 5, chapter 6.2, as GNU as writes it: each instruction's line is known from its .loc."""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.coverage.objects import compiled, program
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.line_table import rows
from vmodel.coverage.lines import Lines
from vmodel.coverage.object_file import ObjectFile
from vmodel.coverage.program import Program

#: Lines go back and forth, one is far away, and one address has two of them.
SOURCE = """
    .file 1 "driver/card.c"
    .file 2 "include/../include/linux/io.h"
    .section .note.gnu.build-id,"a",@note
    .long 4, 3, 3
    .asciz "GNU"
    .byte {build}, 2, 3
    .text
    .type probe, @function
probe:
    .loc 1 10
    mov $1, %eax
    mov $2, %eax
    .loc 2 70000
    mov $3, %eax
    .loc 1 12 is_stmt 0
    mov $4, %eax
    .rept 600
    nop
    .endr
    .loc 1 5 is_stmt 1
    .loc 1 11
    jne probe.cold
    ret
    .size probe, .-probe
    .section .text.unlikely,"ax",@progbits
    .type probe.cold, @function
probe.cold:
    .loc 1 20
    mov $5, %eax
    ret
    .size probe.cold, .-probe.cold
    .section .init.text,"ax",@progbits
    .type without, @function
without:
    ret
    .size without, .-without
"""
CARD, IO = "driver/card.c", "include/linux/io.h"
EXPECTED = {
    "mov eax, 1": (CARD, 10),
    "mov eax, 2": (CARD, 10),
    "mov eax, 3": (IO, 70000),
    "mov eax, 4": (CARD, 12),
    "nop": (CARD, 12),
    "jne probe.cold": (CARD, 11),
    "mov eax, 5": (CARD, 20),
}


def check(found: Program) -> None:
    lines = found.lines()
    assert lines is not None
    seen = {}
    for i in found.function("probe").instructions:
        place = lines.at(i.address)
        assert place is not None
        # DWARF up to 4 has no folder of the compiler in this table, 5 has.
        path = next(name for name in (CARD, IO) if place[0].endswith(name))
        if i.verb != "ret":
            assert seen.setdefault(str(i), (path, place[1])) == (path, place[1])
    assert EXPECTED.items() <= seen.items()
    assert {line for _, line in lines.of(found.addresses)} == {10, 70000, 12, 5, 11, 20}
    jne = next(i.address for i in found.function("probe").instructions if i.verb == "jne")
    assert {line for _, line in lines.of([jne])} == {5, 11}
    assert lines.at(found.function("without").address) is None
    assert lines.at(0) is None and lines.at((1 << 64) - 1) is None


def test_lines_of_a_coverage() -> None:
    own = Program.of_module("lined", compiled(SOURCE.format(build=1), ".s", "-g"))
    first, second, third, *_ = own.function("probe").addresses
    assert Coverage.of_ranges(own, []).lines() == set()
    reached = Coverage.of_ranges(own, [(first, second + 1)])
    assert {line for _, line in reached.lines()} == {10}
    assert {line for _, line in (reached | Coverage.of_ranges(own, [(third, third + 1)])).lines()} == {10, 70000}
    without = program(".text\n.type f, @function\nf: ret\n.size f, .-f\n", "without_lines")
    assert (reached | Coverage.of_ranges(without, [(0, 1 << 32)])).lines() == reached.lines()


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_lines_of_each_version(version: int) -> None:
    check(Program.of_module("own", compiled(SOURCE.format(build=1), ".s", "-g", f"-gdwarf-{version}")))


@pytest.mark.parametrize("way", ["zlib", "zstd"])
def test_compressed_debug_information(way: str) -> None:
    more = '.section .exit.text,"ax",@progbits\n.type x, @function\nx: ' + ".loc 1 10\nnop\n.loc 1 11\nnop\n" * 300
    try:
        elf = compiled(SOURCE.format(build=1) + more, ".s", f"-Wa,--compress-debug-sections={way}")
    except AssertionError:
        pytest.skip(f"this machine's as cannot compress with {way}")
    section = ObjectFile(elf).section(".debug_line")
    assert section and section.flags & 0x800, "it is compressed"
    check(Program.of_module("own", elf))


def separated(elf: bytes, folder: Path) -> tuple[bytes, Path]:
    """The module without its debug information, and the file that has it, as packages are made."""
    objcopy = shutil.which("objcopy")
    if objcopy is None:
        pytest.skip("needs objcopy, which this machine has not")
    (folder / "all.ko").write_bytes(elf)
    for option, name in (("--only-keep-debug", "debug.ko"), ("--strip-debug", "own.ko")):
        subprocess.run([objcopy, option, "all.ko", name], cwd=folder, check=True, timeout=60)
    return (folder / "own.ko").read_bytes(), folder / "debug.ko"


def test_debug_information_in_another_file(tmp_path: Path) -> None:
    """Its sections have other places: those of the module count."""
    elf, debug = separated(compiled(SOURCE.format(build=1)), tmp_path)
    assert Program.of_module("own", elf).lines() is None
    check(Program.of_module("own", elf, debug))


def test_the_other_file_may_be_compressed(tmp_path: Path) -> None:
    elf, debug = separated(compiled(SOURCE.format(build=1)), tmp_path)
    packed = tmp_path / "own.ko.xz"
    packed.write_bytes(lzma.compress(debug.read_bytes()))
    check(Program.of_module("own", elf, packed))
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(CoverageError, match=r"own\.ko\.xz: "):
        Program.of_module("own", elf, packed).lines()
    packed.unlink()
    os.mkfifo(packed)
    with pytest.raises(CoverageError, match=r"own\.ko\.xz: cannot be read: is not a regular file$"):
        Program.of_module("own", elf, packed).lines()


@pytest.mark.parametrize(("folder", "before"), [("/src/card", "/src/card/"), ("debian/build", "")])
def test_the_compiler_s_folder_counts_if_it_is_known_where_it_is(folder: str, before: str) -> None:
    """DWARF 5: the first entry of the folders.  Debian's kernels name a relative one."""
    elf = compiled(
        SOURCE.format(build=1).replace(".file 1", f'.file 0 "{folder}" "card.s"\n.file 1'), ".s", "-gdwarf-5"
    )
    own = Program.of_module("own", elf)
    lines = own.lines()
    assert lines
    assert lines.at(own.function("probe").address) == (f"{before}{CARD}", 10)


def test_that_of_another_build_is_refused(tmp_path: Path) -> None:
    elf, _ = separated(compiled(SOURCE.format(build=1)), tmp_path)
    _, other = separated(compiled(SOURCE.format(build=7)), tmp_path)
    with pytest.raises(CoverageError, match=r"debug\.ko: is not .* is 070203, the module's is 010203"):
        Program.of_module("own", elf, other).lines()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    found = Program.of_module("own", compiled(SOURCE.format(build=1)), tmp_path / "gone.ko")
    with pytest.raises(CoverageError, match=r"gone\.ko: cannot be read"):
        found.lines()


def test_the_end_of_one_sequence_is_the_begin_of_another() -> None:
    a, b = (("a.c", 1), ("a.c", 2)), ("b.c", 1)
    lines = Lines([(16, b, True), (32, None, False), (0, a[0], True), (8, a[1], True), (16, None, False)])
    assert [lines.at(n) for n in (0, 7, 8, 15, 16, 31, 32)] == [a[0], a[0], a[1], a[1], b, b, None]


def test_a_row_at_the_end_of_its_sequence_is_of_no_instruction() -> None:
    """Nor is line 0, which the compiler gives to code of its own."""
    a, b = ("a.c", 1), ("a.c", 2)
    lines = Lines([(0, a, True), (8, b, True), (8, None, False), (32, a, True), (40, None, False), (40, b, True)])
    assert [lines.at(n) for n in (0, 7, 8, 31, 32, 39, 40)] == [a, a, None, None, a, a, None]
    assert lines.of([0, 8]) == {a}
    lines = Lines([(0, a, True), (4, None, True), (8, b, True), (12, None, False)])
    assert [lines.at(n) for n in (0, 4, 7, 8, 12)] == [a, None, None, b, None]


def test_a_c_compiler_s_lines() -> None:
    source = "int g(int);\nint f(int x)\n{\n    if (x)\n        return g(7);\n    return g(8);\n}\n"
    found = Program.of_module("own", compiled(source, ".c", "-g", "-O2", "-fcf-protection=none"))
    lines = found.lines()
    assert lines is not None
    by_text = {str(i): {line for _, line in lines.of([i.address])} for i in found.function("f").instructions}
    assert by_text["mov edi, 7"] == {5}
    assert by_text["mov edi, 8"] == {6}
    assert {3, 4, 5, 6} <= {line for _, line in lines.of(found.addresses)} <= {3, 4, 5, 6, 7}


# ---- damaged ones --------------------------------------------------------------------------


def line_sections(elf: bytes) -> tuple[bytes, bytes]:
    file = ObjectFile(elf)
    parts = [file.section(name) for name in (".debug_line", ".debug_line_str")]
    assert parts[0]
    return file.contents(parts[0]), file.contents(parts[1]) if parts[1] else b""


@pytest.mark.parametrize("version", [4, 5])
def test_every_byte_may_be_wrong(version: int) -> None:
    data, strings = line_sections(compiled(SOURCE.format(build=1), ".s", "-g", f"-gdwarf-{version}"))
    for at in range(len(data)):
        for wrong in (0, 0x7F, 0xFF):
            try:
                found = list(rows(data[:at] + bytes([wrong]) + data[at + 1 :], strings, b""))
            except ValueError:
                continue
            assert len(found) <= len(data)


def test_every_cut_is_refused() -> None:
    data, strings = line_sections(compiled(SOURCE.format(build=1), ".s", "-g", "-gdwarf-5"))
    for size in range(1, len(data)):
        with pytest.raises(ValueError, match=r"cut off"):
            list(rows(data[:size], strings, b""))


def test_a_table_of_files_without_end_is_refused() -> None:
    """A count of 2^63 entries without any form would have no bytes to read."""
    body = b"\5\0\x08\0" + (60).to_bytes(4, "little") + b"\1\1\1\0\x0e\x0d" + bytes(12)
    body += b"\0" + b"\xff" * 9 + b"\1"
    with pytest.raises(ValueError, match=r"cut off"):
        list(rows(len(body).to_bytes(4, "little") + body, b"", b""))


def test_damage_is_one_line() -> None:
    elf = bytearray(compiled(SOURCE.format(build=1), ".s", "-g", "-gdwarf-5"))
    section = ObjectFile(bytes(elf)).section(".debug_line")
    assert section
    elf[section.offset + 4] = 9  # the version
    with pytest.raises(CoverageError, match=r"^own: damaged debug information: .* version 9$"):
        Program.of_module("own", bytes(elf)).lines()


def test_no_debug_information() -> None:
    assert program(".text\n.type f, @function\nf: ret\n.size f, .-f\n").lines() is None
