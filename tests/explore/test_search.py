"""The search: deterministic, never twice the same plan, and better than chance."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from tests.explore.simulated import BUGS, CLEAN, run
from tests.explore.trial import DEVICES, bugs, case, observed, searched, space
from vmodel.experiment.oracle import Outcome
from vmodel.explore.search import LAG, Attempt, Feature, Observation, Search
from vmodel.explore.space import identity
from vmodel.points import ConfigEvent, Point


def test_the_program_without_faults() -> None:
    result, reached, log = run(case(None))
    assert (result.outcome, reached, log) == (Outcome.NOT_ACTIVATED, CLEAN, [])


def test_a_seed_decides_all_plans() -> None:
    plans = [attempt for attempt, _ in searched(120, seed=3)[1]]
    assert [attempt for attempt, _ in searched(120, seed=3)[1]] == plans
    assert [attempt for attempt, _ in searched(120, seed=4)[1]] != plans
    assert [attempt.number for attempt in plans] == list(range(1, 121))


def test_no_plan_runs_twice() -> None:
    keys = Counter(identity(attempt.plan) for attempt, _ in searched(300, seed=1)[1])
    assert keys.most_common(1)[0][1] == 1


def test_feedback_finds_what_chance_does_not() -> None:
    """Three planted bugs need two or three faults, of which later ones have no place in a run without faults."""
    budget, seeds = 300, range(8)
    guided = [bugs(searched(budget, seed=seed)[1]) for seed in seeds]
    by_chance = [bugs(searched(budget, seed=seed, feedback=False)[1]) for seed in seeds]
    assert set().union(*guided) == set(BUGS)
    assert set().union(*by_chance) == {"not checked", "endless loop"}
    assert sum(map(len, guided)) >= sum(map(len, by_chance)) + len(seeds)


def test_a_plan_is_kept_for_what_it_is_the_first_to_reach() -> None:
    search, done = searched(200)
    assert search.kept and all(entry.new for entry in search.kept)
    every = [feature for entry in search.kept for feature in entry.new]
    assert len(every) == len(set(every))
    taken = [(attempt, seen) for attempt, seen in done if attempt.number <= 200 - LAG]
    kept = {entry.attempt.number for entry in search.kept}
    known: frozenset[Feature] = frozenset(("simulated", number) for number in CLEAN)
    for attempt, seen in taken:
        fatal = seen.outcome in (Outcome.CRASH, Outcome.HANG)
        if attempt.how != "survey":
            assert (attempt.number in kept) == (bool(seen.features - known) and not fatal)
        # Of what crashed, only how.
        known |= {feature for feature in seen.features if feature[0] == "signature"} if fatal else seen.features
    assert search.reached == known and search.last_new == max(kept)


def test_the_survey_of_a_kept_plan_shows_what_only_its_runs_have() -> None:
    search, done = searched(300)
    surveys = [attempt for attempt, _ in done if attempt.how == "survey"]
    assert 0 < len(surveys) <= len(search.kept)
    own = {str(site) for entry in search.kept for site in entry.own}
    assert any("queue=0" in text and "opcode=8" in text for text in own)  # aborts
    assert any(attempt.how == "deep" for attempt, _ in done)


def test_what_a_plan_reached_by_chance_is_new_again_once() -> None:
    """Its survey does not reach it; so the first of others that do is kept, and no third."""
    known, late = frozenset(("simulated", number) for number in CLEAN), ("simulated", 99)

    def observe(attempt: Attempt) -> Observation:
        by_chance = attempt.how != "survey" and attempt.number in (3, 30, 60)
        return Observation(Outcome.FAILED, known | {late} if by_chance else known)

    search, _ = searched(100, observe=observe)
    assert [entry.attempt.number for entry in search.kept] == [3, 30]
    assert late in search.reached


def test_a_kept_plan_is_extended_where_its_runs_come_back() -> None:
    """A register that the run without faults reads before the first command only: a rule there begins behind one."""
    known = frozenset(("simulated", number) for number in CLEAN)
    read = next(site for site in space().sites if site.point is Point.MMIO_READ)
    again = replace(read, behind=read.behind | {Point.DOORBELL})
    new = iter(range(100, 200))

    def observe(attempt: Attempt) -> Observation:
        if attempt.how == "survey":
            return Observation(Outcome.FAILED, known, [again])
        return Observation(Outcome.FAILED, known | {("simulated", next(new))} if attempt.number <= 6 else known)

    _, done = searched(80, observe=observe)
    deep = [attempt for attempt, _ in done if attempt.how == "deep"]
    assert deep
    for attempt in deep:
        rules = [rule for rule in attempt.plan.rule if rule.between is not None and rule.point is read.point]
        assert any(rule.between[0].point is Point.DOORBELL for rule in rules if rule.between)
    # Of four plans, however many were kept.
    assert len({attempt.parent for attempt in deep}) <= 4


def test_each_event_of_what_reached_something_is_tried_alone() -> None:
    _, done = searched(300, seed=2)
    by_number = {attempt.number: (attempt, seen) for attempt, seen in done}
    singles = [attempt for attempt, _ in done if attempt.how == "single"]
    assert len(singles) > 10
    for attempt in singles:
        parent, _ = by_number[attempt.parent]
        assert parent.how != "single" and len(parent.plan.rule) == len(attempt.plan.rule)
        changed = [rule for rule in attempt.plan.rule if rule not in parent.plan.rule]
        assert len(changed) == 1 and changed[0].nth is not None and len(changed[0].nth) == 1
    assert any(by_number[attempt.parent][1].outcome in (Outcome.CRASH, Outcome.HANG) for attempt in singles)


def test_single_events_of_what_is_lost_come_first() -> None:
    """The second lost completion before the first one that only comes late."""
    known = frozenset(("simulated", number) for number in CLEAN)
    new = iter(range(100, 1000))

    def observe(attempt: Attempt) -> Observation:
        reached = known | {("simulated", next(new))} if attempt.how == "fresh" else known
        return Observation(Outcome.FAILED, reached, fired=[5] * len(attempt.plan.rule))

    _, done = searched(400, observe=observe)
    rules = [next(r for r in attempt.plan.rule if r.nth) for attempt, _ in done if attempt.how == "single"]
    late = next(n for n, rule in enumerate(rules) if rule.do.name in ("late", "delay"))
    lost = [rule.nth for rule in rules[:late] if (rule.point, rule.do.name) == (Point.COMPLETION, "drop")]
    assert {(1,), (2,)} <= set(lost), lost


def test_a_rule_that_fired_once_has_no_single_event() -> None:
    known = frozenset(("simulated", number) for number in CLEAN)
    new = iter(range(100, 1000))

    def searched_with(fired: int) -> set[str]:
        def observe(attempt: Attempt) -> Observation:
            reached = known | {("simulated", next(new))} if attempt.how == "fresh" else known
            return Observation(Outcome.FAILED, reached, fired=[fired] * len(attempt.plan.rule))

        return {attempt.how for attempt, _ in searched(100, observe=observe)[1]}

    assert "single" in searched_with(2) and "single" not in searched_with(1)


def test_what_comes_back_behind_a_second_fault_is_tried_there_too() -> None:
    """A register that is also read after another fault: the plan whose second fault leads there is extended, too."""
    _, done = searched(300)
    plans = {attempt.number: attempt.plan for attempt, _ in done}
    parents = defaultdict(set)
    for attempt, _ in done:
        for rule in attempt.plan.rule if attempt.how == "deep" else ():
            if rule.between is None and rule not in plans[attempt.parent].rule:
                parents[rule.point, str(rule.plain().get("register"))].add(attempt.parent)
    assert len(parents[Point.MMIO_READ, "regs.STATUS"]) > 1


def test_lost_events_come_first_and_every_place_has_a_turn() -> None:
    """Of a driver's own places, before any is tried with a second action."""
    own = [site for site in space().sites if site.point not in ConfigEvent.points]
    rules = [attempt.plan.rule[0] for attempt, _ in searched(len(own))[1]]
    assert len({rule.text().rpartition("do=")[0] for rule in rules}) == len(own)
    assert sum(rule.do.name == "drop" for rule in rules) > len(own) / 2


@pytest.mark.parametrize("costly", [Outcome.HANG, Outcome.CRASH])
def test_plans_of_a_kind_that_costs_more_are_fewer(costly: Outcome) -> None:
    """Mutations that hang say as little as those that do not, and take longer."""
    known = frozenset(("simulated", number) for number in CLEAN)

    def counted(outcome: Outcome) -> int:
        def observe(attempt: Attempt) -> Observation:
            if attempt.number <= 4:
                return Observation(Outcome.FAILED, known | {("simulated", 100 + attempt.number)})
            return Observation(outcome if attempt.how in ("mutation", "combination") else Outcome.MASKED, known)

        return sum(attempt.how in ("mutation", "combination") for attempt, _ in searched(100, observe=observe)[1])

    assert counted(Outcome.MASKED) > 1.4 * counted(costly)


def test_after_hangs_other_places_are_tried() -> None:
    """A second fault at a place where one made the driver hang is run less often, whatever it is."""
    known = frozenset(("simulated", number) for number in CLEAN)

    def counted(outcome: Outcome) -> int:
        made = space()
        search = Search(made, DEVICES, known)
        first, second = (made.rule(random.Random(0), site, "drop") for site in made.sites[:2])
        plan = made.plan([first, second], random.Random(0))
        search.take(Attempt(1, plan, "mutation"), Observation(outcome, known))
        others = [made.rule(random.Random(n), made.sites[1]) for n in range(100)]
        plans = [made.plan([first, other], random.Random(0)) for other in others]
        return sum(search.is_hopeless(plan, random.Random(n), "deep") for n, plan in enumerate(plans))

    assert counted(Outcome.MASKED) == 0
    assert 60 < counted(Outcome.HANG) < 100


def test_nothing_is_kept_without_new_coverage() -> None:
    known = frozenset(("simulated", number) for number in CLEAN)
    search, done = searched(60, observe=lambda attempt: Observation(Outcome.MASKED, known))
    assert search.kept == [] and search.last_new == 0
    assert {attempt.how for attempt, _ in done} == {"fresh"}


def test_a_harness_error_says_nothing() -> None:
    new = frozenset((("simulated", 99),))
    search, _ = searched(40, observe=lambda attempt: Observation(Outcome.HARNESS, new))
    assert search.kept == [] and ("simulated", 99) not in search.reached


def test_plans_that_contain_a_fatal_one_are_not_run() -> None:
    _, done = searched(400)
    fatal: list[tuple[int, set[str]]] = []
    for attempt, seen in done:
        texts = {rule.text() for rule in attempt.plan.rule}
        if attempt.how not in ("survey", "fresh"):
            assert not any(less <= texts for number, less in fatal if number <= attempt.number - LAG)
        if seen.outcome in (Outcome.CRASH, Outcome.HANG) and attempt.how != "survey":
            fatal.append((attempt.number, texts))
    assert len(fatal) > 3


def test_a_random_search_learns_nothing() -> None:
    _, done = searched(100, feedback=False)
    assert {attempt.how for attempt, _ in done} == {"random"}
    blind = searched(100, feedback=False, observe=lambda attempt: Observation(Outcome.MASKED, frozenset()))[1]
    assert [attempt for attempt, _ in blind] == [attempt for attempt, _ in done]


def test_the_search_ends_when_all_plans_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    made = space()
    only = made.any(random.Random(0))
    monkeypatch.setattr(made, "any", lambda generator: only)
    search = Search(made, DEVICES, frozenset(), feedback=False)
    assert search.propose(1) == Attempt(1, only, "random")
    assert search.propose(2) is None
    assert observed(Attempt(1, only, "random")).features
