"""Time-outs follow the machine, and what it lacks is said: $VMODEL_SLOW, the calibration, tests/needs.py."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.conftest import measured, work
from tests.unit.test_cli import EXAMPLE, ROOT, environ, refused, vmodel
from vmodel.devices.edu import Edu
from vmodel.errors import ConfigError
from vmodel.patience import patience, slowness, spoken
from vmodel.testing.fakes import FakeDriver, FakeMemory


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


def test_a_wrong_factor_is_one_line() -> None:
    done = vmodel("guest", EXAMPLE, "--", "true", VMODEL_SLOW="fast", XDG_CACHE_HOME="/nonexistent")
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1
    assert "must be a number" in refused(done)


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
        with pytest.raises(TimeoutError, match=r"not in 0\.02 s x 8 \(VMODEL_SLOW\)"):
            driver.wait(lambda: False, 0.02)
        assert time.monotonic() - began >= 0.16
        driver.close()
        driver.device.close()


# ---- what a machine may lack --------------------------------------------------------------------------


def _fails(*_: object, **__: object) -> object:
    raise OSError(38, "not here")


@pytest.mark.parametrize(
    ("need", "module", "name", "said"),
    [
        (needs.pty, os, "openpty", "a pty"),
        (needs.semaphores, multiprocessing, "get_context", "POSIX semaphores"),
        (needs.user_namespaces, subprocess, "run", "user namespaces"),
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


def test_tests_of_terminals_skip_without_one(tmp_path: Path) -> None:
    """The same by a real session, on a machine without ptys."""
    (tmp_path / "conftest.py").write_text(
        "import os\ndef none(*_): raise OSError(2, 'no pty here')\nos.openpty = os.forkpty = none\n"
    )
    tests = [f"{ROOT}/tests/unit/test_cli.py", "-k", "ctrl_c or colours"]
    line = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--confcutdir", str(tmp_path)]
    line += ["-p", "conftest", "--rootdir", str(ROOT), *tests]
    environment = environ(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs a pty, which this machine has not: [Errno 2] no pty here" in done.stdout
    assert " passed" not in done.stdout
