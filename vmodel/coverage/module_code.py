"""`ModuleCode`: the functions of a module, from its symbols, relocations and bytes."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from vmodel.coverage.disassembly import Instruction, Referred, decode, without_padding
from vmodel.coverage.object_file import (
    R_X86_64_PC32,
    R_X86_64_PLT32,
    SHF_ALLOC,
    SHN_LORESERVE,
    STB_GLOBAL,
    STB_LOCAL,
    STT_FUNC,
    STT_SECTION,
    ElfSymbol,
    ObjectFile,
    Relocation,
    Section,
)

#: Symbols of the nops in front of functions that ftrace and CFI may use: never executed.
_PREFIXES = ("__pfx_", "__cfi_")
#: A part of a function that GCC or Clang has moved to where cold code is.
_MOVED = re.compile(r"(.+)\.cold(?:\.\d+)?")
#: Names that <linux/module.h> gives to a module's functions beside their own.
_ALIASES = frozenset({"init_module", "cleanup_module"})


@dataclass(frozen=True)
class KnownFunction:
    """A function as `CodeFunction` has it."""

    name: str
    section: str
    address: int
    instructions: tuple[Instruction, ...]


@dataclass
class _SymbolCode:
    """Bytes that one symbol names: [start, end) of a section."""

    symbol: ElfSymbol
    section: Section
    start: int
    end: int
    instructions: list[Instruction]

    @property
    def address(self) -> int:
        return self.section.offset + self.start


class ModuleCode:
    """Decodes a module.  CoverageError: the file is damaged."""

    def __init__(self, file: ObjectFile) -> None:
        self._file = file
        self._executable = {s.index: s for s in file.sections if s.executable and file.contents(s)}
        self._undecoded: list[int] = []

    def functions(self) -> list[KnownFunction]:
        """The functions in ascending order of their addresses."""
        parts = self._parts()
        targets = {i.target for part in parts for i in part.instructions if i.target is not None}
        for part in parts:
            part.instructions = without_padding(part.instructions, targets)
        moved = self._moved(parts)
        found = []
        for part in parts:
            if id(part) not in moved and part.instructions:
                rest = [own for own in parts if moved.get(id(own)) is part] if moved else []
                code = [i for own in [part, *rest] for i in own.instructions]
                found.append(KnownFunction(part.symbol.name, part.section.name, part.address, tuple(code)))
        return found

    def notes(self) -> tuple[str, ...]:
        """What could not be decoded by `functions`."""
        if not self._undecoded:
            return ()
        places = ", ".join(f"{address:#x}" for address in self._undecoded[:3])
        return (f"bytes that Capstone cannot decode, at {len(self._undecoded)} places: {places}",)

    # ---- symbols ----------------------------------------------------------------------------

    def _parts(self) -> list[_SymbolCode]:
        """What symbols name, each byte once, decoded, in ascending order of addresses."""
        by_section: defaultdict[int, list[ElfSymbol]] = defaultdict(list)
        for symbol in self._file.symbols:
            if symbol.section in self._executable and symbol.type != STT_SECTION:
                by_section[symbol.section].append(symbol)
        found = []
        for index, section in self._executable.items():
            end = 0
            for symbol, start, stop in _extents(by_section[index], section.size):
                # A symbol inside of a function is an entry of it.  One that begins in it and ends later is cut.
                if stop > end:
                    part = _SymbolCode(symbol, section, max(start, end), stop, [])
                    part.instructions = self._decode(part)
                    end = stop
                    if not symbol.name.startswith(_PREFIXES):
                        found.append(part)
        return sorted(found, key=lambda part: part.address)

    def _decode(self, part: _SymbolCode) -> list[Instruction]:
        code = self._file.contents(part.section)[part.start : part.end]
        known = self._known[part.section.index]
        first, last = bisect_right(known, part.start), bisect_right(known, part.end - 1)
        offset = part.section.offset
        return list(
            decode(
                code,
                part.address,
                self._referred,
                [offset + where for where in known[first:last]],
                self._undecoded,
            )
        )

    def _moved(self, parts: list[_SymbolCode]) -> dict[int, _SymbolCode]:
        """By id of a moved part: the function that it belongs to."""
        by_name: defaultdict[str, list[_SymbolCode]] = defaultdict(list)
        for part in parts:
            by_name[part.symbol.name].append(part)
        found: dict[int, _SymbolCode] = {}
        for part in parts:
            name = _MOVED.fullmatch(part.symbol.name)
            candidates = by_name.get(name[1], []) if name else []
            if len(candidates) > 1:  # static functions of several files: the one that jumps there
                low, high = part.address, part.address + part.end - part.start
                jumping = [c for c in candidates if any(low <= (i.target or 0) < high for i in c.instructions)]
                candidates = jumping or candidates
            if candidates:
                found[id(part)] = candidates[0]
        return found

    # ---- relocations ------------------------------------------------------------------------

    @cached_property
    def _relocations(self) -> Mapping[int, list[Relocation]]:
        """By index of the section, of those that are loaded."""
        return {s.index: self._file.relocations(s) for s in self._file.sections if s.flags & SHF_ALLOC}

    @cached_property
    def _referred(self) -> dict[int, Referred]:
        """What relative relocations of code refer to, by the address of the relocated bytes.

        They are in the last four bytes of an instruction, and relative to its end: AMD64 ABI 4.4, S + A - P.
        """
        found = {}
        for index, section in self._executable.items():
            for relocation in self._relocations[index]:
                if relocation.type in (R_X86_64_PC32, R_X86_64_PLT32):
                    found[section.offset + relocation.offset] = self._refer(relocation)
        return found

    def _refer(self, relocation: Relocation) -> Referred:
        symbol = self._file.symbols[relocation.symbol]
        section = self._executable.get(symbol.section)
        value = symbol.value + relocation.addend + 4
        if section is None or not 0 <= value < section.size:
            return Referred(None, _plus(symbol.name, relocation.addend + 4))
        if symbol.type != STT_SECTION:
            return Referred(section.offset + value, _plus(symbol.name, relocation.addend + 4))
        starts, names = self._names[symbol.section]
        at = bisect_right(starts, value) - 1
        text = _plus(names[at], value - starts[at]) if at >= 0 else _plus(section.name, value)
        return Referred(section.offset + value, text)

    @cached_property
    def _names(self) -> Mapping[int, tuple[list[int], list[str]]]:
        """The names of functions by section, for relocations that name a section."""
        found: dict[int, tuple[list[int], list[str]]] = {index: ([], []) for index in self._executable}
        named = [s for s in self._file.symbols if s.section in found and s.type == STT_FUNC]
        for symbol in sorted(named, key=lambda symbol: (symbol.value, symbol.name in _ALIASES)):
            starts, names = found[symbol.section]
            if not starts or starts[-1] != symbol.value:
                starts.append(symbol.value)
                names.append(symbol.name)
        return found

    @cached_property
    def _known(self) -> Mapping[int, list[int]]:
        """Offsets, by section, at which an instruction begins, as relocations of data say.

        Tables of the kernel (.call_sites, .return_sites, __bug_table, __mcount_loc, ...) name instructions.
        """
        found: defaultdict[int, set[int]] = defaultdict(set)
        for index, relocations in self._relocations.items():
            if index not in self._executable:
                for relocation in relocations:
                    symbol = self._file.symbols[relocation.symbol]
                    if symbol.section in self._executable:
                        found[symbol.section].add(symbol.value + relocation.addend)
        return {index: sorted(found[index]) for index in self._executable}


def _plus(name: str, offset: int) -> str:
    return f"{name}{offset:+#x}" if offset else name


def _extents(symbols: list[ElfSymbol], size: int) -> Iterator[tuple[ElfSymbol, int, int]]:
    """Each function's symbol with start and end, which may overlap; one for each start, the longest of them first.

    A symbol without a size, as assembler may have, ends where the next one begins.
    """
    starts = sorted({symbol.value for symbol in symbols if symbol.section < SHN_LORESERVE and symbol.value < size})
    found: dict[int, tuple[ElfSymbol, int]] = {}
    for symbol in symbols:
        start = symbol.value
        if symbol.type == STT_FUNC and start < size:
            at = bisect_right(starts, start)
            end = start + symbol.size if symbol.size else starts[at] if at < len(starts) else size
            known = found.get(start)
            name = symbol if known is None or _better(symbol, known[0]) else known[0]
            found[start] = name, max(min(end, size), known[1] if known else 0)
    for start in sorted(found):
        yield found[start][0], start, found[start][1]


def _better(symbol: ElfSymbol, than: ElfSymbol) -> bool:
    """Whether it names the function better than another symbol at the same address."""

    def rank(of: ElfSymbol) -> tuple[bool, int]:
        return of.name in _ALIASES, {STB_GLOBAL: 0, STB_LOCAL: 2}.get(of.binding, 1)

    return rank(symbol) < rank(than)
