"""`ModuleCode`: the functions of a module, from its symbols, relocations and bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial

from vmodel.coverage.disassembly import Instruction, Referred, decode
from vmodel.coverage.functions import CodeFunction, NamedCode, put_together
from vmodel.coverage.object_file import (
    R_X86_64_PC32,
    R_X86_64_PLT32,
    SHF_ALLOC,
    STB_GLOBAL,
    STB_LOCAL,
    STT_FUNC,
    STT_SECTION,
    ElfSymbol,
    ObjectFile,
    Relocation,
    Section,
)

#: Names that <linux/module.h> gives to a module's functions beside their own.
_ALIASES = frozenset({"init_module", "cleanup_module"})


class ModuleCode:
    """Decodes a module.  CoverageError: the file is damaged."""

    def __init__(self, file: ObjectFile) -> None:
        self._file = file
        self._executable = {s.index: s for s in file.sections if s.executable and file.contents(s)}
        self.undecoded: list[int] = []

    def functions(self) -> list[CodeFunction]:
        """The functions in ascending order."""
        by_section: defaultdict[int, list[ElfSymbol]] = defaultdict(list)
        for symbol in self._file.symbols:
            if symbol.section in self._executable and symbol.type != STT_SECTION:
                by_section[symbol.section].append(symbol)
        found = []
        for index, section in self._executable.items():
            last = 0
            for symbol, start, end in _extents(by_section[index], section.size):
                # A symbol inside of a function is an entry of it.  One that begins in it and ends later is cut.
                if end > last:
                    first = section.offset + max(start, last)
                    code = self._decode(section, max(start, last), end)
                    found.append(NamedCode(symbol.name, section.name, first, section.offset + end, code))
                    last = end
        return put_together(found)

    def _decode(self, section: Section, start: int, end: int) -> list[Instruction]:
        """The instructions in [start, end) of a section."""
        known = self._known[section.index]
        resume = [section.offset + where for where in known[bisect_right(known, start) : bisect_right(known, end - 1)]]
        code = self._file.data[section.offset + start : section.offset + end]
        inside = self._inside[section.index]
        return list(decode(code, section.offset + start, self._referred, inside, resume, self.undecoded))

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
            return Referred.to(None, symbol.name, relocation.addend + 4)
        if symbol.type != STT_SECTION:
            return Referred.to(section.offset + value, symbol.name, relocation.addend + 4)
        return self._inside[symbol.section](section.offset + value)

    @cached_property
    def _inside(self) -> dict[int, Callable[[int], Referred]]:
        """By index of a section: what refers to a place in it by its address in the program."""

        def refer(section: Section, address: int) -> Referred:
            value = address - section.offset
            if not 0 <= value < section.size:
                return Referred(None, f"{address:#x}")
            starts, names = self._names[section.index]
            at = bisect_right(starts, value) - 1
            return (
                Referred.to(address, names[at], value - starts[at])
                if at >= 0
                else Referred.to(address, section.name, value)
            )

        return {index: partial(refer, section) for index, section in self._executable.items()}

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


def _extents(symbols: list[ElfSymbol], size: int) -> Iterator[tuple[ElfSymbol, int, int]]:
    """Each function's symbol with start and end, which may overlap; one for each start, the longest of them first.

    A symbol without a size, as assembler may have, ends where the next one begins.
    """
    starts = sorted({symbol.value for symbol in symbols if symbol.value < size})
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
