"""Time-outs follow the machine, and what it lacks is said: $VMODEL_SLOW, the calibration, tests/needs.py."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.conftest import measured, work
from vmodel.devices.edu import Edu
from vmodel.errors import ConfigError
from vmodel.patience import patience, slowness, spoken
from vmodel.testing.fakes import FakeDriver, FakeMemory

PACKAGE = Path(__file__).parents[2] / "vmodel"


def test_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, factor in (("", 1), ("1", 1), ("4", 4), ("2.5", 2.5)):
        monkeypatch.setenv("VMODEL_SLOW", text)
        assert (slowness(), patience(10)) == (factor, 10 * factor)
    assert spoken(15) == "15 s x 2.5 (VMODEL_SLOW)"
    monkeypatch.delenv("VMODEL_SLOW")
    assert (patience(2.0), spoken(15.0)) == (2.0, "15 s")
    for text in ("0", "0.5", "-4", "nan", "inf", "2000", "fast"):
        monkeypatch.setenv("VMODEL_SLOW", text)
        with pytest.raises(ConfigError, match=f"VMODEL_SLOW={text}: must be a number from 1 to 1000, such as 4"):
            slowness()


def test_the_machine_is_measured() -> None:
    assert measured(load=0.5, cpus=2, took=20.0) == 1.0, "never less than 1"
    assert measured(load=2.0, cpus=2, took=30.0) == 1.0
    assert measured(load=6.0, cpus=2, took=30.0) == 3.0, "three times as many want to run"
    assert measured(load=2.0, cpus=2, took=120.0) == 4.0, "it is that slow"
    assert measured(load=500.0, cpus=2, took=1e6) == 20.0, "what never ends is told of at last"
    assert work() > 0


def test_this_session_has_a_factor() -> None:
    """Processes of xdist's inherit it: one number for all."""
    assert float(os.environ["VMODEL_SLOW"]) == slowness() >= 1


def test_who_waits_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMODEL_SLOW", "8")
    with FakeMemory() as memory:
        driver = FakeDriver(Edu("edu0"), memory)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"not true within 0\.02 s x 8 \(VMODEL_SLOW\)"):
            driver.wait(lambda: False, 0.02)
        assert time.monotonic() - began >= 0.16
        driver.close()
        driver.device.close()


@pytest.mark.parametrize("place", ["cli", "guest", "campaign", "control.py"])
def test_no_time_out_is_fixed(place: str) -> None:
    """What docs/testing.md says of $VMODEL_SLOW: all time-outs of commands, guests, builds and campaigns have it."""
    found = PACKAGE / place
    for path in [found] if found.is_file() else found.rglob("*.py"):
        fixed = re.findall(r"\b(?:timeout=|settimeout\()(?:\d|_[A-Z]).*", path.read_text())
        assert not fixed, f"{path.name}: by patience()"


# ---- what a machine may lack --------------------------------------------------------------------------


def _fails(*_: object, **__: object) -> object:
    raise OSError(38, "not here")


@pytest.mark.parametrize(
    ("need", "module", "name", "said"),
    [
        (needs.pty, os, "openpty", "a pty"),
        (needs.semaphores, needs.multiprocessing, "get_context", "POSIX semaphores"),
        (needs.user_namespaces, needs.subprocess, "run", "user namespaces"),
        (needs.ipv6, socket, "socket", "IPv6"),
        (needs.fuse, os, "open", "FUSE"),
    ],
)
def test_what_is_missing_is_the_reason(
    need: Callable[[], None], module: object, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, _fails)
    with pytest.raises(pytest.skip.Exception, match=f"needs {said}.*, which this machine has not: .*not here"):
        need()
