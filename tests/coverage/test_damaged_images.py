"""Images that are damaged, or made to take long: an error of one line, soon, and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import struct
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coverage.images import (
    COMPRESSIONS,
    DECOYS,
    RODATA,
    VERSIONS,
    Types,
    Version,
    bzimage,
    elf_of,
    encoded,
    rodata_of,
    some_symbols,
    tables,
    tokens,
    types,
    vmlinux,
)
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.kernel_image import KernelImage
from vmodel.patience import patience

NUMBERS = itertools.count()
#: Each way to write the tables, without and with compression.
WHOLE = [vmlinux(version, some_symbols(version.percpu)) for version in VERSIONS] + [
    bzimage(compress(vmlinux(VERSIONS[0], some_symbols(False)))) for compress in COMPRESSIONS.values()
]


def load(data: bytes, seconds: float = 5.0) -> KernelImage:
    """Loads an image, from a file of its own as results are kept.  It fails if that takes longer than `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"vmlinuz{next(NUMBERS)}"
        path.write_bytes(data)
        began = time.monotonic()
        try:
            return KernelImage.load(path)
        except CoverageError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            raise
        finally:
            assert time.monotonic() - began < patience(seconds)


@given(data=st.data())
def test_truncated(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(WHOLE))
    size = data.draw(st.integers(0, len(whole) - 65))  # 64 bytes are padding
    with pytest.raises(CoverageError):
        load(whole[:size])


@given(data=st.data())
def test_changed_bytes(data: st.DataObject) -> None:
    """Bits, bytes and words, few or many, near each other or not."""
    changed = bytearray(data.draw(st.sampled_from(WHOLE)))
    first = data.draw(st.integers(0, len(changed) - 1))
    last = data.draw(st.one_of(st.just(len(changed) - 1), st.integers(first, min(first + 64, len(changed) - 1))))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(first, last))
        kind = data.draw(st.sampled_from(["bit", "zero", "ones", "byte"]))
        if kind == "bit":
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "byte":
            changed[at] = data.draw(st.integers(0, 255))
        else:
            changed[at : at + 4] = (b"\0" if kind == "zero" else b"\xff") * len(changed[at : at + 4])
    with contextlib.suppress(CoverageError):
        check(load(bytes(changed)))


def check(image: KernelImage) -> None:
    """What holds of each image that loads."""
    symbols = list(image.symbols)
    assert [at for at, _, _ in symbols] == sorted(at for at, _, _ in symbols)
    assert image.symbols.address("_text") or image.symbols.address("_stext")
    for address, size, _ in image.symbols.functions():
        assert size > 0 and any(address in span and address + size - 1 in span for span in image.symbols.code)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_each_byte_where_tables_meet(version: Version) -> None:
    """The end of one and the begin of the next, each byte as 0, 1, 127 and 255: they are found by what is there."""
    symbols = some_symbols(version.percpu)
    elf = vmlinux(version, symbols)
    at = elf.index(tables(version, symbols, RODATA + len(DECOYS)))
    names = elf.index(encoded("".join(symbols[0][1:]), tokens()), at)
    table = elf.index(b"\0".join(token.encode() for token in tokens()), at)
    for place in (*range(names - 24, names + 4), *range(table - 16, table + 4)):
        for value in (0, 1, 127, 255):
            with contextlib.suppress(CoverageError):
                check(load(elf[:place] + bytes([value]) + elf[place + 1 :]))


SIZE = 8 << 20
DIGITS = b"0\0001\0002\0003\0004\0005\0006\0007\0008\0009\0"
SLOW = {
    "digits": DIGITS * (SIZE // len(DIGITS)),
    "zeros": DIGITS + bytes(SIZE),
    "a long token": DIGITS + b"x" * SIZE,
}
BEFORE_TOKENS = {
    "zeros": bytes(4),
    "ones": b"\1\0\0\0",
    "counts": struct.pack("<I", 300),
    "markers": b"".join(struct.pack("<I", 600 * n) for n in range(4000)),
    "pairs of markers": struct.pack("<II", 0, 600),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_looks_like_tokens(name: str) -> None:
    with pytest.raises(CoverageError, match="the kernel has no table of symbols"):
        load(elf_of(SLOW[name], types(False)), 10.0)


@pytest.mark.parametrize("name", BEFORE_TOKENS)
def test_what_looks_like_markers_and_names(name: str) -> None:
    whole = rodata_of(VERSIONS[0], some_symbols(False))
    at = whole.index(b"\0".join(token.encode() for token in tokens()))
    part = BEFORE_TOKENS[name]
    with pytest.raises(CoverageError, match="its table of symbols is damaged"):
        load(elf_of(part * (SIZE // len(part)) + whole[at:], types(False)), 10.0)


def test_what_looks_like_types() -> None:
    """Each word is the name of struct module, or says that it has many members."""
    made = Types()
    name = made.name("module")
    made.types += struct.pack("<III", name, 4 << 24 | 1024, name) * (SIZE // 12)
    with pytest.raises(CoverageError, match="its BTF has no struct module"):
        load(elf_of(rodata_of(VERSIONS[0], some_symbols(False)), made.section()), 10.0)
