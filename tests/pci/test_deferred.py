"""Whose deferred work a reset drops: that of the device which is reset, wherever it would run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.pci.card import Card
from vmodel.pci.caps import ResetKind


@pytest.fixture
def cards() -> Iterator[tuple[Card, Card]]:
    with ExitStack() as stack:
        first, second = Card("first"), Card("second")
        stack.callback(first.close)
        stack.callback(second.close)
        yield first, second


def test_by_whom_decides(cards: tuple[Card, Card]) -> None:
    first, second = cards
    ran: list[str] = []
    first.defer(lambda: ran.append("own"))
    first.defer(lambda: ran.append("other's"), by=second)
    first.post(lambda: ran.append("nobody's"))
    first.reset(ResetKind.FUNCTION)
    first.defer(lambda: ran.append("later"))
    first.backend.run_due(0)
    assert ran == ["other's", "nobody's", "later"]


def test_a_reset_reaches_work_elsewhere(cards: tuple[Card, Card]) -> None:
    first, second = cards
    ran: list[str] = []
    first.defer(lambda: ran.append("second's"), by=second)
    second.reset(ResetKind.DEVICE)
    first.defer(lambda: ran.append("second's, anew"), by=second)
    first.backend.run_due(0)
    assert ran == ["second's, anew"]
