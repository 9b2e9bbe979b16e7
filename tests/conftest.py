"""For all tests: how examples are chosen, and how patient they are with the machine."""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.browser import Browser
from vmodel.patience import patience, slowness

# The same examples in each run: it is green or red for a reason, never by chance.  `--hypothesis-profile thorough`, or
# HYPOTHESIS_PROFILE=thorough, tries ten times as many, and others each time.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("thorough", max_examples=1000, deadline=None, print_blob=True)
#: For `scripts/test --quick`.
settings.register_profile("quick", derandomize=True, deadline=None, print_blob=True, max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

#: Seconds that no test takes, its fixtures included: one that does hangs.
_HANGS = 1800.0
#: Standard error as it was before tests were captured.
_STDERR = pytest.StashKey[int]()

#: Milliseconds that `work` takes on a machine at rest, of 2020 or so.
_AT_REST = 30.0


def work() -> float:
    """Milliseconds for a fixed piece of work."""
    began, data = time.perf_counter(), b""
    for n in range(40_000):
        data = hashlib.sha256(data + n.to_bytes(4)).digest()
    return (time.perf_counter() - began) * 1e3


def measured(load: float, cpus: int, took: float) -> float:
    """How slow this machine is: by what work took, and by how many more than its CPUs want to run."""
    return round(min(max(took / _AT_REST, load / cpus, 1.0), 20.0), 1)


def pytest_configure(config: pytest.Config) -> None:
    """Once a session; processes of xdist's have it from the environment.  $VMODEL_SLOW by hand wins."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell without job control starts `scripts/test &` so, and processes of tests would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_STDERR] = os.dup(2)
    if "VMODEL_SLOW" not in os.environ:
        took = sorted(work() for _ in range(5))[2]
        workers = getattr(config.option, "numprocesses", None) or 1
        load = os.getloadavg()[0] + workers
        os.environ["VMODEL_SLOW"] = str(measured(load, os.cpu_count() or 1, took))


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_STDERR])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first: others run beside it."""
    items.sort(key=lambda item: "test_all_planted_bugs_are_found" not in item.nodeid)


def pytest_collection_finish() -> None:
    """What has been imported stays: tests that collect garbage need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """The end of a test that hangs: the process says where each of its threads is, and ends."""
    faulthandler.dump_traceback_later(patience(_HANGS), exit=True, file=item.config.stash[_STDERR])
    try:
        return (yield)  # type: ignore[return-value]
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_report_header() -> str:
    """The factor is part of what a log should say."""
    return f"time-outs x {slowness():g} (VMODEL_SLOW)"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Chromium, which `scripts/get-qemu --browser` brings.  Without it these tests fail: a skip is seen by nobody."""
    with Browser(tmp_path / "profile") as made:
        yield made
