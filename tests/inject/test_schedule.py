"""Schedules: each by what a served device does, and what follows from a seed by random events."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inject.lab import PLAIN, RAISE, Bench, Lab, armed
from vmodel.inject import DmaEvent, Engine, FaultPlan, Journal, Point, Rule, parse_rule
from vmodel.inject.schedule import Progress, Schedule

ONES = 0xFFFF_FFFF


def hits(lab: Bench, schedule: str, reads: int = 12) -> list[int]:
    """Which of so many reads of a register gave all ones, counted from 1; the log says the same."""
    with armed(lab, f"mmio.read register=PLAIN {schedule} do=ones") as engine:
        found = [n for n in range(1, reads + 1) if lab.get(PLAIN) == ONES]
        assert [record["nth"] for record in engine.journal.since()] == found
        return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("", list(range(1, 13))),
        ("nth=3", [3]),
        ("nth=2,5", [2, 5]),
        ("every=4", [4, 8, 12]),
        ("first=2", [1, 2]),
        ("once", [1]),
        ("times=3 every=2", [2, 4, 6]),
        ("probability=1", list(range(1, 13))),
        ("probability=0", []),
        ("after=60min", []),
    ],
)
def test_counts(lab: Bench, schedule: str, expected: list[int]) -> None:
    assert hits(lab, schedule) == expected


def test_probability_is_the_seeds(lab: Bench) -> None:
    def run(seed: int) -> list[bool]:
        with armed(lab, "mmio.read probability=0.5 do=ones", seed=seed):
            return [lab.get(PLAIN) == ONES for _ in range(40)]

    assert run(1) == run(1) != run(2)
    assert 5 < sum(run(1)) < 35


def test_after_and_first_n(lab: Bench) -> None:
    with armed(lab, "mmio.read after=500ms first=2 do=ones"):
        assert lab.get(PLAIN) != ONES
        lab.clock.now = 0.5
        assert [lab.get(PLAIN) == ONES for _ in range(3)] == [True, True, False]


def test_window(lab: Bench) -> None:
    """From `after` on, and before `until`."""
    with armed(lab, "mmio.read after=300ms until=800ms do=ones"):
        for now, inside in ((0.0, False), (0.299, False), (0.3, True), (0.799, True), (0.8, False), (9.0, False)):
            lab.clock.now = now
            assert (lab.get(PLAIN) == ONES) is inside, now


def test_a_window_begins_when_the_plan_is_armed(lab: Bench) -> None:
    lab.clock.now = 100.0
    with armed(lab, "mmio.read after=1s until=2s do=ones"):
        assert lab.get(PLAIN) != ONES
        lab.clock.now = 101.5
        assert lab.get(PLAIN) == ONES


def test_between(lab: Bench) -> None:
    """Counting restarts each time it opens; the two events themselves are outside."""
    with armed(lab, "mmio.read nth=2 between=irq..reset do=ones"):
        assert [lab.get(PLAIN) == ONES for _ in range(3)] == [False, False, False]
        for _ in range(2):
            lab.put(RAISE, 0)
            assert [lab.get(PLAIN) == ONES for _ in range(3)] == [False, True, False]
            lab.client.reset()
            lab.enable()
            assert [lab.get(PLAIN) == ONES for _ in range(3)] == [False, False, False]


def test_between_events_with_predicates(lab: Bench) -> None:
    rule = Rule.model_validate(
        {
            "point": "mmio.read",
            "between": [{"point": "irq", "vector": 1}, {"point": "mmio.write", "register": "PLAIN"}],
            "do": "ones",
        }
    )
    with Engine(FaultPlan(rule=(rule,)), [lab.lab]):
        lab.put(RAISE, 0)
        assert lab.get(PLAIN) != ONES
        lab.put(RAISE, 1)
        assert lab.get(PLAIN) == ONES
        lab.put(PLAIN, 1)
        assert lab.get(PLAIN) == 1


def test_duration(lab: Bench) -> None:
    """From its first event on, not from when it was armed."""
    with armed(lab, "mmio.read duration=500ms do=ones") as engine:
        lab.clock.now = 0.6
        assert lab.get(PLAIN) == ONES
        lab.clock.now = 1.0
        assert lab.get(PLAIN) == ONES
        assert engine.describe()[0]["state"] == "armed"
        lab.clock.now = 1.1
        assert lab.get(PLAIN) != ONES
        assert engine.describe()[0]["state"] == "over"


def test_heal_by_time(lab: Bench) -> None:
    with armed(lab, "mmio.read do=ones", heal={"after": "500ms"}):
        lab.clock.now = 0.499
        assert lab.get(PLAIN) == ONES
        lab.clock.now = 0.5
        assert lab.get(PLAIN) != ONES


def test_heal_by_an_event_lets_go_of_what_is_held(lab: Bench) -> None:
    with armed(lab, "mmio.read do=ones", "irq do=reorder(after=connection)", heal={"on": "reset"}):
        lab.put(RAISE, 2)
        assert (lab.get(PLAIN), lab.raised(2)) == (ONES, 0)
        lab.client.reset()
        lab.enable()
        assert lab.get(PLAIN) != ONES


def test_live_rules(lab: Bench) -> None:
    with armed(lab) as engine:
        served = lab.lab.backend.function.stats().served
        assert lab.get(PLAIN) != ONES and lab.lab.backend.function.stats().served == served + 1
        name = engine.add(parse_rule("mmio.read do=ones name=mine"))
        assert name == "mine" and lab.get(PLAIN) == ONES
        engine.pause("mine")
        assert lab.get(PLAIN) != ONES and engine.describe()[0]["state"] == "paused"
        engine.pause(None, False)
        assert lab.get(PLAIN) == ONES
        assert (engine.describe()[0]["matched"], engine.describe()[0]["fired"]) == (2, 2)
        engine.remove("mine")
        served = lab.lab.backend.function.stats().served
        assert lab.get(PLAIN) != ONES and lab.lab.backend.function.stats().served == served + 1
        with pytest.raises(Exception, match="no rule is called 'mine'"):
            engine.remove("mine")


# ---- properties ---------------------------------------------------------------------------------


@contextmanager
def engine(plan: FaultPlan) -> Iterator[tuple[Engine, list[float]]]:
    """A plan at work on a device that is not served, with a clock to be set."""
    now = [0.0]
    lab = Lab()
    with Engine(plan, [lab], clock=lambda: now[0]) as made:
        yield made, now
    lab.close()


def injections(plan: FaultPlan, events: Sequence[tuple[int, int, float]]) -> list[tuple[str, int, str, str]]:
    """Who fires at which event, and what it makes of the data."""
    with engine(plan) as (made, now):
        for n, (kind, address, gap) in enumerate(events):
            now[0] += gap
            point = (Point.DMA_READ, Point.DMA_WRITE)[kind]
            data = b"abcd" if kind else None
            event = DmaEvent(point, "lab", address=address, size=4, data=data, gpa=lambda: None)
            before = len(made.journal)
            made(event, lambda _: b"abcd")
            for record in made.journal.since(before):
                record["event"] = n
        return [(r["rule"], r["event"], r["before"], r["after"]) for r in made.journal.since()]


EVENTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.floats(0, 0.3)), max_size=40)
SCHEDULES = st.fixed_dictionaries(
    {},
    optional={
        "nth": st.lists(st.integers(1, 12), min_size=1, max_size=3),
        "every": st.integers(1, 5),
        "first": st.integers(1, 9),
        "probability": st.sampled_from([0.0, 0.3, 0.7, 1.0]),
        "after": st.sampled_from([0, 0.2, "500ms"]),
        "until": st.sampled_from([1.0, "3s"]),
        "times": st.integers(1, 4),
        "duration": st.sampled_from([0.5, "1s"]),
    },
)
RULES = st.builds(
    lambda point, iova, bits, schedule: {"point": point, "iova": iova, "do": f"flip({bits})", **schedule},
    st.sampled_from(["dma.read", "dma.write"]),
    st.sampled_from([0, 1, "0-1", "2-9"]),
    st.integers(1, 3),
    SCHEDULES,
)


def plan_of(seed: int, rules: Sequence[dict[str, object]]) -> FaultPlan:
    return FaultPlan.model_validate({"seed": seed, "rule": list(rules)})


@settings(deadline=None)
@given(st.integers(0, 9), st.lists(RULES, max_size=4), EVENTS)
def test_the_same_again(seed: int, rules: list[dict[str, object]], events: list[tuple[int, int, float]]) -> None:
    plan = plan_of(seed, rules)
    assert injections(plan, events) == injections(plan, events)
    again = FaultPlan.model_validate(plan.plain())
    assert again == plan and injections(again, events) == injections(plan, events)


@settings(deadline=None)
@given(st.integers(0, 9), st.lists(RULES, min_size=2, max_size=5, unique_by=str), EVENTS, st.randoms())
def test_rules_do_not_touch_each_others_generators(
    seed: int, rules: list[dict[str, object]], events: list[tuple[int, int, float]], order: random.Random
) -> None:
    """Without the others, or in another order, a rule fires at the same events and flips the same bits."""

    def fires(given: list[dict[str, object]], wanted: dict[str, object]) -> list[tuple[int, int]]:
        found = injections(plan_of(seed, given), events)
        name = f"rule{given.index(wanted) + 1}"
        # What an inner rule gets depends on the outer ones; which bits change does not.
        return sorted((n, int(b, 16) ^ int(a, 16)) for rule, n, b, a in found if rule == name)

    one = rules[0]
    mixed = list(rules)
    order.shuffle(mixed)
    assert fires(rules, one) == fires([one], one) == fires(mixed, one)


@settings(deadline=None)
@given(SCHEDULES, st.lists(st.floats(0, 0.5), max_size=60), st.integers(0, 3))
def test_schedules_by_their_meaning(said: dict[str, object], gaps: list[float], seed: int) -> None:
    """Against the plain words, for schedules without a probability."""
    said = {key: value for key, value in said.items() if key != "probability"}
    rule = Rule.model_validate({"point": "irq", "do": "drop", **said})
    s = rule.schedule
    progress = Progress(s, str(seed))
    now, counted, fired_at = 0.0, 0, []
    for gap in gaps:
        now += gap
        live = s.after <= now and (s.until is None or now < s.until)
        live = live and not (s.duration is not None and fired_at and now >= fired_at[0] + s.duration)
        live = live and not (s.times is not None and len(fired_at) >= s.times)
        counted += live
        wanted = (
            live
            and (not s.nth or counted in s.nth)
            and (s.every is None or counted % s.every == 0)
            and (s.first is None or counted <= s.first)
        )
        if wanted:
            fired_at.append(now)
        assert progress.fires(now) == wanted


def test_gates() -> None:
    progress = Progress(Schedule(nth=(2,), gated=True), "")
    assert not progress.fires(0)
    for _ in range(3):
        progress.begin()
        progress.begin()  # it is open already
        assert [progress.fires(0) for _ in range(3)] == [False, True, False]
        progress.end()
        assert not progress.fires(0)


def test_what_comes_after_the_end_of_the_log_is_not_counted(tmp_path: Path) -> None:
    """A result says how many records its file has."""
    journal = Journal(tmp_path / "log.jsonl")
    journal.put({"rule": "a"})
    journal.close()
    journal.put({"rule": "late"})
    journal.close()
    assert len(journal) == 1 == len((tmp_path / "log.jsonl").read_text().splitlines())
    assert [record["n"] for record in journal.since()] == [1, 2]
