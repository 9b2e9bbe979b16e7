"""A coverage in the format of lcov (its manual page geninfo(1), "FILES"), which genhtml and many editors read.

Counts are 1 and 0, as vmodel knows whether code ran and not how often.  A side of a branch counts as taken if both the
jump and the code there ran.  The compiler copies and moves lines: where one ran and none of its jumps did, nothing is
said of its branches.  Modules without debug information have a listing of their instructions as source.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.line_table import Place
from vmodel.coverage.listing import Listing
from vmodel.coverage.program import Program
from vmodel.coverage.sources import Sources


class _Record:
    """What is known of one source file."""

    def __init__(self) -> None:
        #: By name: where a function begins, and whether it ran.
        self.functions: dict[str, tuple[int, bool]] = {}
        self.lines: dict[int, bool] = {}
        #: By line: for each jump, whether it ran and each of its sides.
        self.branches: dict[int, list[tuple[bool, bool, bool]]] = defaultdict(list)

    def unclear(self) -> list[int]:
        """Lines that ran, but none of whose jumps did.

        Their branches are left out: the compiler has copied the line, and genhtml 2 takes that for an error.
        """
        return [line for line, jumps in self.branches.items() if self.lines.get(line) and not any(map(_taken, jumps))]

    def text(self, test: str, path: str) -> Iterator[str]:
        yield from (f"TN:{test}", f"SF:{path}")
        yield from (f"FN:{line},{name}" for name, (line, _) in self.functions.items())
        yield from (f"FNDA:{int(ran)},{name}" for name, (_, ran) in self.functions.items())
        yield f"FNF:{len(self.functions)}"
        yield f"FNH:{sum(ran for _, ran in self.functions.values())}"
        found = hit = 0
        for line, jumps in sorted(self.branches.items()):
            for block, (ran, *sides) in enumerate(jumps):
                for side, taken in enumerate(sides):
                    yield f"BRDA:{line},{block},{side},{int(taken) if ran else '-'}"
                    found, hit = found + 1, hit + (ran and taken)
        yield from (f"BRF:{found}", f"BRH:{hit}")
        yield from (f"DA:{line},{int(ran)}" for line, ran in sorted(self.lines.items()))
        yield from (f"LF:{len(self.lines)}", f"LH:{sum(self.lines.values())}", "end_of_record")


def _taken(jump: tuple[bool, bool, bool]) -> bool:
    return jump[0] and any(jump[1:])


def lcov(comparison: Comparison, listings: Mapping[str, tuple[Path, Listing]], sources: Sources) -> str:
    """The text of a tracefile; with faults, two tests: what ran without them, and what under them.

    `listings`: by module, its instructions as text, and the file where this is.
    """
    tests = {"clean": comparison.clean}
    every = _records(comparison, comparison.everything, listings, sources)
    if comparison.faults:
        tests["faults"] = Coverage.union(comparison.faults.values())
    lines: list[str] = []
    for test, coverage in tests.items():
        for path, record in sorted(_records(comparison, coverage, listings, sources).items()):
            for line in every[path].unclear():
                record.branches.pop(line, None)
            lines += record.text(test, path)
    return "\n".join(lines) + "\n" if lines else ""


def _records(
    comparison: Comparison, coverage: Coverage, listings: Mapping[str, tuple[Path, Listing]], sources: Sources
) -> dict[str, _Record]:
    found: dict[str, _Record] = defaultdict(_Record)
    for name, program in comparison.programs.items():
        ran = frozenset(coverage.reached.get(name, ()))
        places: Mapping[int, Sequence[Place]] = comparison.all_places(name)
        if not places:
            path, listing = listings[name]
            places = {address: [(str(path), line)] for address, line in listing.lines.items()}
        _fill(found, program, ran, places)
    return {str(sources.path(file) or file): record for file, record in found.items()}


def _fill(
    found: dict[str, _Record],
    program: Program,
    ran: frozenset[int],
    places: Mapping[int, Sequence[Place]],
) -> None:
    for address, several in places.items():
        for file, line in several:
            lines = found[file].lines
            lines[line] = lines.get(line, False) or address in ran
    for function in program.functions:
        for file, line in places.get(function.address, ())[:1]:  # genhtml wants it to be a line that has code
            # Several static functions of a header may have one name: lcov has no more than one of a name in a file.
            first, before = found[file].functions.get(function.name, (line, False))
            hit = before or any(address in ran for address in function.addresses)
            found[file].functions[function.name] = (min(first, line), hit)
    for branch in program.branches():
        for file, line in places.get(branch.address, ())[:1]:
            sides = (branch.taken in ran, branch.not_taken in ran)
            found[file].branches[line].append((branch.address in ran, *sides))
