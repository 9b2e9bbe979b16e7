"""What is read from a kernel's image; tests/guest/test_kernel_image.py compares it with real kernels that run."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.coverage.images import (
    COMPRESSIONS,
    INIT_TEXT,
    TEXT,
    VERSIONS,
    Types,
    Version,
    bzimage,
    some_symbols,
    types,
    vmlinux,
)
from vmodel.coverage.btf import Btf
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.kernel_image import KernelImage
from vmodel.coverage.module_layout import ModuleLayout

BY_NAME = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
NEWEST = VERSIONS[0]


def image_of(folder: Path, data: bytes) -> Path:
    path = folder / "vmlinuz"
    path.write_bytes(data)
    return path


def of_version(version: Version, compression: str = "zstd") -> bytes:
    return bzimage(COMPRESSIONS[compression](vmlinux(version, some_symbols(version.percpu))))


@BY_NAME
def test_symbols_of_each_layout(version: Version, tmp_path: Path) -> None:
    image = KernelImage.load(image_of(tmp_path, of_version(version)))
    assert list(image.symbols) == some_symbols(version.percpu)
    assert len(image.symbols) == len(some_symbols(version.percpu))


@BY_NAME
def test_where_a_module_has_what(version: Version, tmp_path: Path) -> None:
    """MOD_TEXT is 0, MOD_INIT_TEXT 4; before Linux 6.4 there are core_layout and init_layout, with their text_size."""
    image = KernelImage.load(image_of(tmp_path, of_version(version)))
    expected = (
        ModuleLayout(896, 24, 320, 320 + 12, 400, 400 + 12)
        if version.before_6_4
        else ModuleLayout(1280, 24, 320, 320 + 12, 320 + 4 * 72, 320 + 4 * 72 + 12)
    )
    assert image.module_layout == expected


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_each_compression(compression: str, tmp_path: Path) -> None:
    image = KernelImage.load(image_of(tmp_path, of_version(NEWEST, compression)))
    assert image.symbols.address("function_7") == TEXT + 16 * 7 + 8
    assert image.elf == vmlinux(NEWEST, some_symbols(False))


def test_a_vmlinux_that_is_not_compressed(tmp_path: Path) -> None:
    elf = vmlinux(NEWEST, some_symbols(False))
    image = KernelImage.load(image_of(tmp_path, elf))
    assert image.symbols.address("_text") == TEXT and image.elf == elf


def test_functions(tmp_path: Path) -> None:
    """In order; sizes go up to the next address, whatever is there, or to the section's end; data is none."""
    functions = KernelImage.load(image_of(tmp_path, of_version(NEWEST))).symbols.functions()
    assert [(at, name) for at, _, name in functions] == [
        (at, name) for at, kind, name in some_symbols(False) if kind in "tTwW" and name not in ("_etext", "no_code")
    ]
    sizes = {name: (at, size) for at, size, name in functions}
    assert sizes["_stext"] == sizes["_text"] == sizes["__pfx_function_0"] == (TEXT, 8)
    assert sizes["function_549"] == (TEXT + 16 * 549 + 8, 0x2600 - 16 * 549 - 8)
    assert sizes["Xq" * 120] == (TEXT + 0x2600, 0x3000 - 0x2600)
    assert sizes["start_it"] == (INIT_TEXT + 4, 60)


def test_a_symbol_that_is_not_there(tmp_path: Path) -> None:
    symbols = KernelImage.load(image_of(tmp_path, of_version(NEWEST))).symbols
    with pytest.raises(CoverageError, match=r"^the kernel has no symbol 'do_nothing'$"):
        symbols.address("do_nothing")


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = image_of(tmp_path, of_version(NEWEST))
    first = KernelImage.load(path)
    assert KernelImage.load(path) is first
    path.write_bytes(of_version(VERSIONS[2]))
    with pytest.raises(CoverageError, match=r"has changed since it was read$"):
        first.elf  # noqa: B018
    assert KernelImage.load(path).symbols.address("cpu_variable_3") == 24


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def test_errors_say_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    whole, elf = of_version(NEWEST), vmlinux(NEWEST, some_symbols(False))
    (length,) = struct.unpack_from("<I", whole, 0x24C)
    for data, text in {
        b"": "is no kernel image .bzImage.$",
        b"#!/bin/sh\n" * 1000: "is no kernel image .bzImage.$",
        changed(whole, 0x206, b"\x02\x02"): r"is of boot protocol 2\.02, older than Linux 2\.6\.24$",
        whole[:-100]: "is damaged: it ends before its payload does$",
        changed(whole, 0x24C, struct.pack("<I", length - 4)): "vmlinuz: ",
        changed(whole, len(whole) - 65, b"\x01"): "is damaged: its payload has not the size that it says$",
        bzimage(b"\x04\x22\x4d\x18" + bytes(40)): "is compressed with lz4, and not with zstd, xz or gzip$",
        bzimage(b"BZh9" + bytes(40)): "is compressed with bzip2, and not with zstd, xz or gzip$",
        bzimage(bytes(40)): "is compressed with something unknown, and not with zstd, xz or gzip$",
        elf[:5000]: "not an ELF file: ",
        changed(elf, 4, b"\1"): "ELF file",
        changed(elf, 18, b"\xb7"): "of another machine than x86-64$",
        elf.replace(b".rodata\0", b".rubbish"[:8]): r"the kernel has no symbols \(\.rodata\)$",
        elf.replace(b".BTF\0", b".BTE\0"): r"no types \(\.BTF\): its option CONFIG_DEBUG_INFO_BTF is off$",
        elf.replace(b"0\0001\0002\0", b"0\0001\0003\0"): "no table of symbols: its option CONFIG_KALLSYMS is off",
        elf.replace(b"\0mem\0", b"\0men\0"): "its BTF has no struct module$",
        elf.replace(b"\0MOD_TEXT\0", b"\0MOD_NEXT\0"): "its BTF has no struct module_memory$",
        elf.replace(b"\x9f\xeb\1\0", b"\x9f\xeb\2\0"): "its BTF has an unknown header$",
    }.items():
        path = image_of(tmp_path, data)
        with pytest.raises(CoverageError, match=text) as raised:
            KernelImage.load(path)
        assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, text in {
        "nothing": "No such file",
        "fifo": "is not a regular file",
        ".": "is not a regular file",
    }.items():
        with pytest.raises(CoverageError, match=f"cannot be read: {text}"):
            KernelImage.load(tmp_path / name)


def test_offsets_of_bit_fields() -> None:
    """With kind_flag, the upper 8 bits of a member's offset are a bit field's size (Documentation/bpf/btf.rst)."""
    made = Types()
    made.structure("flags", 8, {"whole": 0, "bit": 4}, flag=True)
    made.types[-4:] = struct.pack("<I", 1 << 24 | 33)
    found = Btf(made.section()).structure("flags", "bit")
    assert found is not None and (found.size, dict(found.members)) == (8, {"whole": 0, "bit": 4})


def test_members_outside_of_the_structure() -> None:
    section = types(False).replace(struct.pack("<I", 1280), struct.pack("<I", 600))
    with pytest.raises(ValueError, match="members outside of it"):
        ModuleLayout.of_btf(Btf(section))
