"""`Comparison`: what ran without faults beside what each fault reached, counted by module, function and source line.

A single coverage is a comparison without faults.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.frontier import Untaken, untaken
from vmodel.coverage.functions import CodeFunction
from vmodel.coverage.line_table import Place
from vmodel.coverage.lines import Lines
from vmodel.coverage.program import Program
from vmodel.coverage.registry import programs


class Reach(enum.IntEnum):
    """Whether something ran: never, only under faults, or without faults (too)."""

    NEVER = 0
    FAULTS = 1
    CLEAN = 2


@dataclass(frozen=True)
class Tally:
    """How many instructions or lines there are, how many ran without faults, and how many only under faults."""

    total: int = 0
    clean: int = 0
    faults: int = 0

    @classmethod
    def of(cls, reaches: Iterator[Reach]) -> Tally:
        """Counts these."""
        counts = [0, 0, 0]
        for reach in reaches:
            counts[reach] += 1
        return cls(sum(counts), counts[Reach.CLEAN], counts[Reach.FAULTS])

    @property
    def reached(self) -> int:
        """How many ran at all."""
        return self.clean + self.faults

    @property
    def never(self) -> int:
        """How many did not run."""
        return self.total - self.reached

    @property
    def percent(self) -> float:
        """Of those that ran at all, 0 to 100; rounded down, so that 100 means all."""
        return int(1000 * self.reached / self.total) / 10 if self.total else 0.0


@dataclass(frozen=True)
class FunctionRow:
    """A function of a module; `lines`: of source, None without debug information; `place`: where it begins."""

    module: str
    function: CodeFunction
    instructions: Tally
    lines: Tally | None
    place: Place | None

    @property
    def name(self) -> str:
        """The function's name, which several may have."""
        return self.function.name


@dataclass(frozen=True)
class ModuleRow:
    """A module, and its functions by address.

    `note`: why these are unknown; `instructions.total` is 0 then.  `notes`: what else is not known, a line each.
    """

    name: str
    build_id: str
    instructions: Tally
    lines: Tally | None
    functions: tuple[FunctionRow, ...]
    note: str = ""
    notes: tuple[str, ...] = ()

    @property
    def functions_reached(self) -> int:
        """How many functions ran, at least in part."""
        return sum(1 for row in self.functions if row.instructions.reached)


@dataclass(frozen=True)
class FaultRow:
    """A fault, and what ran under it alone: under no other fault, and not without faults."""

    name: str
    reached: int
    only: Coverage
    #: Module and function, with the number of instructions that only this fault reached; the most first.
    functions: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Comparison:
    """Coverage without faults, and by fault; of the same builds of the same modules.

    `growth`: (name of a run, instructions that it and all runs before have reached), in the order of the runs.
    """

    clean: Coverage
    faults: Mapping[str, Coverage] = field(default_factory=dict)
    title: str = "coverage"
    growth: Sequence[tuple[str, int]] = ()

    @classmethod
    def of_runs(
        cls, clean: Sequence[Coverage], faults: Sequence[tuple[str, Coverage]], title: str = "coverage"
    ) -> Comparison:
        """Of runs without faults, and of (fault, coverage) of each run with one, in their order."""
        every, growth = Coverage(), []
        by_fault: dict[str, list[Coverage]] = {}
        for name, coverage in [*(("no fault", run) for run in clean), *faults]:
            every |= coverage
            growth.append((name, len(every)))
        for name, coverage in faults:
            by_fault.setdefault(name, []).append(coverage)
        under = {name: Coverage.union(several) for name, several in by_fault.items()}
        return cls(Coverage.union(clean), under, title, growth)

    @cached_property
    def everything(self) -> Coverage:
        """What ran at all.  CoverageError: the coverages are of different builds."""
        return Coverage.union([self.clean, *self.faults.values()])

    @cached_property
    def programs(self) -> Mapping[str, Program]:
        """The modules whose files are here."""
        return {name: found for name, found in self._found.items() if isinstance(found, Program)}

    @cached_property
    def _found(self) -> dict[str, Program | str]:
        """By module: the program, or why its file is not here."""
        found: dict[str, Program | str] = {}
        for name in self.everything.modules():
            try:
                found[name] = programs.find(name, self.everything.build_ids[name])
            except CoverageError as error:
                found[name] = str(error)
        return found

    def reach(self, module: str, address: int) -> Reach:
        """Whether an instruction ran."""
        if (module, address) in self.clean:
            return Reach.CLEAN
        return Reach.FAULTS if (module, address) in self.everything else Reach.NEVER

    @cached_property
    def lines(self) -> Mapping[str, Mapping[int, Reach]]:
        """By file and number: whether any instruction of a source line ran.  Lines without code are not in it."""
        found: dict[str, dict[int, Reach]] = {}
        for name in self.programs:
            for address, places in self.all_places(name).items():
                reach = self.reach(name, address)
                for file, line in places:
                    lines = found.setdefault(file, {})
                    lines[line] = max(reach, lines.get(line, Reach.NEVER))
        return {file: dict(sorted(found[file].items())) for file in sorted(found)}

    def places(self, module: str) -> Mapping[int, Place]:
        """By address: file and line that a module's instruction is from; empty without debug information."""
        return self._places.get(module, {})

    def all_places(self, module: str) -> Mapping[int, Sequence[Place]]:
        """By address: all source lines that run with an instruction, its own first, then those of empty statements."""
        return self._all_places.get(module, {})

    @cached_property
    def _places(self) -> Mapping[str, Mapping[int, Place]]:
        return {
            name: {address: place for address in self.programs[name].addresses if (place := lines.at(address))}
            for name, lines in self._lines.items()
            if isinstance(lines, Lines)
        }

    @cached_property
    def _all_places(self) -> Mapping[str, Mapping[int, Sequence[Place]]]:
        return {
            name: {a: [place, *sorted(lines.of([a]) - {place})] for a, place in self.places(name).items()}
            for name, lines in self._lines.items()
            if isinstance(lines, Lines)
        }

    @cached_property
    def _lines(self) -> Mapping[str, Lines | str]:
        """By module: its source lines, or why they are not known; without debug information it is left out."""
        found: dict[str, Lines | str] = {}
        for name, program in self.programs.items():
            try:
                lines = program.lines()
            except CoverageError as error:
                found[name] = str(error)
            else:
                if lines is not None:
                    found[name] = lines
        return found

    @cached_property
    def modules(self) -> Sequence[ModuleRow]:
        """All modules, by name."""
        return [self._module(name, found) for name, found in self._found.items()]

    def _module(self, name: str, found: Program | str) -> ModuleRow:
        build_id = self.everything.build_ids[name]
        if isinstance(found, str):
            return ModuleRow(name, build_id, Tally(), None, (), found)
        rows = tuple(self._function(name, function) for function in found.functions)
        lines = self._lines.get(name)
        reaches = {address: self.reach(name, address) for address in found.addresses}
        return ModuleRow(
            name,
            build_id,
            Tally.of(iter(reaches.values())),
            self._lines_of(name, reaches),
            rows,
            notes=(*found.notes, *([lines] if isinstance(lines, str) else [])),
        )

    def _function(self, module: str, function: CodeFunction) -> FunctionRow:
        reaches = {address: self.reach(module, address) for address in function.addresses}
        tally = Tally.of(iter(reaches.values()))
        return FunctionRow(
            module, function, tally, self._lines_of(module, reaches), self.places(module).get(function.address)
        )

    def _lines_of(self, module: str, reaches: Mapping[int, Reach]) -> Tally | None:
        """Of the source lines of these instructions; None: they are not known."""
        places = self.all_places(module)
        if not places:
            return None
        lines: dict[Place, Reach] = {}
        for address, reach in reaches.items():
            for place in places.get(address, ()):
                lines[place] = max(reach, lines.get(place, Reach.NEVER))
        return Tally.of(iter(lines.values()))

    @cached_property
    def untaken(self) -> Sequence[Untaken]:
        """The branches that never ran, next to code that did; those with the most code behind them first."""
        found: list[Untaken] = []
        for name, program in self.programs.items():
            found += untaken(program, self.everything.reached.get(name, AddressSet()))
        return sorted(found, key=lambda branch: (-branch.behind, branch.module, branch.address))

    @cached_property
    def by_fault(self) -> Sequence[FaultRow]:
        """All faults; the one that reached the most that nothing else did first."""
        once = twice = Coverage()
        for coverage in self.faults.values():
            twice |= once & coverage
            once |= coverage
        usual = self.clean | twice
        rows = []
        for name, coverage in self.faults.items():
            only = coverage - usual
            rows.append(FaultRow(name, len(coverage), only, self.functions_of(only)))
        return sorted(rows, key=lambda row: -len(row.only))

    def functions_of(self, coverage: Coverage) -> tuple[tuple[str, str, int], ...]:
        """Module and function with the number of instructions of a coverage, the most first; "?" is no function."""
        counts: dict[tuple[str, str], int] = {}
        for module, address in coverage:
            program = self.programs.get(module)
            function = program.function_at(address) if program else None
            key = (module, function.name if function else "?")
            counts[key] = counts.get(key, 0) + 1
        most = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
        return tuple((module, name, count) for (module, name), count in most)
