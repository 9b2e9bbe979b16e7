"""A campaign's runs, while it is at work and afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.campaign.files import campaign_file
from tests.cli.commands import environ
from vmodel.campaign.store import ResultStore, Row
from vmodel.patience import patience


def write(folder: Path, workload: str, *, seeds: int = 5, name: str = "c", **more: dict[str, str]) -> Path:
    """A campaign of one workload: one run without faults, and one for each seed."""
    faults = more.get("faults", {"delay": "dma.write do=delay(ms=1)"})
    path = folder / f"{name}.toml"
    path.write_text(campaign_file(seeds=str(seeds), workloads={"w": workload}, faults=faults))
    return path


def rows(folder: Path) -> list[Row]:
    with ResultStore.open(folder) as store:
        return store.rows()


def ended(folder: Path) -> list[Row]:
    return [row for row in rows(folder) if row.result is not None] if (folder / "campaign.db").exists() else []


@contextmanager
def running(*arguments: str, cwd: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A command that is at work."""
    line = [sys.executable, "-m", "vmodel", *arguments]
    with subprocess.Popen(
        line,
        cwd=cwd,
        env=environ(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            yield run
        finally:
            run.kill()


def eventually(check: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not check():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.02)


def workers(folder: Path) -> list[str]:
    """Processes that run cases of the folder's rig."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"vmodel.campaign.worker" in words and f"{folder}/lab.py:Lab".encode() in words:
            found.append(path.parent.name)
    return found
