"""What a campaign's runs say together: what all forms of the report show."""

from __future__ import annotations

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from vmodel.campaign.statistics import Rate
from vmodel.campaign.store import Row, Store
from vmodel.experiment.case import Result
from vmodel.experiment.oracle import Effect, Outcome
from vmodel.guest.artifacts import ROLES

#: Outcomes that say nothing about the driver: no part of rates.
VOID = (Outcome.NOT_ACTIVATED, Outcome.HARNESS)
#: The driver has gone on.
SURVIVED = (Outcome.MASKED, Outcome.RECOVERED)


@dataclass(frozen=True)
class Ended:
    """A run that has ended, as reports show it."""

    row: Row
    result: Result
    #: The kernel as the campaign calls it; with the release, if that is a role.
    kernel: str
    #: Artefacts by name, as links from the report.
    links: dict[str, str]
    #: The run's folder, as a link.
    link: str
    #: What repeats it.
    command: str


@dataclass
class Fault:
    """A line of the matrix: one plan on one machine under one workload."""

    machine: str
    workload: str
    plan: str
    #: The plan's rules, in the command line's form.
    rules: tuple[str, ...]
    #: By kernel.
    runs: dict[str, list[Ended]] = field(default_factory=dict)

    @property
    def all(self) -> list[Ended]:
        """Of all kernels."""
        return [run for runs in self.runs.values() for run in runs]

    def count(self, outcome: Outcome) -> int:
        """Runs with an outcome."""
        return sum(run.result.outcome is outcome for run in self.all)

    def share(self, outcome: Outcome) -> float:
        """The same as a share, 0 to 1."""
        return self.count(outcome) / len(self.all)

    @property
    def survived(self) -> Rate:
        """Of the runs in which a fault was injected."""
        return survival(run.result.outcome for run in self.all)

    @property
    def unexpected(self) -> int:
        """Runs with an outcome that is not right."""
        return sum(not run.row.expected for run in self.all)

    @property
    def recover(self) -> list[float]:
        """Seconds to recover, of the runs that did."""
        return [run.result.time_to_recover for run in self.all if run.result.time_to_recover is not None]


@dataclass
class Signature:
    """One thing that oracles saw, in however many runs."""

    text: str
    effect: Effect
    sign: str
    oracle: str
    #: As it was seen first.
    example: str
    runs: list[Ended] = field(default_factory=list)

    @property
    def plans(self) -> list[str]:
        """The faults that led to it."""
        return sorted({run.row.run.plan for run in self.runs})

    @property
    def kernels(self) -> list[str]:
        """Where it was seen."""
        return sorted({run.kernel for run in self.runs} - {""})


class Summary:
    """A campaign's runs, counted."""

    def __init__(self, store: Store, base: Path) -> None:
        """`base`: the folder from which links count."""
        self.folder = store.folder
        definition = store.definition
        self.kind: str = definition["kind"]
        self.name: str = definition["name"]
        self.file: str = definition.get("file", "")
        rows = store.rows()
        self.total = len(rows)
        kernels = _kernels(rows)
        self.runs = [_ended(row, row.result, kernels[row.id], base) for row in rows if row.result is not None]
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

    def rate(self, outcome: Outcome) -> Rate:
        """An outcome's rate: of the runs with a fault injected, or of all for those that say nothing of the driver."""
        if outcome in VOID:
            return Rate(self.outcomes[outcome], len(self.runs))
        return Rate(self.outcomes[outcome], sum(n for o, n in self.outcomes.items() if o not in VOID))

    def by_kernel(self) -> dict[str, Rate]:
        """How often drivers survived a fault, by kernel."""
        return {
            kernel: survival(run.result.outcome for run in self.runs if run.kernel == kernel) for kernel in self.kernels
        }


def survival(outcomes: Iterable[Outcome]) -> Rate:
    """How many of the runs with a fault injected went on as if nothing had been."""
    counted = [outcome for outcome in outcomes if outcome not in VOID]
    return Rate(sum(outcome in SURVIVED for outcome in counted), len(counted))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _kernels(rows: Sequence[Row]) -> dict[int, str]:
    """By run: its kernel's name.  A role means another release when the archive has moved on, so that is said."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.result is not None and row.run.kernel in ROLES and "kernel" in row.result.versions:
            seen[row.run.kernel] = row.result.versions["kernel"]
    found = {}
    for row in rows:
        name = row.run.kernel
        # A run that never booted has the release of the others.
        release = row.result.versions.get("kernel", seen.get(name)) if row.result is not None else None
        found[row.id] = f"{name} ({release})" if name in ROLES and release else name
    return found


def _ended(row: Row, result: Result, kernel: str, base: Path) -> Ended:
    link = quote(os.path.relpath(row.folder, base))
    links = {name: f"{link}/{quote(path)}" for name, path in result.artefacts.items()}
    return Ended(row, result, kernel, links, link, f"vmodel reproduce {shlex.quote(str(row.folder))}")


def _faults(runs: Sequence[Ended]) -> list[Fault]:
    found: dict[tuple[str, str, str], Fault] = {}
    for run in runs:
        what = run.row.run
        plan = what.case.plan
        rules = tuple(rule.text() for rule in plan.rule) if plan is not None else ()
        place = (what.machine, what.workload, what.plan)
        fault = found.setdefault(place, Fault(*place, rules))
        fault.runs.setdefault(run.kernel, []).append(run)
    return list(found.values())


def _signatures(runs: Sequence[Ended]) -> list[Signature]:
    """The worst first, then the most frequent."""
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
    """By part, by version: runs."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for part, version in run.result.versions.items():
            found[part][version] += 1
    return {part: dict(sorted(versions.items())) for part, versions in sorted(found.items())}
