"""Findings to outcomes."""

from __future__ import annotations

import pytest

from vmodel.dma_report import DmaFinding, Severity, Sure
from vmodel.experiment.oracle import (
    DATA_WRONG,
    Effect,
    Finding,
    Outcome,
    classify,
    of_dma,
    of_status,
    time_to_detect,
    time_to_recover,
)


def finding(effect: Effect) -> Finding:
    return Finding(oracle="test", effect=effect, sign="x", text="x", signature="x")


@pytest.mark.parametrize(
    ("effects", "outcome"),
    [
        ([], Outcome.MASKED),
        ([Effect.NOTICED], Outcome.RECOVERED),
        ([Effect.NOTICED, Effect.ERROR], Outcome.FAILED),
        ([Effect.ERROR, Effect.CORRUPTION], Outcome.CORRUPTION),
        ([Effect.CORRUPTION, Effect.HANG], Outcome.HANG),
        ([Effect.HANG, Effect.CRASH], Outcome.CRASH),
        ([Effect.CRASH, Effect.HARNESS], Outcome.HARNESS),
    ],
)
def test_the_worst_counts(effects: list[Effect], outcome: Outcome) -> None:
    assert classify([finding(effect) for effect in effects], injected=True) is outcome


@pytest.mark.parametrize("effect", [effect for effect in Effect if effect is not Effect.NOTICED])
def test_what_goes_wrong_without_a_fault_is_the_experiments(effect: Effect) -> None:
    assert classify([finding(effect)], injected=False) is Outcome.HARNESS


@pytest.mark.parametrize("effects", [[], [Effect.NOTICED]])
def test_not_activated(effects: list[Effect]) -> None:
    assert classify([finding(effect) for effect in effects], injected=False) is Outcome.NOT_ACTIVATED


def test_wrong_dma_is_a_failure_of_the_driver_with_or_without_a_fault() -> None:
    leak = DmaFinding(
        sign="dma-leak",
        endpoint="edu0",
        severity=Severity.ERROR,
        sure=Sure.CERTAIN,
        text="1 mapping of 4 KiB still there",
        count=1,
        bytes=4096,
        examples=(),
    )
    assert of_dma([leak], ()) == of_dma([leak], {"dma-unused"}) == []
    [found] = of_dma([leak], {"dma-leak"})
    assert (found.effect, found.sign, found.signature) == (Effect.ERROR, "dma-leak", "dma-leak edu0")
    assert found.text == "dma-leak: edu0: 1 mapping of 4 KiB still there"
    assert classify([found], injected=False) is classify([found], injected=True) is Outcome.FAILED
    assert classify([found, finding(Effect.ERROR)], injected=False) is Outcome.HARNESS


@pytest.mark.parametrize(
    ("status", "effect", "text"),
    [
        (1, Effect.ERROR, "exit status 1"),
        (139, Effect.ERROR, "signal 11"),
        (DATA_WRONG, Effect.CORRUPTION, "exit status 65: data is wrong"),
    ],
)
def test_status(status: int, effect: Effect, text: str) -> None:
    found = of_status("check", status, 2.0)
    assert found is not None
    assert (found.oracle, found.effect, found.text, found.at) == ("check", effect, text, 2.0)
    assert of_status("check", 0) is None


def test_each_outcome_says_what_it_means() -> None:
    assert len({outcome.doc for outcome in Outcome}) == len(Outcome) == 8


def seen(oracle: str, at: float | None, last: float | None = None) -> Finding:
    return Finding(
        oracle=oracle,
        effect=Effect.NOTICED,
        sign="x",
        text="x",
        signature=f"x{at}",
        at=at,
        last=at if last is None else last,
    )


@pytest.mark.parametrize(
    ("found", "first", "seconds"),
    [
        ([], 1.0, None),
        ([seen("console", 3.0)], None, None),
        ([seen("kernel log", 4.0), seen("console", 3.0), seen("status", 9.0)], 1.0, 2.0),
        ([seen("console", 0.5, 3.0), seen("status", 9.0)], 1.0, 8.0),  # noticed before: not because of the fault
        ([seen("time", 2.0), seen("kernel log", None)], 1.0, None),
        ([seen("console", -1.0)], -2.0, 1.0),  # at boot
    ],
)
def test_time_to_detect(found: list[Finding], first: float | None, seconds: float | None) -> None:
    assert time_to_detect(found, first) == seconds


@pytest.mark.parametrize(
    ("found", "first", "life", "seconds"),
    [
        ([seen("console", 3.0, 5.0)], 1.0, [2.0, 4.0, 6.0, 7.0], 5.0),
        ([seen("console", 3.0), seen("kernel log", None)], 1.0, [7.0], 6.0),
        ([seen("console", 3.0)], None, [7.0], None),
        ([seen("console", 3.0)], 1.0, [2.0], None),  # it ended before the kernel noticed
    ],
)
def test_time_to_recover(found: list[Finding], first: float | None, life: list[float], seconds: float | None) -> None:
    assert time_to_recover(found, first, life) == seconds
