"""Runs a search: clean runs first, then one attempt after the other, and the minimising of what it finds.

The store is the state.  A search that continues proposes the same attempts again, and takes the results of those that
have ended from the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmodel.campaign.matrix import ACCEPTABLE, CONTROL, Run, inputs
from vmodel.campaign.progress import Reporter
from vmodel.campaign.rig import GUESTS
from vmodel.campaign.runner import Runner
from vmodel.campaign.store import ResultStore, Row
from vmodel.campaign.sweep import CleanRunError
from vmodel.device import PciDevice
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case, Result
from vmodel.experiment.oracle import Outcome
from vmodel.explore.finds import Find, Shrinking, problems
from vmodel.explore.reached import code_of, features_of
from vmodel.explore.search import LAG, Attempt, Feature, Observation, Search
from vmodel.explore.space import PlanSpace, identity
from vmodel.explore.survey import Site, records, sites, survey_plan
from vmodel.inject import FaultPlan
from vmodel.interrupts import uncovered
from vmodel.mistakes import gist

#: The titles of the clean runs: those without faults, and the survey.
CLEAN = (CONTROL, f"{CONTROL}, again", "survey")
#: What minimising may take beyond a budget in time, as a part of it, and at least so many seconds.
_MORE, _LEAST_MORE = 0.25, 60.0


@dataclass(frozen=True)
class SearchBudget:
    """When a search ends: after `runs` attempts, or after `seconds`; None: no limit of this kind."""

    runs: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Exploration:
    """What is explored, and how."""

    case: Case
    devices: Mapping[str, PciDevice]
    drivers: tuple[str, ...] = ()
    seed: int = 0
    #: False: a random search, to compare with.
    feedback: bool = True
    #: Whether also faults are tried whose effect on the guest's memory is not the driver's fault.
    wild: bool = False
    rig: str = GUESTS

    def definition(self) -> dict[str, str]:
        """The definition for `ResultStore.create`."""
        how = "" if self.feedback else ", random"
        return {
            "kind": "explore",
            "name": f"{self.case.machine.stem}: {', '.join(self.drivers)}, seed {self.seed}{how}",
        }

    def run(self, title: str, plan: FaultPlan | None, *, fresh: bool = False) -> Run:
        """A run of a plan."""
        case = self.case.model_copy(
            update={"name": title, "plan": plan, "seed": None, "fresh": fresh or self.case.fresh}
        )
        clean = title in CLEAN
        return Run(
            machine=self.case.machine.stem,
            kernel=self.case.kernel or "",
            workload="explore",
            plan=title,
            seed=0 if plan is None else plan.seed,
            case=case,
            expect=(Outcome.NOT_ACTIVATED, Outcome.MASKED) if clean else ACCEPTABLE,
            inputs=inputs(case, self.rig),
            rig=self.rig,
        )


class Explorer:
    """A search in a store.  `run` may be interrupted; everything that ended until then is taken."""

    def __init__(
        self,
        what: Exploration,
        store: ResultStore,
        runner: Runner,
        reporter: Reporter,
        budget: SearchBudget,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.what = what
        self.store = store
        self._runner = runner
        self._reporter = reporter
        self._budget = budget
        self._clock = clock
        #: What the clean runs executed; what all runs did.
        self.clean: frozenset[Feature] = frozenset()
        self.code: frozenset[Feature] = frozenset()
        self.sites: list[Site] = []
        self.attempts: list[Attempt] = []
        self.finds: list[Find] = []
        #: By attempt: how many instructions it was the first to execute.
        self.growth: list[int] = []
        self.search: Search | None = None
        #: Why it ended: "runs", "time", "exhausted" or "interrupted".
        self.ended = "interrupted"
        self._signatures: set[str] = set()
        self._without: dict[str, Result] = {}
        self._shrinkings: list[Shrinking] = []
        #: The finds, and the attempts' rows, of which a run is under way.
        self._busy: set[int] = set()
        self._searching: set[int] = set()
        self._rows: dict[int, Row] = {}
        self._number: dict[int, int] = {}
        self._shrunk: dict[int, tuple[Shrinking, FaultPlan]] = {}
        self._taken = 0
        #: The keys of runs that ended before this process began, and the highest number of an attempt among them.
        #: They are taken even when the time is over.
        self._stored: frozenset[str] = frozenset()
        self._last_stored = 0
        #: For the progress: how many runs have ended, and how many are asked for to minimise.
        self._done = self._others = 0
        self._began = self._clock()
        self._before = 0.0

    # ---- the clean runs --------------------------------------------------------------------

    def run(self) -> None:
        """Runs the search to the end of its budget.

        CleanRunError: the workload fails without faults.  ConfigError: the store has another version of this search,
        or the device has no event at which a fault could be injected.
        """
        stored = [row for row in self.store.rows() if row.result is not None]
        self._before = spent(stored)
        self._stored = frozenset(row.run.key for row in stored)
        # As many at most are missing before it as can be under way: a foreign folder may have any title.
        self._last_stored = min(max((_number(row.run.plan) for row in stored), default=0), len(stored) + LAG)
        self._began = self._clock()
        self._check_store()
        self._reporter.total(0, None)
        rows = self._clean_runs()
        code = [code_of(row) for row in rows]
        self.clean = self.code = frozenset().union(*code)
        self._signatures = {text for row in rows if row.result for text in row.result.signatures}
        survey = rows[-1]
        assert survey.result is not None and rows[0].result is not None
        self.sites = sites(records(survey.result, survey.folder), self.what.devices)
        space = PlanSpace(self.sites, self.what.case.arm, self.what.devices, wild=self.what.wild)
        if not space.sites:
            raise ConfigError(
                "the workload causes no event at any fault point: does it use the device? See docs/exploration.md"
            )
        self._without = {identity(FaultPlan()): rows[0].result}
        known = self.clean | {("signature", text) for text in self._signatures}
        self.search = Search(space, self.what.devices, known, seed=self.what.seed, feedback=self.what.feedback)
        events = sum(site.count for site in self.sites)
        self._reporter.note(
            f"without faults: {len(self.clean)} instructions, {events} events of {len(self.sites)} kinds"
        )
        try:
            with uncovered():
                self._runner.feed(self._next, self._arrived)
                self._take_all()
                # What the last attempts found.
                self._runner.feed(self._next_shrunk, self._arrived)
        except KeyboardInterrupt:
            self.ended = "interrupted"
            self._take_all()
            raise

    def _check_store(self) -> None:
        """ConfigError: the store's runs are not those of this search."""
        first = self.store.rows()[:1]
        if first and first[0].run.key != self._clean_run(CLEAN[0]).key:
            raise ConfigError(
                f"{self.store.folder}: contains another version of this search (its workload, machine or a program has"
                " changed): name another folder with -o"
            )

    def _clean_run(self, title: str) -> Run:
        plan = survey_plan(self.what.devices) if title == CLEAN[-1] else None
        return self.what.run(title, plan)

    def _clean_runs(self) -> list[Row]:
        rows: list[Row] = []
        for title in CLEAN:
            (id,) = self.store.add([self._clean_run(title)])
            row = self.store.row(id)
            if row.result is None:
                row = self._alone(row)
            assert row.result is not None
            if not row.expected:
                why = "; ".join(gist(finding.text) for finding in row.result.evidence[:3])
                raise CleanRunError(
                    f"{row.folder}: the workload fails without faults: {row.result.outcome.value}: {why}"
                )
            self._done += 1
            rows.append(row)
        return rows

    def _alone(self, row: Row) -> Row:
        """Runs one run; returns it with its result."""
        waiting = [row]
        self._runner.feed(lambda: waiting.pop() if waiting else None)
        return self.store.row(row.id)

    # ---- the search ------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Seconds that the search has taken, with those before it was interrupted."""
        return self._before + self._clock() - self._began

    def _over(self) -> bool:
        if self._budget.runs is not None and len(self.attempts) >= self._budget.runs:
            self.ended = "runs"
        elif len(self.attempts) < self._last_stored:
            return False
        elif self._budget.seconds is not None and self.elapsed >= self._budget.seconds:
            self.ended = "time"
        return self.ended != "interrupted"

    def _next(self) -> Row | None:
        """The run that is to start next; None: none can start before another ends, or the search is over.

        Minimising has half of the workers: the search does not wait for it.
        """
        if len(self._busy) <= len(self._searching) and (row := self._next_shrunk()) is not None:
            return row
        return self._next_attempt() or self._next_shrunk()

    def _next_attempt(self) -> Row | None:
        """The run of the next plan of the search."""
        assert self.search is not None
        while True:
            if self._over():
                return None
            number = len(self.attempts) + 1
            # In this order, and not before: see `search`.
            if number - LAG > self._taken and not self._take(number - LAG):
                return None
            attempt = self.search.propose(number)
            if attempt is None:
                self.ended = "exhausted"
                return None
            self.attempts.append(attempt)
            (id,) = self.store.add([self.what.run(f"{number} {attempt.how}", attempt.plan)])
            self._number[id] = number
            row = self.store.row(id)
            if row.result is None:
                self._searching.add(id)
                return self._started(row)
            self._done += 1
            self._rows[number] = row

    def _next_shrunk(self) -> Row | None:
        for shrinking in self._shrinkings:
            while shrinking.find.number not in self._busy:
                plan = shrinking.wanted()
                if plan is None:
                    break
                done = len(shrinking.shrunk.again)
                what = f"again {done + 1}" if shrinking.repeats else f"smaller {shrinking.runs + 1}"
                run = self.what.run(f"find {shrinking.find.number}, {what}", plan, fresh=shrinking.repeats)
                if run.key not in self._stored and self._late():
                    break
                (id,) = self.store.add([run])
                row = self.store.row(id)
                self._others += 1
                if row.result is None:
                    self._busy.add(shrinking.find.number)
                    self._shrunk[id] = shrinking, plan
                    return self._started(row)
                self._done += 1
                shrinking.take(plan, row)
        return None

    def _started(self, row: Row) -> Row:
        """Reports how many runs there are: minimising adds some as it goes."""
        runs = self._budget.runs
        self._reporter.total(self._done, None if runs is None else len(CLEAN) + runs + self._others)
        return row

    def _late(self) -> bool:
        """Whether a budget in time is exceeded by more than minimising may take."""
        limit = self._budget.seconds
        return limit is not None and self.elapsed >= limit + max(limit * _MORE, _LEAST_MORE)

    def _arrived(self, row: Row) -> None:
        self._done += 1
        if row.id in self._shrunk:
            shrinking, plan = self._shrunk.pop(row.id)
            self._busy.discard(shrinking.find.number)
            shrinking.take(plan, row)
            if not shrinking.wanted():
                self._reporter.note(_stable(shrinking))
                self._reconsider(shrinking.find)
        elif row.id in self._number:
            self._searching.discard(row.id)
            self._rows[self._number[row.id]] = row

    def _take(self, number: int) -> bool:
        """Takes the result of an attempt, in the order of numbers; False: it has not ended."""
        row = self._rows.pop(number, None)
        if row is None or self.search is None:
            return False
        assert row.result is not None
        attempt = self.attempts[number - 1]
        surveyed = attempt.how == "survey"
        # Where the harness failed, the log may be a part.
        whole = surveyed and row.result.outcome is not Outcome.HARNESS
        shown = sites(records(row.result, row.folder), self.what.devices) if whole else ()
        fired = _fired(row.result, len(attempt.plan.rule))
        self.search.take(attempt, Observation(row.result.outcome, features_of(row), shown, fired))
        self._taken = number
        new = code_of(row) - self.code if row.result.outcome is not Outcome.HARNESS else frozenset()
        self.code |= new
        self.growth.append(len(new))
        if new:
            rules = "; ".join(rule.text() for rule in attempt.plan.rule if rule.do.name != "watch")
            self._reporter.note(f"run {row.id}: {len(new)} new instructions: {rules}")
        if not surveyed:
            self._look(row)
        return True

    def _look(self, row: Row) -> None:
        """Adds a run's problems to the finds."""
        assert row.result is not None
        for signature, text in problems(row.result, self._signatures):
            find = next((find for find in self.finds if find.signature == signature), None)
            if find is None:
                find = Find(len(self.finds) + 1, signature, text, row.result.outcome, row)
                self.finds.append(find)
                self._shrinkings.append(Shrinking(find, self._signatures, self._without))
                self._reporter.note(f"run {row.id}: find {find.number}: {gist(text)}")
            find.runs.append(row.id)
            self._reconsider(find)

    def _reconsider(self, find: Find) -> None:
        """Minimises another run's plan if that of a find does not show it each time."""
        if (id := find.candidate()) is not None:
            self._shrinkings.append(Shrinking(find, self._signatures, self._without, self.store.row(id)))

    def _take_all(self) -> None:
        """Takes what has ended, as far as no attempt before it is missing."""
        while self._take(self._taken + 1):
            pass


def _stable(shrinking: Shrinking) -> str:
    size, again = len(shrinking.shrunk.plan.rule), shrinking.shrunk.again
    return (
        f"find {shrinking.find.number}: {size} rule{'s' * (size != 1)}, seen again {sum(again)} of {len(again)} times"
    )


def _fired(result: Result, rules: int) -> list[int]:
    """How often each of so many rules fired; empty: the result does not say that of them all."""
    found = [int(text) for rule in result.rules if (text := str(rule.get("fired"))).isdecimal() and len(text) < 10]
    return found if len(found) == rules else []


def _number(title: str) -> int:
    """The number of the attempt whose run has this title; 0: it is another run."""
    first = title.partition(" ")[0]
    return int(first) if first.isdecimal() and len(first) < 10 else 0


def spent(rows: list[Row]) -> float:
    """Seconds in which at least one of the runs was under way."""
    spans = sorted((row.started, row.ended) for row in rows if row.started is not None and row.ended is not None)
    total, until = 0.0, 0.0
    for started, ended in spans:
        total += max(ended - max(started, until), 0.0)
        until = max(until, ended)
    return total


def times(rows: list[Row], elapsed: float, jobs: int) -> dict[str, float]:
    """Seconds by kind: boots of guests, workloads, minimising, and workers that were idle."""
    found = dict.fromkeys(("boot", "workload", "minimise", "idle"), 0.0)
    for row in rows:
        if row.result is None:
            continue
        result: Any = row.result
        work = min(result.workload_time or 0.0, result.wall)
        if row.run.plan.startswith("find "):
            found["minimise"] += result.wall
        elif result.nth == 1:
            found["boot"] += result.wall - work
            found["workload"] += work
        else:
            found["workload"] += result.wall
    found["idle"] = max(elapsed * jobs - sum(found.values()), 0.0)
    return found
