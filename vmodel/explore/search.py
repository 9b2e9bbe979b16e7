"""The search: which plan is tried next, decided from what the plans before have reached.

Each decision depends on the seed, on the plan's number, and on the results of earlier plans in the order of their
numbers.  Plan n is decided when the results of the plans up to n - LAG are known, whatever order they ended in: so the
plans are the same for any number of jobs up to LAG, and none waits for another.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from vmodel.device import PciDevice
from vmodel.experiment.oracle import Outcome
from vmodel.explore.arguments import ENDING
from vmodel.explore.space import MOST_RULES, PlanSpace, identity
from vmodel.explore.survey import Site, survey_plan
from vmodel.inject import FaultPlan, Rule

#: How many plans are decided without the results of those before: as many can run at a time.
LAG = 16
#: How often a plan is drawn again that was tried before, or that contains one which crashes.
_TRIES = 200
#: The least and the most turns of a kept plan, in relation to others; the factors after a turn.
_LEAST, _MOST, _BETTER, _WORSE = 0.05, 16.0, 2.0, 0.85
#: Among how many pairs of a site and an action the most promising one is chosen.
_AHEAD = 12
#: Outcomes after which a guest boots again: plans that contain such a plan say nothing new.
_FATAL = (Outcome.CRASH, Outcome.HANG)

_T = TypeVar("_T")

#: A part of the driver's code, or another effect that is worth a search: two texts or a module's name and an address.
Feature = tuple[str, int | str]


class Observation(NamedTuple):
    """What a search sees of a run."""

    outcome: Outcome
    features: frozenset[Feature]
    #: Of a survey: the sites that its log shows.
    sites: Sequence[Site] = ()


@dataclass(frozen=True)
class Attempt:
    """A run that a search asks for."""

    number: int
    plan: FaultPlan
    #: "fresh", "deep", "mutation", "combination", "random" or "survey".
    how: str
    #: The number of the plan that it derives from, or that it surveys; 0: none.
    parent: int = 0


@dataclass
class KeptPlan:
    """A plan that reached something new."""

    attempt: Attempt
    #: What no plan before it had reached.
    new: frozenset[Feature]
    energy: float
    #: Sites that its survey found and the clean run's did not.
    own: list[Site] = field(default_factory=list)


class Search:
    """Proposes attempts, and takes what they reached; both in the order of their numbers."""

    def __init__(
        self,
        space: PlanSpace,
        devices: Mapping[str, PciDevice],
        clean: frozenset[Feature],
        *,
        seed: int = 0,
        feedback: bool = True,
    ) -> None:
        """`clean`: what the runs without faults reached.  `feedback`: False: a random search, to compare with."""
        self._space = space
        self._devices = devices
        self._seed = seed
        self._feedback = feedback
        self._known = set(space.sites)
        #: What all plans that ended without a crash have reached.
        self.reached = clean
        self.kept: list[KeptPlan] = []
        #: The last attempt that reached something new; 0: none.
        self.last_new = 0
        self._seen: set[str] = set()
        self._surveys: deque[KeptPlan] = deque()
        self._surveyed: dict[int, KeptPlan] = {}
        self._fatal: list[frozenset[str]] = []
        self._deadly: Counter[tuple[str, ...]] = Counter()
        #: By action and by point: how many rules were tried, and how many of those were in plans with something new.
        #: By site: how often it was drawn.
        self._tried: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._fresh = self._shuffled()
        #: Sites that a kept plan's survey found, with their actions: rules to add to that plan.
        self._deep: deque[tuple[KeptPlan, tuple[Site, str]]] = deque()

    def _shuffled(self) -> deque[tuple[Site, str]]:
        """All sites with their actions in random order; those after which the guest must boot again are last."""
        pairs = self._space.pairs()
        random.Random(f"{self._seed}:pairs").shuffle(pairs)
        return deque(sorted(pairs, key=lambda pair: pair[1] in ENDING))

    # ---- proposals -------------------------------------------------------------------------

    def propose(self, number: int) -> Attempt | None:
        """The attempt of this number, from 1.  None: all plans that could be drawn have been tried."""
        if self._surveys:
            entry = self._surveys.popleft()
            self._surveyed[number] = entry
            plan = survey_plan(self._devices, entry.attempt.plan.rule)
            plan = plan.model_copy(update={"seed": entry.attempt.plan.seed})
            return Attempt(number, plan, "survey", entry.attempt.number)
        # A text seeds alike in all versions of Python and on all machines.
        generator = random.Random(f"{self._seed}:{number}")
        for _ in range(_TRIES):
            plan, how, parent = self._draw(generator)
            key = identity(plan)
            if plan.rule and key not in self._seen and not self._is_hopeless(plan, generator):
                self._seen.add(key)
                return Attempt(number, plan, how, parent)
        return None

    def _draw(self, generator: random.Random) -> tuple[FaultPlan, str, int]:
        space = self._space
        if not self._feedback:
            return space.any(generator), "random", 0
        kind = generator.random()
        if self._deep and kind < 0.5:
            entry, pair = self._best(self._deep, lambda one: one[1])
            return (
                space.extended(entry.attempt.plan, space.rule(generator, *pair), generator),
                "deep",
                entry.attempt.number,
            )
        if self._fresh and (not self.kept or kind < 0.75):
            pair = self._best(self._fresh, lambda one: one)
            return space.plan([space.rule(generator, *pair)], generator), "fresh", 0
        if not self.kept:
            return space.any(generator), "random", 0
        entry = self._choice(generator)
        if len(self.kept) > 1 and generator.random() < 0.2:
            other = self._choice(generator)
            plan = space.combined(entry.attempt.plan, other.attempt.plan, generator)
            return plan, "combination", entry.attempt.number
        return space.mutated(entry.attempt.plan, generator, entry.own), "mutation", entry.attempt.number

    def _best(self, pairs: deque[_T], of: Callable[[_T], tuple[Site, str]]) -> _T:
        """Takes the most promising of the next pairs: of an action, and at a point, that reached something before."""

        def promise(n: int) -> float:
            site, action = of(pairs[n])
            return self._rate(action) * self._rate(site.point.value) / (1 + self._tried[str(site)])

        best = max(range(min(len(pairs), _AHEAD)), key=lambda n: (promise(n), -n))
        found = pairs[best]
        del pairs[best]
        self._tried[str(of(found)[0])] += 1
        return found

    def _rate(self, name: str) -> float:
        return (self._hits[name] + 1) / (self._tried[name] + 2)

    def _choice(self, generator: random.Random) -> KeptPlan:
        return generator.choices(self.kept, [entry.energy for entry in self.kept])[0]

    def _is_hopeless(self, plan: FaultPlan, generator: random.Random) -> bool:
        """Whether a plan contains one that crashed, or has rules like those that mostly do."""
        if not self._feedback:
            return False
        texts = {rule.text() for rule in plan.rule}
        if any(fatal <= texts for fatal in self._fatal):
            return True
        deaths = max((self._deadly[_kind(rule)] for rule in plan.rule), default=0)
        return generator.random() > 1 / (1 + deaths)

    # ---- results ---------------------------------------------------------------------------

    def take(self, attempt: Attempt, seen: Observation) -> frozenset[Feature]:
        """Learns from an attempt's result; returns what it was the first to reach."""
        if seen.outcome is Outcome.HARNESS:
            return frozenset()
        new = seen.features - self.reached
        if attempt.how == "survey":
            self._learn(self._surveyed.pop(attempt.number), seen)
            return new
        for rule in attempt.plan.rule:
            for name in (rule.do.name, rule.point.value):
                self._tried[name] += 1
                self._hits[name] += bool(new)
        parent = next((entry for entry in self.kept if entry.attempt.number == attempt.parent), None)
        if seen.outcome in _FATAL:
            self._fatal.append(frozenset(rule.text() for rule in attempt.plan.rule))
            if len(attempt.plan.rule) == 1:
                self._deadly[_kind(attempt.plan.rule[0])] += 1
        elif new:
            self.reached |= seen.features
            self.last_new = attempt.number
            energy = 1.0 + min(len(new), 64) / 16 + (len(attempt.plan.rule) - 1) / MOST_RULES
            entry = KeptPlan(attempt, new, energy)
            self.kept.append(entry)
            if self._feedback:
                self._surveys.append(entry)
        if parent is not None:
            factor = _BETTER if new else _WORSE
            parent.energy = min(max(parent.energy * factor, _LEAST), _MOST)
        return new

    def _learn(self, entry: KeptPlan, seen: Observation) -> None:
        """Takes the survey of a kept plan: the sites that are new can be part of plans that derive from it."""
        self.reached |= seen.features
        entry.own += [site for site in seen.sites if site not in self._known]
        self._known.update(entry.own)
        pairs = [(entry, pair) for pair in self._space.pairs_of(entry.own)]
        random.Random(f"{self._seed}:{entry.attempt.number}:pairs").shuffle(pairs)
        # Between those of others, so that none waits for all of another's.
        self._deep = deque(_interleaved(pairs, list(self._deep)))


def _interleaved(first: list[_T], second: list[_T]) -> list[_T]:
    """The items of both in turn, each in its order."""
    pairs = itertools.zip_longest(((item,) for item in first), ((item,) for item in second), fillvalue=())
    return [item for pair in pairs for part in pair for item in part]


def _kind(rule: Rule) -> tuple[str, ...]:
    """What rules with the same effect at the same place have in common."""
    keys = rule.plain()
    return rule.point.value, *(str(keys.get(key, "")) for key in ("device", "register", "queue", "phase")), rule.do.name
