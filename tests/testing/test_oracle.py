"""Findings to outcomes."""

from __future__ import annotations

import pytest

from vmodel.testing.oracle import DATA_WRONG, Effect, Finding, Outcome, classify, of_status


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
