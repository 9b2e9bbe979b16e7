"""`ObjectFile`: an ELF file for x86-64, as far as coverage needs it: sections, symbols and relocations.

The layouts are those of the System V ABI (chapters 4, "Object Files", and its AMD64 supplement).  pyelftools reads the
same, but takes ten times as long: a second for the 48,000 relocations of ext4.  docs/decisions/0008.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from vmodel.compressed import decompress
from vmodel.coverage.errors import CoverageError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")
_COMPRESSION = struct.Struct("<IIQQ")

_ELFCLASS64, _ELFDATA2LSB = 2, 1
ET_REL, ET_EXEC, ET_DYN = 1, 2, 3
_EM_X86_64 = 62
SHT_SYMTAB, SHT_RELA, SHT_NOTE, SHT_NOBITS = 2, 4, 7, 8
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, _SHF_COMPRESSED = 1, 2, 4, 0x800
_SHN_XINDEX = 0xFFFF
SHN_LORESERVE = 0xFF00
STT_NOTYPE, STT_FUNC, STT_SECTION = 0, 2, 3
STB_LOCAL, STB_GLOBAL, STB_WEAK = 0, 1, 2
_NT_GNU_BUILD_ID = 3
#: gABI, "Section Compression": ELFCOMPRESS_ZLIB, ELFCOMPRESS_ZSTD.
_ZLIB, _ZSTD = 1, 2
R_X86_64_PC32, R_X86_64_PLT32 = 2, 4
#: Bytes that a compressed section may have at most.
_MAX_SECTION = 1 << 30


@dataclass(frozen=True)
class Section:
    """A section.  `address` is 0 in a module; `offset`, of its contents in the file, in bytes like `size`."""

    index: int
    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int

    @property
    def executable(self) -> bool:
        """Whether it is loaded, and code."""
        return self.flags & (SHF_ALLOC | SHF_EXECINSTR) == SHF_ALLOC | SHF_EXECINSTR


class ElfSymbol(NamedTuple):
    """A symbol; `section` is the index of the section that has it, 0 or from SHN_LORESERVE: none."""

    name: str
    type: int
    binding: int
    section: int
    value: int
    size: int


class Relocation(NamedTuple):
    """A place, as offset in its section, that gets a symbol's address and an addend in the way of `type`."""

    offset: int
    type: int
    symbol: int
    addend: int


class ObjectFile:
    """An ELF file for x86-64.  Each method may raise CoverageError: the file is damaged."""

    def __init__(self, data: bytes, file: str | Path | None = None) -> None:
        """`file`: its name in errors.  CoverageError: no ELF file for x86-64."""
        self.data = data
        self.file = file
        if data[:4] != b"\x7fELF":
            raise CoverageError("not an ELF file", file=file)
        if len(data) < _HEADER.size:
            raise self.damaged("its header is cut off")
        ident, self.type, machine, _, _, _, table, _, _, _, _, size, count, names = _HEADER.unpack_from(data)
        if machine != _EM_X86_64 or ident[4] != _ELFCLASS64 or ident[5] != _ELFDATA2LSB:
            raise CoverageError("is not for x86-64; coverage knows no other processor", file=file)
        if size != _SECTION.size or table + count * _SECTION.size > len(data):
            raise self.damaged("its table of sections is cut off")
        rows = list(_SECTION.iter_unpack(data[table : table + count * _SECTION.size]))
        if names >= count:
            raise self.damaged("it has no names of sections")
        strings = self._slice(rows[names][4], rows[names][5])
        self.sections = [
            Section(index, _string(strings, row[0]), row[1], row[2], *row[3:9]) for index, row in enumerate(rows)
        ]

    def damaged(self, what: str) -> CoverageError:
        """An error that says what is wrong with the file."""
        return CoverageError(f"a damaged ELF file: {what}", file=self.file)

    def _slice(self, offset: int, size: int) -> bytes:
        if offset + size > len(self.data):
            raise self.damaged("a section is cut off")
        return self.data[offset : offset + size]

    def contents(self, section: Section) -> bytes:
        """A section's bytes, decompressed; b"" for one without (SHT_NOBITS)."""
        if section.type == SHT_NOBITS:
            return b""
        data = self._slice(section.offset, section.size)
        if not section.flags & _SHF_COMPRESSED:
            return data
        if len(data) < _COMPRESSION.size:
            raise self.damaged(f"{section.name} is cut off")
        kind, _, size, _ = _COMPRESSION.unpack_from(data)
        if kind not in (_ZLIB, _ZSTD) or size > _MAX_SECTION:
            raise CoverageError(f"{section.name} is compressed in an unknown way ({kind})", file=self.file)
        try:
            if kind == _ZSTD:
                return decompress(data[_COMPRESSION.size :], size)
            return zlib.decompressobj().decompress(data[_COMPRESSION.size :], max(size, 1))
        except (zlib.error, ValueError) as error:
            raise self.damaged(f"{section.name}: {error}") from None

    def section(self, name: str) -> Section | None:
        """The first section of this name."""
        return next((section for section in self.sections if section.name == name), None)

    @cached_property
    def symbols(self) -> list[ElfSymbol]:
        """The symbol table, in the file's order; [] in a stripped file."""
        table = next((section for section in self.sections if section.type == SHT_SYMTAB), None)
        if table is None:
            return []
        data = self.contents(table)
        if table.link >= len(self.sections) or len(data) % _SYMBOL.size:
            raise self.damaged("its symbol table")
        strings = self.contents(self.sections[table.link])
        extended = next((self.contents(s) for s in self.sections if s.type == 18 and s.link == table.index), b"")
        found = []
        for at, (name, info, _, section, value, size) in enumerate(_SYMBOL.iter_unpack(data)):
            if section == _SHN_XINDEX and len(extended) >= at * 4 + 4:
                section = int.from_bytes(extended[at * 4 : at * 4 + 4], "little")
            found.append(ElfSymbol(_string(strings, name), info & 15, info >> 4, section, value, size))
        return found

    def relocations(self, section: Section) -> list[Relocation]:
        """The relocations of a section, in the file's order."""
        found: list[Relocation] = []
        for table in self.sections:
            if table.type == SHT_RELA and table.info == section.index:
                data = self.contents(table)
                if len(data) % _RELA.size:
                    raise self.damaged(f"{table.name} is cut off")
                count = len(self.symbols)
                for offset, info, addend in _RELA.iter_unpack(data):
                    if info >> 32 >= count:
                        raise self.damaged(f"{table.name} names a symbol that is not there")
                    found.append(Relocation(offset, info & 0xFFFFFFFF, info >> 32, addend))
        return found

    @cached_property
    def build_id(self) -> str:
        """The linker's build id, as hexadecimal digits; "" if there is none."""
        for section in self.sections:
            if section.type == SHT_NOTE:
                for name, kind, value in _notes(self.contents(section)):
                    if kind == _NT_GNU_BUILD_ID and name == b"GNU\0":
                        return value.hex()
        return ""


def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at + 12 <= len(data):
        name, size, kind = struct.unpack_from("<III", data, at)
        at += 12
        value = at + (name + 3 & ~3)
        yield data[at : at + name], kind, data[value : value + size]
        at = value + (size + 3 & ~3)


def _string(table: bytes, at: int) -> str:
    end = table.find(b"\0", at)
    return table[at : end if end >= 0 else len(table)].decode("utf-8", "replace")
