"""The search: which plan is tried next, decided from what the plans before have reached.

Each decision depends on the seed, on the plan's number, and on the results of earlier plans in the order of their
numbers.  Plan n is decided when the results of the plans up to n - LAG are known, whatever order they ended in: so the
plans are the same for any number of jobs up to LAG, and none waits for another.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from vmodel.device import PciDevice
from vmodel.experiment.oracle import Outcome
from vmodel.explore.arguments import ANYWHERE, ENDING
from vmodel.explore.space import MOST_RULES, RARE, PlanSpace, identity
from vmodel.explore.survey import Site, survey_plan
from vmodel.inject import FaultPlan, Rule
from vmodel.points import ConfigEvent, InvalidationEvent, MappingEvent, Point

#: How many plans are decided without the results of those before: as many can run at a time.
LAG = 16
#: How often a plan is drawn again that was tried before, or that contains one which crashes.
_TRIES = 200
#: The least and the most turns of a kept plan, in relation to others; the factors after a turn.
_LEAST, _MOST, _BETTER, _WORSE = 0.05, 16.0, 2.0, 0.85
#: How likely a fault with this action, or at this point, is to reach something new, before any was tried; others: 0.5.
#: Most accesses to config space are the PCI core's, not the driver's.  Drivers have time-outs for what is lost, and
#: branch on values; what only comes late or twice they often do not notice.
_PRIOR = {
    **dict.fromkeys((point.value for point in ConfigEvent.points), 0.2),
    **dict.fromkeys((point.value for point in (*MappingEvent.points, *InvalidationEvent.points)), 0.3),
    "drop": 0.7,
    "value(0)": 0.7,
    "value": 0.6,
    **dict.fromkeys(("late", "delay", "reorder", "duplicate", "spurious", "storm"), 0.3),
}
#: The least share of the kinds of plans of which there are so many, in relation to each other.
_SHARE = 0.3
#: How much longer than others a run takes that ends in this way, about: a guest must boot after it.
_COST = {Outcome.CRASH: 8, Outcome.HANG: 20}
#: So many kept plans are extended at a site that the run without faults does not have, or only earlier, as a register
#: that is otherwise only read before the first command.
_MOST_TURNS = 4
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
    #: How often each of the plan's rules fired, in their order; empty: unknown.
    fired: Sequence[int] = ()


@dataclass(frozen=True)
class Attempt:
    """A run that a search asks for."""

    number: int
    plan: FaultPlan
    #: "fresh", "deep", "single", "mutation", "combination", "random" or "survey".
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


@dataclass(frozen=True)
class _Single:
    """A plan with one event of a rule in place of all, and the number of the plan that has all."""

    parent: int
    plan: FaultPlan
    #: The rule without the number of the event.
    place: str
    prior: float

    @classmethod
    def of(cls, parent: int, rule: Rule, plan: FaultPlan) -> _Single:
        place = json.dumps({key: value for key, value in rule.plain().items() if key != "nth"}, sort_keys=True)
        return cls(parent, plan, place, _PRIOR.get(rule.do.name, 0.5) * _PRIOR.get(rule.point.value, 0.5))


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
        #: Behind which points each site of the run without faults has events.
        self._behind = {site: site.behind for site in space.sites}
        #: By site: how many kept plans were extended there.
        self._turns: Counter[Site] = Counter()
        #: What all plans that ended without a crash have reached.
        self.reached = clean
        self.kept: list[KeptPlan] = []
        #: What a plan reached that was the first, and the same plan again did not.
        self._chance: frozenset[Feature] = frozenset()
        #: The last attempt that reached something new; 0: none.
        self.last_new = 0
        self._seen: set[str] = set()
        self._surveys: deque[KeptPlan] = deque()
        self._surveyed: dict[int, KeptPlan] = {}
        self._fatal: list[frozenset[str]] = []
        self._deadly: Counter[tuple[str, ...]] = Counter()
        #: By action and by point: how many rules were tried, and how many of those were in plans with something new.
        #: By kind of plan: what its runs cost, and how many had something new.
        self._tried: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        #: By site: how often it was drawn.
        self._drawn: Counter[str] = Counter()
        #: The same, to extend a kept plan.
        self._extended: Counter[str] = Counter()
        #: By rule: at how many single events it was tried.
        self._singles: Counter[str] = Counter()
        self._fresh = self._shuffled()
        #: Sites that a kept plan's survey found, with their actions: rules to add to that plan.  If the run without
        #: faults has events there, too: the points of which the rule must be behind one.
        self._deep: deque[tuple[KeptPlan, tuple[Site, str], Sequence[Point]]] = deque()
        self._single: deque[_Single] = deque()

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
            if plan.rule and key not in self._seen and not self.is_hopeless(plan, generator, how):
                self._seen.add(key)
                return Attempt(number, plan, how, parent)
        return None

    def _draw(self, generator: random.Random) -> tuple[FaultPlan, str, int]:
        space = self._space
        if not self._feedback:
            return space.any(generator), "random", 0
        kind = self._kind_of_plan(generator)
        if kind == "deep":
            entry, pair, later = _taken(self._deep, self._promise_deep)
            plan = entry.attempt.plan
            self._extended[str(pair[0])] += 1
            rule = space.rule(generator, *pair, behind=generator.choice(later) if later else None)
            return space.extended(plan, rule, generator), kind, entry.attempt.number
        if kind == "single":
            single = _taken(self._single, self._promise_single)
            self._singles[single.place] += 1
            return single.plan, kind, single.parent
        if kind == "fresh":
            pair = _taken(self._fresh, self._promise)
            self._drawn[str(pair[0])] += 1
            # At all events; what reaches something is tried at single ones, too.
            return space.plan([space.rule(generator, *pair, always=True)], generator), kind, 0
        if kind == "random":
            return space.any(generator), kind, 0
        entry = self._choice(generator)
        if len(self.kept) > 1 and generator.random() < 0.2:
            other = self._choice(generator)
            plan = space.combined(entry.attempt.plan, other.attempt.plan, generator)
            return plan, "combination", entry.attempt.number
        return space.mutated(entry.attempt.plan, generator, entry.own), "mutation", entry.attempt.number

    def _kind_of_plan(self, generator: random.Random) -> str:
        """The kind of the next plan: one that had more that is new for what it cost is more likely.

        Mutations never end.  Of the others there are so many, in a good order: each has its share.
        """
        waiting = {"deep": self._deep, "single": self._single, "fresh": self._fresh}
        rates = {kind: max(self._rate(kind), _SHARE) for kind, items in waiting.items() if items}
        if self.kept:
            rates["mutation"] = self._rate("mutation")
        return generator.choices(list(rates), list(rates.values()))[0] if rates else "random"

    def _promise(self, pair: tuple[Site, str]) -> float:
        """That of an action, and of a point, which reached something new before; less for a site that had its turns."""
        site, action = pair
        return self._promise_of(site, action) / (1 + self._drawn[str(site)])

    def _promise_deep(self, one: tuple[KeptPlan, tuple[Site, str], Sequence[Point]]) -> float:
        _, (site, action), _ = one
        return self._promise_of(site, action) / (1 + self._extended[str(site)])

    def _promise_of(self, site: Site, action: str) -> float:
        name = action.partition("(")[0]
        promise = self._rate(name, _PRIOR.get(action)) * self._rate(site.point.value)
        return promise / RARE if name in ENDING else promise

    def _promise_single(self, single: _Single) -> float:
        """Less for each event at which the rule was tried.

        Coverage says nothing here: all events of a rule lead to the same code, and few to a problem.
        """
        return single.prior / (1 + self._singles[single.place])

    def _rate(self, name: str, prior: float | None = None) -> float:
        prior = _PRIOR.get(name, 0.5) if prior is None else prior
        return (self._hits[name] + 2 * prior) / (self._tried[name] + 2)

    def _choice(self, generator: random.Random) -> KeptPlan:
        return generator.choices(self.kept, [entry.energy for entry in self.kept])[0]

    def is_hopeless(self, plan: FaultPlan, generator: random.Random, how: str) -> bool:
        """Whether a plan contains one that crashed, or has rules like those that mostly do."""
        if not self._feedback:
            return False
        texts = {rule.text() for rule in plan.rule}
        if any(fatal <= texts for fatal in self._fatal):
            return True
        if how == "single":
            return False
        deaths = max(self._deadly[_kind(rule)] for rule in plan.rule) + self._deadly[_places(plan)]
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
        parent = next((entry for entry in self.kept if entry.attempt.number == attempt.parent), None)
        known = set() if parent is None else {rule.text() for rule in parent.attempt.plan.rule}
        for rule in attempt.plan.rule:
            # What a plan has of its parent is not what was tried.
            if rule.text() not in known:
                for name in (rule.do.name, rule.point.value):
                    self._tried[name] += 1
                    self._hits[name] += bool(new)
        how = "mutation" if attempt.how == "combination" else attempt.how
        self._tried[how] += _COST.get(seen.outcome, 1)
        self._hits[how] += bool(new)
        if seen.outcome in _FATAL:
            self._fatal.append(frozenset(rule.text() for rule in attempt.plan.rule))
            # The same end is new only once.
            self.reached |= {feature for feature in new if feature[0] == "signature"}
            if len(attempt.plan.rule) == 1:
                if not self._deadly[_kind(attempt.plan.rule[0])]:
                    self._alone(attempt, ())
                self._deadly[_kind(attempt.plan.rule[0])] += 1
            else:
                self._deadly[_places(attempt.plan)] += _COST[seen.outcome] // 4
        elif new:
            self.reached |= seen.features
            self.last_new = attempt.number
            energy = 1.0 + min(len(new), 64) / 16 + (len(attempt.plan.rule) - 1) / MOST_RULES
            entry = KeptPlan(attempt, new, energy)
            self.kept.append(entry)
            if self._feedback:
                self._surveys.append(entry)
                self._alone(attempt, seen.fired)
        if parent is not None:
            factor = _BETTER if new else _WORSE
            parent.energy = min(max(parent.energy * factor, _LEAST), _MOST)
        return new

    def _alone(self, attempt: Attempt, fired: Sequence[int]) -> None:
        """Each event of its faults is to be tried alone.  `fired`: of which there were so many; empty: unknown."""
        if attempt.how != "single":
            pairs = self._space.one_by_one(attempt.plan, fired)
            self._single.extend(_Single.of(attempt.number, rule, plan) for rule, plan in pairs)

    def _learn(self, entry: KeptPlan, seen: Observation) -> None:
        """Takes the survey of a kept plan: sites that are new, or have more events, can be part of plans from it.

        What the survey does not reach again was chance, as a time-out on a busy machine: once, it may be new again.
        """
        chance = frozenset() if seen.outcome in _FATAL else entry.new - seen.features - self._chance
        self._chance |= chance
        self.reached = self.reached - chance | seen.features
        parent = next((other for other in self.kept if other.attempt.number == entry.attempt.parent), None)
        entry.own += [site for site in seen.sites if site not in self._behind]
        usable = [site for site in seen.sites if self._turns[site] < _MOST_TURNS]
        new = [site for site in usable if site in entry.own and (parent is None or site not in parent.own)]
        pairs: list[tuple[KeptPlan, tuple[Site, str], Sequence[Point]]] = []
        pairs += [(entry, pair, ()) for pair in self._space.pairs_of(new)]
        later = {site: points for site in usable if (points := self._later_points(site))}
        for pair in self._space.pairs_of(list(later)):
            if pair[1] not in ANYWHERE:
                pairs.append((entry, pair, later[pair[0]]))
        self._turns.update([*new, *later])
        random.Random(f"{self._seed}:{entry.attempt.number}:pairs").shuffle(pairs)
        # Between those of others, so that none waits for all of another's.
        self._deep = deque(_interleaved(pairs, list(self._deep)))

    def _later_points(self, site: Site) -> list[Point]:
        """The points behind which a kept plan's runs have events of the site, and the run without faults does not."""
        found = site.behind - self._behind.get(site, site.behind) - {Point.RESET}
        return [point for point in Point if point in found]


def _taken(items: deque[_T], promise: Callable[[_T], float]) -> _T:
    """Takes the most promising of the items, of equal ones the first."""
    best = max(range(len(items)), key=lambda n: (promise(items[n]), -n))
    found = items[best]
    del items[best]
    return found


def _interleaved(first: list[_T], second: list[_T]) -> list[_T]:
    """The items of both in turn, each in its order."""
    pairs = itertools.zip_longest(((item,) for item in first), ((item,) for item in second), fillvalue=())
    return [item for pair in pairs for part in pair for item in part]


def _kind(rule: Rule) -> tuple[str, ...]:
    """What rules with the same effect at the same place have in common."""
    keys = rule.plain()
    return rule.point.value, *(str(keys.get(key, "")) for key in ("device", "register", "queue", "phase")), rule.do.name


def _places(plan: FaultPlan) -> tuple[str, ...]:
    """Where a plan of several rules has its faults, whatever they are: after a hang there, others often hang, too."""
    if len(plan.rule) == 1:
        return ()
    return tuple(sorted("/".join(_kind(rule)[:-1]) for rule in plan.rule))
