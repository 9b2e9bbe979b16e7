"""The tables of a kernel's image, its symbols and its types: read, or refused by one of a few errors."""

from __future__ import annotations

import struct

import atheris

with atheris.instrument_imports(include=["vmodel.coverage.btf", "vmodel.coverage.kallsyms"]):
    from vmodel.coverage.btf import Btf
    from vmodel.coverage.kallsyms import read_symbols
    from vmodel.coverage.module_layout import ModuleLayout

from tests.coverage.images import RODATA, TEXT, VERSIONS, rodata_of, some_symbols, types
from tests.fuzz.harness import Input, fuzz
from vmodel.span import Span

TYPES = [types(False), types(True)]
TABLES = [rodata_of(version, some_symbols(version.percpu)) for version in VERSIONS]
CODE = [Span.sized(TEXT, 0x3000)]


def changed(whole: bytes, read: Input) -> bytes:
    """A good table with bytes replaced: where, how many, which; the last one may cut it."""
    result = bytearray(whole)
    while read.left:
        at, size = read.number(2) % (len(whole) + 1), read.number(1)
        if size == 255:
            del result[at:]
        else:
            new = read.bytes(size % 16)
            result[at : at + len(new)] = new
    return bytes(result)


def one_input(data: bytes) -> None:
    """A byte says which table; then what is changed in it."""
    read = Input(data)
    kind = read.number(1)
    try:  # what kernel_image turns into CoverageError
        if kind & 0x80:
            layout = ModuleLayout.of_btf(Btf(changed(TYPES[kind % len(TYPES)], read)))
            assert layout.name >= 0 and layout.init_size + 4 <= layout.size
            return
        symbols = read_symbols(changed(TABLES[kind % len(TABLES)], read), RODATA, TEXT, CODE)
    except (ValueError, struct.error, IndexError):
        return
    addresses = list(symbols.addresses)
    assert addresses == sorted(addresses) and all(symbols.names)
    assert all(size > 0 and address + size - 1 in CODE[0] for address, size, _ in symbols.functions())


if __name__ == "__main__":
    fuzz(one_input)
