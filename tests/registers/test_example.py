"""examples/registers: a card whose registers are specified in SystemRDL."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("systemrdl", reason="needs the extra `registers`")

from vmodel.machine.models import load_model
from vmodel.patience import patience
from vmodel.testing.fakes import FakeDriver, FakeMemory

EXAMPLE = Path(__file__).parents[2] / "examples/registers"


def test_the_card() -> None:
    model: Any = load_model("timers.py:Timers", EXAMPLE)
    with FakeMemory() as memory, FakeDriver(model(), memory) as card:
        assert card.read("ID") == 0xCA4D0001
        card.write("ENABLE", 1 << 2)
        card.write("TIMER[2].PERIOD", 1000)
        card.write("TIMER[2].CONTROL", 1)
        end = time.monotonic() + patience(10)
        while not card.read("STATUS"):
            assert time.monotonic() < end
        assert card.read("STATUS") == 1 << 2 and card.device.intx.level
        assert card.read("TIMER[2].CONTROL") == 0
        assert [card.read("TIMER[2].COUNT") for _ in range(2)] == [1, 0]
        for enabled, level in ((0, False), (1 << 2, True), (1 << 1, False), (0xF, True)):
            card.write("ENABLE", enabled)
            card.read("ID")  # the model has done what the write deferred
            assert card.device.intx.level is level
        card.write("STATUS", 1 << 2)
        assert card.read("STATUS") == 0 and not card.device.intx.level
        card.client.region_write(0, 0x100, b"notes")
        assert card.client.region_read(0, 0x100, 5) == b"notes"
