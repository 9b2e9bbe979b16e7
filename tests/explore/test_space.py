"""Surveys and the plans that come of them: all are valid, and equal for equal generators."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.explore.simulated import COMMANDS, Simulated
from tests.explore.trial import DEVICES, case, space, surveyed
from vmodel.devices.edu import Edu
from vmodel.errors import ConfigError
from vmodel.explore.arguments import offered
from vmodel.explore.space import MOST_RULES, PlanSpace, identity
from vmodel.explore.survey import MOST_DISTINCT, Site, records, sites, survey_plan
from vmodel.inject import ACTIONS, Engine, FaultPlan, parse_rule
from vmodel.points import Point


def test_a_survey_finds_what_the_driver_does() -> None:
    found = {str(site): site for site in surveyed()}
    probe = found["mmio.read device=edu0 phase=probe register=regs.ID"]
    assert (probe.count, probe.values, probe.size) == (1, (0x010000ED,), 4)
    assert found["completion device=edu0 phase=running queue=1 opcode=1"].count == COMMANDS // 2
    assert found["irq device=edu0 phase=running vector=0 kind=msi"].count == COMMANDS
    assert found["dma.write device=edu0 phase=running size=256"].count == COMMANDS
    assert not any("queue=0" in text for text in found)  # aborts: only after a fault


def test_a_survey_changes_nothing() -> None:
    rules = survey_plan(DEVICES).rule
    assert {rule.do.name for rule in rules} == {"watch"}
    assert {rule.point for rule in rules} == set(Point)
    first = parse_rule("irq do=drop")
    assert survey_plan(DEVICES, [first]).rule == (first, *rules)


def test_records_that_no_survey_writes_are_left_out(tmp_path: Path) -> None:
    result = Simulated().run(case(survey_plan(DEVICES)), tmp_path)
    log = list(records(result, tmp_path))
    whole = sites(log, DEVICES)
    bad: list[dict[str, object]] = [
        {"do": "watch", "rule": rule}
        for rule in ("", "irq", "irq/9/running/", "irq/x/running/", "irq/0/running", "nowhere/0/running/", 7)
    ]
    bad += [
        {"do": "watch", "rule": rule}
        for rule in ("irq/0/nix/", "irq/\u00b2/running/", "mmio.read/0/running/x", "mmio.read/0/running/5")
    ]
    wrong: list[dict[str, object]] = [{"address": text} for text in ("zz", "-5", "0x" + "f" * 4000, 7)]
    wrong += [{"address": "0x0", "size": size} for size in (-4, 1 << 70, "4", True)]
    bad += [{"do": "watch", "rule": "mmio.read/0/running/0"} | keys for keys in wrong]
    for keys in ({"queue": {"a": 1}}, {"queue": "\1"}, {"opcode": -1}, {"queue": 1 << 40}, {"opcode": [1]}):
        bad.append({"do": "watch", "rule": "completion/0/running/", **keys})
    bad.append({"do": "watch", "rule": "irq/0/running/", "vector": 0, "kind": "nix\n"})
    assert sites([*log, *bad], DEVICES) == whole == surveyed()
    # Without the artefact, the result's own records.
    assert sites(records(result.model_copy(update={"artefacts": {}}), tmp_path), DEVICES) == whole


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (b"[1]\n", "is damaged: line 30 is no record of an injection"),
        (b"{\n", "is damaged: line 30 is no record of an injection"),
        (b"[" * 60_000 + b"\n", "is damaged: line 30 is no record of an injection"),
        (b"\xff\xfe\n", "is damaged: line 30 is no record of an injection"),
        (b"{" * (1 << 17), "is damaged: line 30 is no record of an injection"),
        (b"{}\n", "is damaged: it has 30 records, and the run had 29"),
    ],
)
def test_a_log_that_is_damaged_is_one_line(tmp_path: Path, more: bytes, says: str) -> None:
    """A part of it would make another search of the same command."""
    result = Simulated().run(case(survey_plan(DEVICES)), tmp_path)
    path = tmp_path / "injections.jsonl"
    assert len(list(records(result, tmp_path))) == result.injected == 29
    with path.open("ab") as file:
        file.write(more)
    with pytest.raises(ConfigError) as refused:
        list(records(result, tmp_path))
    assert str(refused.value) == f"{path}: {says}"


def test_a_log_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = Simulated().run(case(survey_plan(DEVICES)), tmp_path)
    path = tmp_path / "injections.jsonl"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is damaged: it has 0 records, and the run had 29$"):
        list(records(result, tmp_path))
    path.unlink()
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory$"):
        list(records(result, tmp_path))
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"cannot be read: is not a regular file$"):
        list(records(result, tmp_path))


def test_a_site_knows_what_came_before_its_last_event() -> None:
    """As a register that is read before the first command, and again after one has failed."""

    def log(*points: str) -> list[dict[str, object]]:
        return [{"do": "watch", "rule": f"{point}/0/running/", "address": "0x80", "size": 4} for point in points]

    def behind(found: list[Site]) -> dict[str, set[str]]:
        return {site.point.value: {point.value for point in site.behind} for site in found}

    assert behind(sites(log("config.read", "doorbell", "doorbell"), DEVICES)) == {
        "config.read": set(),
        "doorbell": {"config.read", "doorbell"},
    }
    later = sites(log("config.read", "doorbell", "config.read", "doorbell"), DEVICES)
    assert behind(later)["config.read"] == {"config.read", "doorbell"}
    # What another device did does not count, and neither does an IOMMU.
    other = [{"do": "watch", "rule": rule} for rule in ("iommu.map", "irq/1/running/", "doorbell/0/running/")]
    two = {"edu0": Edu("edu0"), "edu1": Edu("edu1")}
    assert all(not site.behind for site in sites(other, two))


@pytest.mark.parametrize("many", [False, True])
def test_sizes_are_distinguished_while_they_are_few(many: bool) -> None:
    count = MOST_DISTINCT + many
    log = [{"do": "watch", "rule": "dma.read/0/running/", "size": 8 * n} for n in range(1, count + 1)]
    found = sites(log, DEVICES)
    assert len(found) == (1 if many else count) and sum(site.count for site in found) == count


def test_what_is_not_the_drivers_fault_is_not_offered() -> None:
    read = Site(Point.DMA_READ, (("device", "edu0"),))
    write = Site(Point.DMA_WRITE, (("device", "edu0"),))
    assert not {"flip", "stale", "partial", "use-after-unmap"} & set(offered(read, "workload", DEVICES))
    assert {"flip", "stale", "partial"} <= set(offered(write, "workload", DEVICES))
    assert "overrun" not in offered(write, "workload", DEVICES)
    assert {"overrun", "use-after-unmap"} <= set(offered(write, "workload", DEVICES, wild=True))
    # docs/injection.md: QEMU does not survive these while it starts; edu has no AER, one BAR, MSI.
    config = Site(Point.CONFIG_READ, (("device", "edu0"),))
    assert "value(0)" in offered(replace(config, values=(0, 1)), "workload", DEVICES)
    assert "value(0)" not in offered(replace(config, values=(0,)), "workload", DEVICES)  # as without the fault
    assert "ones" in offered(config, "workload", DEVICES) and "ones" not in offered(config, "boot", DEVICES)
    assert "aer" not in offered(config, "workload", DEVICES) and "hide" in offered(config, "workload", DEVICES)
    assert "no-bar" in offered(Site(Point.CONNECTION, (("device", "edu0"),)), "boot", DEVICES)


@pytest.mark.parametrize("name", sorted(set(ACTIONS) - {"watch", "aer"}))
def test_every_action_is_offered_somewhere(name: str) -> None:
    every = [Site(point, (("device", "edu0"),)) for point in Point]
    assert any(name in offered(site, "workload", DEVICES, wild=True) for site in every)


def test_what_depends_on_the_moment_alone_is_there_once_for_each_phase() -> None:
    pairs = space().pairs()
    assert len(pairs) == len(set(pairs))
    for action in ("disconnect", "spurious"):
        phases = [dict(site.keys)["phase"] for site, name in pairs if name == action]
        assert sorted(phases) == ["probe", "remove", "running"]
    assert len([site for site, name in pairs if name == "delay"]) > 2


def sound(plan: FaultPlan) -> None:
    assert 1 <= len(plan.rule) <= MOST_RULES
    Engine(plan, DEVICES).close()
    again = FaultPlan.model_validate(json.loads(json.dumps(plan.plain())))
    assert again == plan and identity(again) == identity(plan)
    for rule in plan.rule:
        # As reports print it; two events of `between` with keys have no form on the command line.
        assert rule.between is not None or parse_rule(rule.text(), "") == rule


@given(st.integers(0, 1 << 32), st.booleans())
def test_all_plans_are_sound(seed: int, wild: bool) -> None:
    made = space(wild=wild)
    generator = random.Random(seed)
    first, second = made.any(generator), made.any(generator)
    own = [Site(Point.COMPLETION, (("device", "edu0"), ("queue", 0), ("opcode", 8)), 3)]
    for plan in (
        first,
        second,
        made.mutated(first, generator, own),
        made.combined(first, second, generator),
        made.extended(first, made.rule(generator, own[0]), generator),
        made.plan([made.rule(generator, own[0], behind=Point.IRQ)], generator),
        *(plan for _, plan in made.one_by_one(second)),
    ):
        sound(plan)
    assert made.mutated(first, generator) != first


@given(st.integers(0, 1 << 32))
def test_equal_generators_make_equal_plans(seed: int) -> None:
    def plans(made: PlanSpace) -> list[FaultPlan]:
        generator = random.Random(seed)
        plans = [made.any(generator)]
        for _ in range(5):
            plans.append(made.mutated(plans[-1], generator))
        return [*plans, made.combined(plans[0], plans[-1], generator)]

    assert plans(space()) == plans(PlanSpace(surveyed(), "workload", {"edu0": Edu("edu0")}))


def test_a_rule_behind_an_event() -> None:
    made = space()
    site = next(site for site in made.sites if site.point is Point.MMIO_READ)
    keys = made.rule(random.Random(0), site, "ones", Point.DOORBELL).plain()
    assert keys["between"] == [{"point": "doorbell", "device": "edu0"}, {"point": "reset"}]
    assert made.rule(random.Random(0), site, "value(0)").do == parse_rule("mmio.read do=value(0)").do


def test_events_one_by_one() -> None:
    made = space()
    plan = made.plan([parse_rule("irq device=edu0 do=drop"), parse_rule("mmio.read do=ones nth=1")], random.Random(0))
    singles = made.one_by_one(plan)
    assert all(len(plan.rule) == 2 and rule in plan.rule and rule.nth for rule, plan in singles)
    assert len({identity(plan) for _, plan in singles}) == len(singles)
    # Each of the interrupts, and one more; of the reads all but the one that it has already.
    numbers = [(rule.point, rule.nth[0]) for rule, _ in singles if rule.nth]
    assert [n for point, n in numbers if point is Point.IRQ] == list(range(1, COMMANDS + 2))
    assert 1 not in [n for point, n in numbers if point is Point.MMIO_READ]


def test_the_order_of_rules_makes_no_other_plan() -> None:
    made, generator = space(), random.Random(1)
    rules = [parse_rule("irq do=drop"), parse_rule("completion do=drop")]
    assert made.plan(rules, generator) == made.plan([*reversed(rules), rules[0]], generator)
