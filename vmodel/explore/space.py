"""The plans that a search may try: of one to three rules, at the sites that a survey found."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vmodel.device import PciDevice
from vmodel.explore.arguments import ANYWHERE, ENDING, action_text, offered
from vmodel.explore.survey import Site
from vmodel.inject import ACTIONS, FaultPlan, Rule
from vmodel.points import Point

#: The most rules of a plan.
MOST_RULES = 3
#: Keys of a rule that select among the events that it matches.
_SCHEDULE = ("nth", "every", "first", "once", "times", "between")
#: Actions whose effect depends on the plan's seed.
_RANDOM = frozenset(("flip", "toctou"))
#: How much rarer than others an action after which the guest must boot again is.
RARE = 4
#: Of a rule's events, so many are tried one by one.
_MOST_EVENTS = 8
#: How often a mutation is tried again that left the plan as it was.
_TRIES = 20


class PlanSpace:
    """Makes plans; each method depends on its arguments alone, so that equal random generators give equal plans."""

    def __init__(
        self, found: Sequence[Site], arm: str, devices: Mapping[str, PciDevice], *, wild: bool = False
    ) -> None:
        """`found`: the sites of a run that is armed at `arm`; `wild`: see `arguments.offered`."""
        self.arm = arm
        self._devices = devices
        self._wild = wild
        self._offered: dict[Site, list[str]] = {}
        self.sites = [site for site in found if self._actions(site)]

    def _actions(self, site: Site) -> list[str]:
        if site not in self._offered:
            self._offered[site] = offered(site, self.arm, self._devices, wild=self._wild)
        return self._offered[site]

    def pairs(self) -> list[tuple[Site, str]]:
        """All sites with all their actions, in a fixed order."""
        return self.pairs_of(self.sites)

    def pairs_of(self, found: Sequence[Site]) -> list[tuple[Site, str]]:
        """The same for other sites, which a plan's runs have.

        What depends on the moment alone is there once for each phase of a driver.
        """
        pairs, seen = [], set()
        for site in found:
            phase = dict(site.keys).get("phase")
            for action in self._actions(site):
                if action not in ANYWHERE or (action, site.device, phase) not in seen:
                    seen.add((action, site.device, phase))
                    pairs.append((site, action))
        return pairs

    # ---- rules -----------------------------------------------------------------------------

    def rule(
        self,
        random: random.Random,
        site: Site | None = None,
        action: str | None = None,
        behind: Point | None = None,
        always: bool = False,
    ) -> Rule:
        """A rule; at `site` and with `action`, if given.

        `behind`: only from the device's first event there on; `always`: at all events.
        """
        site = random.choice(self.sites) if site is None else site
        text = self._action(random, site, action)
        schedule = {} if always else self._schedule(random, site)
        if behind is not None:
            schedule = _from(behind, site.device)
        return Rule.model_validate({"point": site.point.value, **dict(site.keys), **schedule, "do": text})

    def _action(self, random: random.Random, site: Site, name: str | None = None) -> str:
        names = self._actions(site)
        if name is not None and "(" in name:
            return name
        while name is None:
            name = random.choice(names)
            if name in ENDING and len(names) > 1 and random.randrange(RARE):
                name = None
            elif "(" in name:
                return name
        text = action_text(ACTIONS[name], site, self._devices, random)
        assert text is not None  # as it is offered
        return text

    def _schedule(self, random: random.Random, site: Site) -> dict[str, Any]:
        """At which of a site's events: all, one of them, the first ones, each so many, or those behind another's."""
        kind = random.randrange(11)
        if kind < 5:
            return {}
        if kind < 8:
            return {"nth": self._number(random, site.count)}
        if kind < 9:
            return {"first": self._number(random, site.count)}
        own = [other for other in self.sites if other.device is not None and other.device == site.device]
        if kind < 10 or not own:
            return {"every": random.choice((2, 3, 5))}
        return _from(random.choice(own).point, site.device)

    def _number(self, random: random.Random, count: int) -> int:
        """The number of an event, small ones more often; a fault may cause more events than the survey had."""
        if random.randrange(4) == 0:
            return max(random.choice((1, 2, count - 1, count, count + 1)), 1)
        return int(2 ** random.uniform(0, max(count, 1).bit_length()))

    def like(self, rule: Rule) -> list[Site]:
        """The sites whose events a rule matches, if its keys are those of a site or fewer."""
        keys = rule.plain()
        mine = {key: value for key, value in keys.items() if key not in ("point", "do", "name", *_SCHEDULE)}
        return [
            site
            for site in self.sites
            if site.point is rule.point and all(dict(site.keys).get(key) == value for key, value in mine.items())
        ]

    # ---- plans -----------------------------------------------------------------------------

    def plan(self, rules: Sequence[Rule], random: random.Random) -> FaultPlan:
        """A plan of at most MOST_RULES of these rules, each once, in a fixed order."""
        unique = {rule.text(): rule for rule in rules}
        kept = sorted(unique)
        while len(kept) > MOST_RULES:
            kept.remove(random.choice(kept))
        chosen = tuple(unique[text] for text in kept)
        seed = random.randrange(1 << 16) if any(rule.do.name in _RANDOM for rule in chosen) else 0
        return FaultPlan(seed=seed, rule=chosen)

    def any(self, random: random.Random) -> FaultPlan:
        """A plan without regard to what other plans reached."""
        return self.plan([self.rule(random) for _ in range(random.choice((1, 1, 2, 3)))], random)

    def mutated(self, plan: FaultPlan, random: random.Random, own: Sequence[Site] = ()) -> FaultPlan:
        """A plan that differs from `plan` in one to three steps.  `own`: sites that only this plan's runs have."""
        for _ in range(_TRIES):
            rules = list(plan.rule)
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                rules = self._step(rules, random, own)
            made = self.plan(rules, random)
            if made != plan:
                return made
        return self.any(random)

    def _step(self, rules: list[Rule], random: random.Random, own: Sequence[Site]) -> list[Rule]:
        at = random.randrange(len(rules))
        kind = random.randrange(10)
        if kind < 3 and len(rules) < MOST_RULES:
            usable = [site for site in own if self._actions(site)]
            site = random.choice(usable) if usable and random.random() < 0.7 else None
            return [*rules, self.rule(random, site)]
        if kind < 4 and len(rules) > 1:
            return rules[:at] + rules[at + 1 :]
        return [*rules[:at], self._changed(rules[at], random, own), *rules[at + 1 :]]

    def _changed(self, rule: Rule, random: random.Random, own: Sequence[Site]) -> Rule:
        keys = rule.plain()
        alike = self.like(rule) or [site for site in own if site.point is rule.point]
        if not alike:
            return self.rule(random)
        site = random.choice(alike)
        kind = random.randrange(8)
        if kind < 3:
            rest = {key: value for key, value in keys.items() if key not in _SCHEDULE}
            keys = {**rest, **self._schedule(random, replace(site, count=sum(one.count for one in alike)))}
        elif kind < 5:
            keys["do"] = self._action(random, site, rule.do.name if rule.do.name in self._actions(site) else None)
        elif kind < 6:
            keys["do"] = self._action(random, site)
        elif kind < 7:
            droppable = [key for key, _ in site.keys if key in keys and key != "device"]
            if droppable:
                del keys[random.choice(droppable)]
        else:
            near = [other for other in (*self.sites, *own) if other.point is rule.point and self._actions(other)]
            return self.rule(random, random.choice(near))
        return Rule.model_validate(keys)

    def extended(self, plan: FaultPlan, rule: Rule, random: random.Random) -> FaultPlan:
        """The plan with one more rule; if it has too many, without one of its own."""
        rules = list(plan.rule)
        while len(rules) >= MOST_RULES:
            rules.remove(random.choice(rules))
        return self.plan([*rules, rule], random)

    def one_by_one(self, plan: FaultPlan, fired: Sequence[int] = ()) -> list[tuple[Rule, FaultPlan]]:
        """The plans in which one of the rules fires at one event only, each of the first ones in turn; with that rule.

        Which event a fault hits may decide what comes of it; not of those whose effect depends on the moment alone.
        `fired`: how often each rule did; by default, what the run without faults has, and one more.
        """
        found = []
        for at, rule in enumerate(plan.rule):
            if rule.do.name in ANYWHERE:
                continue
            keys = {key: value for key, value in rule.plain().items() if key not in _SCHEDULE}
            count = fired[at] if fired else max(sum(site.count for site in self.like(rule)), 1) + 1
            if fired and count == 1:
                continue  # it is one event
            for nth in range(1, min(count, _MOST_EVENTS) + 1):
                single = Rule.model_validate({**keys, "nth": nth})
                rules = {other.text(): other for other in (*plan.rule[:at], single, *plan.rule[at + 1 :])}
                made = tuple(rules[text] for text in sorted(rules))
                if made != plan.rule:
                    found.append((single, plan.model_copy(update={"rule": made})))
        return found

    def combined(self, first: FaultPlan, second: FaultPlan, random: random.Random) -> FaultPlan:
        """A plan of rules of both."""
        rules = [random.choice(first.rule), random.choice(second.rule)]
        rest = [rule for rule in (*first.rule, *second.rule) if rule not in rules]
        if rest and random.randrange(2):
            rules.append(random.choice(rest))
        return self.plan(rules, random)


def _from(point: Point, device: str | None) -> dict[str, Any]:
    """The schedule of a rule that holds from the first event at a point of a device on."""
    first = {"point": point.value} | ({} if device is None else {"device": device})
    return {"between": [first, {"point": Point.RESET.value}]}


def identity(plan: FaultPlan) -> str:
    """Equal for plans that do the same."""
    return json.dumps(plan.plain(), sort_keys=True)
