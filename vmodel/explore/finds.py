"""What a search finds: runs with the same problem are one find, of which the first is minimised and repeated."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from vmodel.campaign.minimise import Minimiser
from vmodel.campaign.store import Row
from vmodel.experiment.case import Result
from vmodel.experiment.oracle import Effect, Outcome
from vmodel.explore.space import identity
from vmodel.inject import FaultPlan

#: Signs of findings about code that does not go on, those that name it best first; "rcu-stall" does not name it.
STALLS = ("polling", "softlockup", "hardlockup", "hung-task", "blocked-task", "rcu-stall")
#: Signs of messages that report a bug of the kernel, whatever else the run did; others report the fault itself.
SPLATS = frozenset(
    (
        *(
            "panic",
            "kasan",
            "memory",
            "oops",
            "bug",
            "warn",
            "ubsan",
            "lockdep",
            "dma-api",
            "debug-objects",
            "kmemleak",
        ),
        # Not "blocked-task": the kernel lists those because it was asked to.
        *("softlockup", "hardlockup", "hung-task", "rcu-stall"),
    )
)
#: How often the minimal plan is repeated.
REPEATS = 3
#: If a plan does not show the problem each time, so many plans of other runs with it are tried.
MOST_PLANS = 3
#: The most runs for the minimal plan of one find; of a hang each takes as long as the time limit.
_MOST_RUNS = {Outcome.HANG: 8}
_MOST_OTHERS = 24
#: Of a rule that fires at more events, no list of events would be a plan of a few lines.
_MOST_EVENTS = 12
#: Beyond so many faults, a shorter plan is better than one with fewer faults.
_FEW = 4


#: The functions at the end of a splat's signature.
_PLACE = re.compile(r" in (\S+(?: < \S+)*)$")


def _of_crash(signature: str) -> str:
    """What a crash has in common with others of the same bug: what is reported depends on which check sees it first."""
    place = _PLACE.search(signature)
    return f"crash in {place[1]}" if place else f"crash: {signature}"


def problems(result: Result, clean: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """The (signature, text) of each problem of a run that is worth a find; the most severe first.

    `clean`: signatures that runs without faults have, too.
    """
    if result.outcome in (Outcome.HARNESS, Outcome.NOT_ACTIVATED):
        return
    evidence = [finding for finding in result.evidence if finding.signature not in clean]
    splats = [finding for finding in evidence if finding.sign in SPLATS]
    of_hang = sorted((f for f in evidence if f.sign in STALLS), key=lambda f: STALLS.index(f.sign))
    seen = set()
    for effect in (Effect.CRASH, Effect.HANG, Effect.CORRUPTION):
        # Behind an oops, the panic says less.
        own = sorted((f for f in evidence if f.effect is effect), key=lambda f: f.sign in ("panic", "off"))
        if not own:
            continue
        text, signature = own[0].text, f"{effect.value}: {own[0].signature}"
        if effect is Effect.CRASH:
            signature = _of_crash(own[0].signature)
        if effect is Effect.HANG and of_hang:
            # All hangs look alike from outside; the kernel says where.
            text = f"{text}; {of_hang[0].text}"
            if of_hang[0].sign != "rcu-stall":
                signature = f"{signature}: {of_hang[0].signature}"
        seen |= {finding.signature for finding in (own if effect is Effect.CRASH else own[:1])}
        # One hang has many symptoms.
        seen |= {finding.signature for finding in of_hang} if effect is Effect.HANG else set()
        yield signature, text
        break
    for finding in splats:
        if finding.signature not in seen and finding.effect is not Effect.CRASH:
            seen.add(finding.signature)
            yield finding.signature, finding.text


#: The begin of a signature of a hang; in it, before the functions that a guest runs while it hangs.
_HANG, _POLLING = f"{Effect.HANG.value}: ", ": polling: "


def _same(one: str, other: str) -> bool:
    """Whether two signatures are of the same problem.

    What the kernel says of a hang depends on when it is asked, if it comes to that at all: there, only what still runs
    tells one from another.
    """
    if not (one.startswith(_HANG) and other.startswith(_HANG)):
        return one == other
    runs, other_runs = one.partition(_POLLING)[2], other.partition(_POLLING)[2]
    return runs == other_runs or not (runs and other_runs)


class _Needed(Exception):
    """A plan must run before it is known how to go on."""

    def __init__(self, plan: FaultPlan) -> None:
        super().__init__()
        self.plan = plan


@dataclass
class Shrunk:
    """The smallest plan that minimising has found so far."""

    plan: FaultPlan
    #: The run that `vmodel reproduce` repeats: the first, or one with this plan.
    run: int
    #: Whether minimising has ended; and whether no part of the plan can be left out, as runs have shown.
    minimised: bool = False
    minimal: bool = False
    #: For each repetition of the plan: whether it had the problem.
    again: list[bool] = field(default_factory=list)


@dataclass
class Find:
    """A problem, and the runs that have it."""

    number: int
    signature: str
    text: str
    outcome: Outcome
    #: The first run with it.
    first: Row
    #: The ids of all runs of the search that have it.
    runs: list[int] = field(default_factory=list)
    #: The runs whose plans were minimised, and for how many of them all repetitions have ended.
    tried: list[int] = field(default_factory=list)
    repeated: int = 0
    #: Of the smallest plans, the one that has the problem the most often.
    shrunk: Shrunk = field(default_factory=lambda: Shrunk(FaultPlan(), 0))

    def candidate(self) -> int | None:
        """The run whose plan is to be minimised next, as those before show the problem not each time; None: none."""
        if self.repeated < len(self.tried) or all(self.shrunk.again) or len(self.tried) == MOST_PLANS:
            return None
        return next((run for run in self.runs if run not in self.tried), None)


class Shrinking:
    """Minimises the plan of one run of a find and repeats it, by one run at a time that somebody else carries out.

    What it asks for depends on the results alone: so it can start again with those that a store has.
    """

    def __init__(
        self, find: Find, clean: Collection[str], without: Mapping[str, Result], row: Row | None = None
    ) -> None:
        """`without`: results of runs without faults, by the identity of their plans.  `row`: by default the first."""
        self.find = find
        self._clean = clean
        row = find.first if row is None else row
        plan = row.run.case.plan
        assert plan is not None and row.result is not None  # as a rule fired
        self._plan = plan
        self._known = {**without, identity(plan): row.result}
        self._ran = [(plan, row)]
        self.shrunk = Shrunk(plan, row.id)
        if not find.tried:
            find.shrunk = self.shrunk
        find.tried.append(row.id)
        #: How many runs it has asked for.
        self.runs = 0

    def _has(self, result: Result) -> bool:
        return any(_same(signature, self.find.signature) for signature, _ in problems(result, self._clean))

    def wanted(self) -> FaultPlan | None:
        """The plan that is to run next; None: nothing is left to do."""
        if not self.shrunk.minimised and (needed := self._minimise()) is not None:
            return needed
        return self.shrunk.plan if len(self.shrunk.again) < REPEATS else None

    @property
    def repeats(self) -> bool:
        """Whether minimising has ended, so that what is wanted is a repetition in a new guest."""
        return self.shrunk.minimised

    def _minimise(self) -> FaultPlan | None:
        """One more step; returns the plan that must run for it."""

        def known(plan: FaultPlan) -> Result:
            if (found := self._known.get(identity(plan))) is None:
                raise _Needed(plan)
            return found

        most = _MOST_RUNS.get(self.find.outcome, _MOST_OTHERS)
        minimiser = Minimiser(
            self.find.outcome, known, most, lambda text: None, same=self._has, most_events=_MOST_EVENTS
        )
        try:
            self.shrunk.minimal = minimiser.minimise(self._plan)
        except _Needed as needed:
            self._keep()
            return needed.plan
        self._keep()
        self.shrunk.minimised = True
        return None

    def _keep(self) -> None:
        """Chooses the smallest of the plans that have the problem: by rules, by faults if they are few, by length."""

        def size(plan: FaultPlan, result: Result) -> tuple[int, int, int]:
            fired = sum(int(rule.get("fired", 0)) for rule in result.rules)
            return len(plan.rule), min(fired, _FEW), sum(len(rule.text()) for rule in plan.rule)

        having = [(plan, row) for plan, row in self._ran if row.result is not None and self._has(row.result)]
        plan, row = min(having, key=lambda pair: size(pair[0], pair[1].result))  # type: ignore[arg-type]
        self.shrunk.plan, self.shrunk.run = plan, row.id

    def take(self, plan: FaultPlan, row: Row) -> None:
        """The run of the plan that was wanted has ended."""
        assert row.result is not None
        self.runs += 1
        if self.shrunk.minimised:
            self.shrunk.again.append(self._has(row.result))
            self.find.repeated += len(self.shrunk.again) == REPEATS
            if sum(self.shrunk.again) > sum(self.find.shrunk.again):
                self.find.shrunk = self.shrunk
        else:
            self._known[identity(plan)] = row.result
            self._ran.append((plan, row))
