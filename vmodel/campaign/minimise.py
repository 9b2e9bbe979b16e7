"""Minimises a run's plan by delta debugging: the result has the same outcome, and loses it if any part is removed.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE 28(2), 2002: the algorithm ddmin.
It runs over the rules first, then over the single events at which each remaining rule fired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from vmodel.experiment.case import Result
from vmodel.experiment.oracle import Outcome
from vmodel.inject import FaultPlan, Rule

_T = TypeVar("_T")

#: Keys that select at which of the counted events a rule fires.  Events before `after` are not counted.
_SCHEDULE = ("nth", "every", "first", "probability", "once", "times", "duration")


def ddmin(items: Sequence[_T], holds: Callable[[list[_T]], bool]) -> list[_T]:
    """A 1-minimal part of `items`: it holds, and no single item can be left out.  `items` itself must hold."""
    left, parts = list(items), 2
    while len(left) >= 2:
        size = -(-len(left) // parts)
        chunks = [left[at : at + size] for at in range(0, len(left), size)]
        rests = [[item for chunk in chunks[:n] + chunks[n + 1 :] for item in chunk] for n in range(len(chunks))]
        # Of two parts, each is the rest without the other: the loop over `rests` tries them.
        found = next((c for c in chunks if len(chunks) > 2 and holds(c)), None)
        if found is not None:
            left, parts = found, 2
            continue
        found = next((rest for rest in rests if holds(rest)), None)
        if found is not None:
            left, parts = found, max(parts - 1, 2)
        elif parts >= len(left):
            break
        else:
            parts = min(len(left), 2 * parts)
    return left


class TooMany(Exception):
    """The limit of runs has been reached."""


class Minimiser:
    """Shrinks one plan; each attempt is a run."""

    def __init__(
        self,
        outcome: Outcome,
        run: Callable[[FaultPlan], Result],
        most: int,
        log: Callable[[str], None],
        *,
        same: Callable[[Result], bool] | None = None,
        most_events: int | None = None,
    ) -> None:
        """`run` tries a plan, at most `most` times; `log` gets a line for each run.

        `same`: whether a result is the one to keep, instead of an equal outcome.  `most_events`: of a rule that fired
        at more events, only the first and the last are tried.
        """
        self._most_events = most_events
        self._same = same or (lambda result: result.outcome is outcome)
        self._run = run
        self._most = most
        self._log = log
        self._known: dict[str, bool] = {}
        #: How many runs have been made.
        self.runs = 0
        #: The smallest plan with the outcome so far, and its result.
        self.best: tuple[FaultPlan, Result] | None = None

    def holds(self, plan: FaultPlan) -> bool:
        """Whether a plan has the outcome; if so, it becomes `best`.  TooMany: the limit of runs is reached."""
        key = plan.model_dump_json()
        if key not in self._known:
            if self.runs >= self._most:
                raise TooMany
            self.runs += 1
            result = self._run(plan)
            self._known[key] = holds = self._same(result)
            events = sum(int(rule.get("fired", 0)) for rule in result.rules)
            size = f"{len(plan.rule)} rule{'s' * (len(plan.rule) != 1)}, {events} fault{'s' * (events != 1)}"
            self._log(f"{self.runs}. {size}: {result.outcome.value}{'' if holds else ' (outcome lost)'}")
            if holds:
                self.best = plan, result
        return self._known[key]

    def minimise(self, plan: FaultPlan) -> bool:
        """Shrinks `plan`; the result is `best`.  False: the limit of runs ended the search early.

        ValueError: `plan` itself has another outcome.
        """
        try:
            if not self.holds(plan):
                raise ValueError("another outcome")
            if plan.rule and self.holds(_with(plan, ())):
                return True
            rules = ddmin(plan.rule, lambda part: self.holds(_with(plan, part)))
            plan = _with(plan, rules)
            if plan.heal is not None and self.holds(healed := plan.model_copy(update={"heal": None})):
                plan = healed
            for n in range(len(plan.rule)):
                plan = self._fewer_events(plan, n)
        except TooMany:
            return False
        return True

    def _fewer_events(self, plan: FaultPlan, n: int) -> FaultPlan:
        """The plan with rule `n` at as few events as possible, selected by their numbers (`nth`)."""
        assert self.best is not None
        self.holds(plan)
        rule, result = plan.rule[n], self.best[1]
        events = fired_at(result, n)
        # With `between`, the count restarts for each window: a number alone does not identify an event.
        if rule.between is not None or not events or rule.nth == tuple(events):
            return plan

        def at(part: Sequence[int]) -> FaultPlan:
            plain: dict[str, object] = {key: value for key, value in rule.plain().items() if key not in _SCHEDULE}
            return _replaced(plan, n, Rule.model_validate({**plain, "nth": list(part)}))

        if self._most_events is not None and len(events) > self._most_events:
            ends = (at(events[:1]), at(events[-1:]))
            return next((single for single in ends if self.holds(single)), plan)
        if not self.holds(at(events)):
            return plan
        return at(ddmin(events, lambda part: self.holds(at(part))))


def fired_at(result: Result, n: int) -> list[int]:
    """The numbers, from 1, of the events at which rule `n` fired; [] if the log does not have all of them."""
    if n >= len(result.rules):
        return []
    name, fired = result.rules[n].get("name"), result.rules[n].get("fired")
    found = [record.get("nth") for record in result.injections if record.get("rule") == name and not record.get("late")]
    numbers = sorted(number for number in found if isinstance(number, int))
    return numbers if len(numbers) == fired else []


def _with(plan: FaultPlan, rules: Sequence[Rule]) -> FaultPlan:
    return plan.model_copy(update={"rule": tuple(rules)})


def _replaced(plan: FaultPlan, n: int, rule: Rule) -> FaultPlan:
    return _with(plan, (*plan.rule[:n], rule, *plan.rule[n + 1 :]))
