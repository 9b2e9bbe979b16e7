from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.pci.card import Card, Rig
from vmodel.device import PciDevice
from vmodel.testing.fakes import FakeMemory

Drive = Callable[[PciDevice], Rig]


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Serves a card and drives it."""
    with ExitStack() as stack:
        memory = stack.enter_context(FakeMemory(1 << 16))

        def start(card: PciDevice) -> Rig:
            stack.callback(card.close)
            return stack.enter_context(Rig(card, memory))

        yield start


@pytest.fixture
def card(drive: Drive) -> Rig:
    """A card as it is after a reset."""
    return drive(Card())
