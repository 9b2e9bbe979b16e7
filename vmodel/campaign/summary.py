"""A summary of a campaign's runs: the content of all forms of the report."""

from __future__ import annotations

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from vmodel.campaign.coverage import CampaignCoverage, gather
from vmodel.campaign.repeat import trusting
from vmodel.campaign.statistics import Rate
from vmodel.campaign.store import ResultStore, Row
from vmodel.experiment.case import Result
from vmodel.experiment.oracle import Effect, Outcome
from vmodel.guest.artifacts import NAMES

#: Outcomes that say nothing about the driver: they are not part of rates.
VOID = (Outcome.NOT_ACTIVATED, Outcome.HARNESS)
#: Outcomes after which the driver works.
SURVIVED = (Outcome.MASKED, Outcome.RECOVERED)


@dataclass(frozen=True)
class Ended:
    """A run that has ended, as reports show it."""

    row: Row
    result: Result
    #: The kernel as the campaign names it; for a role ("stable"), with the release.
    kernel: str
    #: Artefacts by name, as links relative to the report.
    links: dict[str, str]
    #: The run's folder, as a link.
    link: str
    #: The command line that repeats the run.
    command: str


@dataclass
class MatrixRow:
    """A line of the matrix: one plan on one machine under one workload."""

    machine: str
    workload: str
    plan: str
    #: The plan's rules, in the command line's form.
    rules: tuple[str, ...]
    #: Runs by kernel.
    runs: dict[str, list[Ended]] = field(default_factory=dict)

    @property
    def all(self) -> list[Ended]:
        """The runs with all kernels."""
        return [run for runs in self.runs.values() for run in runs]

    def count(self, outcome: Outcome) -> int:
        """The number of runs with an outcome."""
        return sum(run.result.outcome is outcome for run in self.all)

    def share(self, outcome: Outcome) -> float:
        """The share of runs with an outcome, 0 to 1."""
        return self.count(outcome) / len(self.all)

    @property
    def survived(self) -> Rate:
        """How many of the runs with an injected fault the driver survived."""
        return survival(self.all)

    @property
    def unexpected(self) -> int:
        """The number of runs with an outcome that is not acceptable."""
        return sum(not run.row.expected for run in self.all)

    @property
    def recover(self) -> list[float]:
        """The times to recover, in seconds, of the runs that recovered."""
        return [run.result.time_to_recover for run in self.all if run.result.time_to_recover is not None]


@dataclass
class Signature:
    """A finding that several runs may have in common: its text without addresses, numbers and times."""

    text: str
    effect: Effect
    sign: str
    oracle: str
    #: The full text of its first occurrence.
    example: str
    runs: list[Ended] = field(default_factory=list)

    @property
    def plans(self) -> list[str]:
        """The plans under which it was seen."""
        return sorted({run.row.run.plan for run in self.runs})

    @property
    def kernels(self) -> list[str]:
        """The kernels on which it was seen."""
        return sorted({run.kernel for run in self.runs} - {""})


class Summary:
    """The counts and lists of a campaign's runs."""

    def __init__(self, store: ResultStore, base: Path) -> None:
        """`base`: the folder that links are relative to."""
        self.folder = store.folder
        definition = store.definition
        self.kind = definition.kind
        self.name = definition.name
        self.file = definition.file
        rows = store.rows()
        self.total = len(rows)
        kernels = _kernels(rows)
        trust = trusting(rows)
        self.runs = [
            _ended(row, row.result, kernels[row.id], base, row.id in trust) for row in rows if row.result is not None
        ]
        self.kernels = sorted({run.kernel for run in self.runs})
        self.faults = _faults(self.runs)
        self.signatures = _signatures(self.runs)
        self.outcomes = Counter(run.result.outcome for run in self.runs)
        started = [run.row.started for run in self.runs if run.row.started is not None]
        ended = [run.row.ended for run in self.runs if run.row.ended is not None]
        self.started = _moment(min(started)) if started else ""
        self.ended = _moment(max(ended)) if ended else ""
        self.versions = _versions(self.runs)
        self.seeds = sorted({run.row.run.seed for run in self.runs})
        self.unexpected = [run for run in self.runs if not run.row.expected]

    @cached_property
    def coverage(self) -> CampaignCoverage:
        """What the runs have reached of the code that the campaign names; it is read when it is first asked for."""
        return gather([run.row for run in self.runs], {run.row.id: run.kernel for run in self.runs})

    def rate(self, outcome: Outcome) -> Rate:
        """The rate of an outcome: among all runs for VOID outcomes, else among the runs with an injected fault."""
        if outcome in VOID:
            return Rate(self.outcomes[outcome], len(self.runs))
        counted = _counted(self.runs)
        return Rate(counted.count(outcome), len(counted))

    def by_kernel(self) -> dict[str, Rate]:
        """How often the driver survived a fault, by kernel."""
        return {kernel: survival(run for run in self.runs if run.kernel == kernel) for kernel in self.kernels}


def survival(runs: Iterable[Ended]) -> Rate:
    """How many of the runs with an injected fault were masked or recovered."""
    counted = _counted(runs)
    return Rate(sum(outcome in SURVIVED for outcome in counted), len(counted))


def _counted(runs: Iterable[Ended]) -> list[Outcome]:
    """The outcomes of the runs that say something about the driver: a fault was injected, and the harness worked."""
    return [run.result.outcome for run in runs if run.row.injected and run.result.outcome not in VOID]


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _kernels(rows: Sequence[Row]) -> dict[int, str]:
    """The kernel's name of each run, by run id.  A role ("stable") gets the release, as it changes over time."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.result is not None and row.run.kernel in NAMES and "kernel" in row.result.versions:
            seen[row.run.kernel] = row.result.versions["kernel"]
    found = {}
    for row in rows:
        name = row.run.kernel
        # A run that never booted gets the release of the others.
        release = row.result.versions.get("kernel", seen.get(name)) if row.result is not None else None
        found[row.id] = f"{name} ({release})" if name in NAMES and release else name
    return found


def _ended(row: Row, result: Result, kernel: str, base: Path, trust: bool) -> Ended:
    link = quote(os.path.relpath(row.folder, base))
    links = {name: f"{link}/{quote(path)}" for name, path in result.artefacts.items()}
    command = f"vmodel reproduce {shlex.quote(str(row.folder))}{' --trust' if trust else ''}"
    return Ended(row, result, kernel, links, link, command)


def _faults(runs: Sequence[Ended]) -> list[MatrixRow]:
    found: dict[tuple[str, str, str], MatrixRow] = {}
    for run in runs:
        what = run.row.run
        plan = what.case.plan
        rules = tuple(rule.text() for rule in plan.rule) if plan is not None else ()
        place = (what.machine, what.workload, what.plan)
        fault = found.setdefault(place, MatrixRow(*place, rules))
        fault.runs.setdefault(run.kernel, []).append(run)
    return list(found.values())


def _signatures(runs: Sequence[Ended]) -> list[Signature]:
    """All signatures, the worst effect first, then the most frequent."""
    found: dict[str, Signature] = {}
    for run in runs:
        for finding in run.result.evidence:
            known = found.setdefault(
                finding.signature,
                Signature(finding.signature, finding.effect, finding.sign, finding.oracle, finding.text),
            )
            if known.runs[-1:] != [run]:
                known.runs.append(run)
    order = list(Effect)
    return sorted(found.values(), key=lambda s: (order.index(s.effect), -len(s.runs), s.text))


def _versions(runs: Sequence[Ended]) -> dict[str, dict[str, int]]:
    """The number of runs by part and version."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for part, version in run.result.versions.items():
            found[part][version] += 1
    return {part: dict(sorted(versions.items())) for part, versions in sorted(found.items())}
