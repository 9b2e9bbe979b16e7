"""`Coverage`: which instructions of which programs were executed."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vmodel.coverage.addresses import PAGE, AddressSet
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.functions import CodeFunction
from vmodel.coverage.line_table import Place
from vmodel.coverage.program import Program
from vmodel.coverage.registry import programs

#: Bounds of what `from_json` reads: programs, characters of names and build ids, and of all programs together,
#: instructions and pages of `AddressSet`.  A kernel has 40 MiB of code; a page takes half a kB of memory however few
#: of its addresses are in the set, so addresses that are far apart would take much more memory than text.
_MAX_PROGRAMS = 256
_MAX_INSTRUCTIONS = 4 << 20
_MAX_NAME = 256
_MAX_PAGES = 1 << 15
#: Bytes of gaps of a program: most gaps take one.
_MAX_DATA = _MAX_INSTRUCTIONS


@dataclass(frozen=True)
class FunctionCoverage:
    """How many of a function's instructions were executed."""

    module: str
    name: str
    reached: int
    total: int
    function: CodeFunction


class Coverage:
    """Which instructions of which programs were executed: an immutable set of pairs of a program's name and an address.

    Union, difference, intersection and comparison need no files.  What needs to know the code, as `functions`, finds
    programs by their build ids through `vmodel.coverage.registry`.  A program of which nothing ran is in `modules`,
    but makes no difference for `==`.  Coverages of different builds of a program do not mix: CoverageError.
    """

    __slots__ = ("_build_ids", "_reached")

    def __init__(self, reached: Mapping[str, AddressSet] | None = None, build_ids: Mapping[str, str] | None = None):
        """`reached`: addresses by program; `build_ids`: of the same programs."""
        self._reached = dict(reached or {})
        self._build_ids = {name: (build_ids or {}).get(name, "") for name in self._reached}

    @classmethod
    def of_ranges(cls, program: Program, ranges: Iterable[tuple[int, int]]) -> Coverage:
        """Of the program's instructions whose first byte is in one of the ranges (start, end), end not included."""
        programs.add(program)
        return cls({program.name: AddressSet(program.starting_in(ranges))}, {program.name: program.build_id})

    @classmethod
    def union(cls, coverages: Iterable[Coverage]) -> Coverage:
        """What any of them has."""
        sets: dict[str, list[AddressSet]] = {}
        ids: dict[str, str] = {}
        for coverage in coverages:
            coverage._check(ids)
            ids |= coverage._build_ids
            for name, reached in coverage._reached.items():
                sets.setdefault(name, []).append(reached)
        return cls({name: AddressSet.union(several) for name, several in sets.items()}, ids)

    # ---- a set ------------------------------------------------------------------------------

    def _check(self, ids: Mapping[str, str]) -> None:
        for name, build_id in self._build_ids.items():
            if ids.get(name, build_id) != build_id:
                raise CoverageError(
                    f"{name}: coverage of different builds does not mix: build ids {ids[name] or 'none'} and"
                    f" {build_id or 'none'}"
                )

    def __or__(self, other: Coverage) -> Coverage:
        return Coverage.union((self, other))

    def __and__(self, other: Coverage) -> Coverage:
        self._check(other._build_ids)
        empty = AddressSet()
        both = {**self._reached, **other._reached}
        return Coverage(
            {name: self._reached.get(name, empty) & other._reached.get(name, empty) for name in both},
            {**self._build_ids, **other._build_ids},
        )

    def __sub__(self, other: Coverage) -> Coverage:
        self._check(other._build_ids)
        empty = AddressSet()
        return Coverage(
            {name: reached - other._reached.get(name, empty) for name, reached in self._reached.items()},
            self._build_ids,
        )

    def __le__(self, other: Coverage) -> bool:
        self._check(other._build_ids)
        empty = AddressSet()
        return all(reached <= other._reached.get(name, empty) for name, reached in self._reached.items())

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Coverage) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> frozenset[tuple[str, str, AddressSet]]:
        return frozenset((name, self._build_ids[name], reached) for name, reached in self._reached.items() if reached)

    def __bool__(self) -> bool:
        return any(self._reached.values())

    def __len__(self) -> int:
        return sum(map(len, self._reached.values()))

    def __contains__(self, place: tuple[str, int]) -> bool:
        name, address = place
        return name in self._reached and address in self._reached[name]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((name, address) for name in sorted(self._reached) for address in self._reached[name])

    def __reduce__(self) -> tuple[object, ...]:
        return Coverage, (self._reached, self._build_ids)

    def __repr__(self) -> str:
        return f"Coverage({', '.join(f'{name}: {len(reached)}' for name, reached in sorted(self._reached.items()))})"

    # ---- what it is of ----------------------------------------------------------------------

    def modules(self) -> list[str]:
        """The names of the programs that it is of, sorted; also of those of which nothing was executed."""
        return sorted(self._reached)

    @property
    def reached(self) -> Mapping[str, AddressSet]:
        """The addresses of executed instructions by program, as compact sets."""
        return MappingProxyType(self._reached)

    @property
    def build_ids(self) -> Mapping[str, str]:
        """The programs' build ids."""
        return MappingProxyType(self._build_ids)

    @property
    def instructions(self) -> Mapping[str, frozenset[int]]:
        """The addresses of executed instructions by program."""
        return {name: frozenset(reached) for name, reached in self._reached.items()}

    @property
    def programs(self) -> Mapping[str, Program]:
        """The programs.  CoverageError: a file with its build id is not here."""
        return {name: programs.find(name, self._build_ids[name]) for name in self.modules()}

    def functions(self) -> list[FunctionCoverage]:
        """All functions of the programs, by program and address.  CoverageError: a program's file is not here."""
        found = []
        for name, program in self.programs.items():
            reached = frozenset(self._reached[name])
            for function in program.functions:
                addresses = function.addresses
                found.append(
                    FunctionCoverage(
                        name, function.name, sum(map(reached.__contains__, addresses)), len(addresses), function
                    )
                )
        return found

    def functions_reached(self) -> set[tuple[str, str]]:
        """Programs and names of the functions of which anything was executed."""
        return {(found.module, found.name) for found in self.functions() if found.reached}

    def lines(self) -> set[Place]:
        """The source files and lines of what was executed, of programs that have debug information.

        CoverageError: a program's file is not here, or its debug information is damaged or of another build.
        """
        found: set[Place] = set()
        for name, program in self.programs.items():
            lines = program.lines()
            if lines is not None:
                found |= lines.of(self._reached[name])
        return found

    @property
    def pages(self) -> int:
        """What it takes in memory, about half a kB each: pages of addresses that have any."""
        return sum(reached.pages for reached in self._reached.values())

    @property
    def readable(self) -> bool:
        """Whether it is no larger than what `from_json` reads."""
        return len(self._reached) <= _MAX_PROGRAMS and self.pages <= _MAX_PAGES and len(self) <= _MAX_INSTRUCTIONS

    # ---- JSON -------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON: the addresses as gaps between them, in LEB128, compressed by zlib, in base64."""
        return {
            "version": 1,
            "programs": {
                name: {"build_id": self._build_ids[name], "instructions": _packed(self._reached[name])}
                for name in self.modules()
            },
        }

    @classmethod
    def from_json(cls, value: Any) -> Coverage:
        """What `to_json` has written.  CoverageError: it is something else, or too large."""
        if not isinstance(value, dict) or value.get("version") != 1 or not isinstance(value.get("programs"), dict):
            raise CoverageError("not coverage as vmodel writes it (version 1)")
        if len(value["programs"]) > _MAX_PROGRAMS:
            raise CoverageError(f"coverage of more than {_MAX_PROGRAMS} programs")
        reached: dict[str, AddressSet] = {}
        ids: dict[str, str] = {}
        instructions, pages = _MAX_INSTRUCTIONS, _MAX_PAGES
        for name, entry in value["programs"].items():
            if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
                raise CoverageError("coverage of a program whose name is none")
            build_id = entry.get("build_id") if isinstance(entry, dict) else None
            if not isinstance(build_id, str) or len(build_id) > _MAX_NAME or build_id.strip("0123456789abcdef"):
                raise CoverageError(f"coverage of {name}: its build id must be hexadecimal digits")
            try:
                reached[name] = AddressSet(_unpacked(entry.get("instructions"), instructions, pages))
            except ValueError as error:
                raise CoverageError(f"coverage of {name}: damaged instructions: {error}") from None
            instructions -= len(reached[name])
            pages -= reached[name].pages
            ids[name] = build_id
        return cls(reached, ids)


def _packed(addresses: AddressSet) -> str:
    data = bytearray()
    last = 0
    for address in addresses:
        gap, last = address - last, address
        while gap > 0x7F:
            data.append(gap & 0x7F | 0x80)
            gap >>= 7
        data.append(gap)
    return base64.b64encode(zlib.compress(bytes(data), 9)).decode()


def _unpacked(text: Any, instructions: int, pages: int) -> list[int]:
    """The addresses of what `_packed` made.  ValueError: damaged, or more than so many instructions or pages."""
    if not isinstance(text, str) or len(text) > 4 * _MAX_INSTRUCTIONS:
        raise ValueError("no text, or too long")
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(base64.b64decode(text, validate=True), _MAX_DATA + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(str(error)) from None
    if len(data) > _MAX_DATA or not decompressor.eof:
        raise ValueError("too many, or cut off")
    found: list[int] = []
    address = gap = shift = 0
    page = -1
    for byte in data:
        gap |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            address += gap
            if address >> 64 or (found and not gap):
                raise ValueError("addresses that do not ascend, or have more than 64 bits")
            if len(found) >= instructions:
                raise ValueError(f"more than {_MAX_INSTRUCTIONS:,} in all")
            if address // PAGE != page:
                page = address // PAGE
                pages -= 1
                if pages < 0:
                    raise ValueError(f"they are spread over more than {_MAX_PAGES * PAGE >> 20} MiB of code")
            found.append(address)
            gap = shift = 0
        elif shift >= 64:
            raise ValueError("a gap of more than 64 bits")
    if shift:
        raise ValueError("cut off")
    return found
