"""Surveys and the plans that come of them: all are valid, and equal for equal generators."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.explore.simulated import COMMANDS, Simulated
from tests.explore.trial import DEVICES, case, space, surveyed
from vmodel.devices.edu import Edu
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


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    result = Simulated().run(case(survey_plan(DEVICES)), tmp_path)
    whole = sites(records(result, tmp_path), DEVICES)
    with (tmp_path / "injections.jsonl").open("a") as file:
        bad = [
            {"do": "watch", "rule": rule}
            for rule in ("", "irq", "irq/9/running/", "irq/x/running/", "irq/0/running", "nowhere/0/running/", 7)
        ]
        file.write("[1]\n{\n" + "".join(f"{json.dumps(record)}\n" for record in bad))
    assert sites(records(result, tmp_path), DEVICES) == whole == surveyed()
    # Without the artefact, the result's own records.
    assert sites(records(result.model_copy(update={"artefacts": {}}), tmp_path), DEVICES) == whole


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
    assert "ones" in offered(config, "workload", DEVICES) and "ones" not in offered(config, "boot", DEVICES)
    assert "aer" not in offered(config, "workload", DEVICES) and "hide" in offered(config, "workload", DEVICES)
    assert "no-bar" in offered(Site(Point.CONNECTION, (("device", "edu0"),)), "boot", DEVICES)


@pytest.mark.parametrize("name", sorted(set(ACTIONS) - {"watch", "aer"}))
def test_every_action_is_offered_somewhere(name: str) -> None:
    every = [Site(point, (("device", "edu0"),)) for point in Point]
    assert any(name in offered(site, "workload", DEVICES, wild=True) for site in every)


def sound(plan: FaultPlan) -> None:
    assert 1 <= len(plan.rule) <= MOST_RULES
    Engine(plan, DEVICES).close()
    again = FaultPlan.model_validate(json.loads(json.dumps(plan.plain())))
    assert again == plan and identity(again) == identity(plan)
    for rule in plan.rule:
        assert parse_rule(rule.text(), "") == rule  # as reports print it


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


def test_the_order_of_rules_makes_no_other_plan() -> None:
    made, generator = space(), random.Random(1)
    rules = [parse_rule("irq do=drop"), parse_rule("completion do=drop")]
    assert made.plan(rules, generator) == made.plan([*reversed(rules), rules[0]], generator)
