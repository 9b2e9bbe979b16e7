"""`Lines`: the source line of each instruction of a program, from the debug information of its compiler."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping

from vmodel.coverage.errors import CoverageError
from vmodel.coverage.line_table import Place, Row, rows
from vmodel.coverage.object_file import ET_REL, ObjectFile

#: AMD64 ABI 4.4: of an address of code, and of an offset in another section of debug information.
_R_X86_64_64, _R_X86_64_32 = 1, 10
#: Where code is put that is not in the program.
_NOWHERE = 1 << 62


class Lines:
    """Source lines by address.  Paths are those that the compiler recorded, normalised.

    Where a function was inlined, its own lines count, not that of the call.
    """

    def __init__(self, found: Iterable[Row]) -> None:
        """`found`: as `line_table.rows` has them."""
        at: dict[int, Place | None] = {}
        self._statements: defaultdict[int, set[Place]] = defaultdict(set)
        ends = []
        sequence: list[Row] = []
        for row in found:
            sequence.append(row)
            if row[1] is not None:
                continue
            end = row[0]
            ends.append(end)
            for address, place, statement in sequence:
                if address < end:  # at the end itself there is no instruction of this sequence
                    at[address] = place
                    if statement and place is not None:
                        self._statements[address].add(place)
            sequence.clear()
        for end in ends:
            at.setdefault(end, None)
        self._starts = sorted(at)
        self._places = [at[start] for start in self._starts]

    @classmethod
    def of_file(cls, file: ObjectFile, sections: Mapping[str, int] | None = None) -> Lines | None:
        """Those of a file with debug information; None: it has none.

        `sections`: for a module, the address of each executable section in the program.  CoverageError: it is damaged.
        """
        try:
            data = _relocated(file, sections or {})
            if not data:
                return None
            strings = [_contents(file, name) for name in (".debug_line_str", ".debug_str")]
            return cls(row for row in rows(data, *strings) if row[0] < _NOWHERE or not sections)
        except ValueError as error:
            raise CoverageError(f"damaged debug information: {error}", file=file.file) from None

    def at(self, address: int) -> Place | None:
        """The source file and line of the instruction at an address; None: unknown."""
        found = bisect_right(self._starts, address) - 1
        return self._places[found] if found >= 0 else None

    def of(self, addresses: Iterable[int]) -> set[Place]:
        """The source lines of instructions.

        Those of statements for which the compiler needed no instruction of their own count with the instruction that
        follows them.
        """
        found: set[Place] = set()
        for address in addresses:
            place = self.at(address)
            if place is not None:
                found.add(place)
            if address in self._statements:
                found |= self._statements[address]
        return found


def _contents(file: ObjectFile, name: str) -> bytes:
    section = file.section(name)
    return file.contents(section) if section else b""


def _relocated(file: ObjectFile, sections: Mapping[str, int]) -> bytes:
    """.debug_line with addresses of the program."""
    section = file.section(".debug_line")
    if section is None:
        return b""
    data = bytearray(file.contents(section))
    if file.type != ET_REL:
        return bytes(data)
    for offset, kind, number, addend in file.relocations(section):
        symbol = file.symbols[number]
        size = {_R_X86_64_64: 8, _R_X86_64_32: 4}.get(kind)
        if size is None:
            raise ValueError(f"a relocation of type {kind}")
        if offset + size > len(data):
            raise ValueError("a relocation behind the end")
        value = symbol.value + addend
        if size == 8:
            name = file.sections[symbol.section].name if 0 < symbol.section < len(file.sections) else ""
            value = sections[name] + value if name in sections else _NOWHERE
        data[offset : offset + size] = (value % (1 << size * 8)).to_bytes(size, "little")
    return bytes(data)
