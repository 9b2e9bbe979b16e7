"""vmodel sweep."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.campaign.runs import ended, eventually, rows, running
from tests.cli.commands import refused, vmodel
from vmodel.campaign.sweep import fired
from vmodel.experiment.oracle import Outcome
from vmodel.patience import patience

pytestmark = pytest.mark.slow


def sweep(folder: Path, workload: str, *more: str) -> list[str]:
    return [
        "sweep",
        "edu.toml",
        "--point",
        "dma.read device=edu0",
        "--workload",
        workload,
        "--rig",
        "lab.py:Lab",
        *more,
    ]


def test_each_event_fails_once(folder: Path) -> None:
    done = vmodel(*sweep(folder, "careful 3", "-j", "2"), cwd=folder)
    assert done.returncode == 0
    assert "\n3 events\n" in done.stderr
    found = rows(folder / "edu-dma.read.runs")
    # The clean one; the three; and the last one, which says that there is no fourth.
    assert [row.run.plan for row in found] == [
        "no faults",
        *(f"dma.read device=edu0 do=abort nth={n}" for n in range(1, 5)),
    ]
    results = [row.result for row in found if row.result is not None]
    assert [result.outcome for result in results] == [
        Outcome.NOT_ACTIVATED,
        *[Outcome.RECOVERED] * 3,
        Outcome.NOT_ACTIVATED,
    ]
    assert [fired(row) for row in found] == [False, True, True, True, False]
    assert [result.injections[0]["nth"] for result in results[1:4]] == [1, 2, 3]
    # It has ended: there is nothing more to do.
    again = vmodel(*sweep(folder, "careful 3"), cwd=folder)
    assert (again.returncode, again.stderr) == (0, "3 events\n")
    assert "another version of this sweep" in refused(vmodel(*sweep(folder, "careful 4"), cwd=folder))
    assert "belongs to the sweep 'edu: " in refused(vmodel(*sweep(folder, "careful 3", "--do", "drop"), cwd=folder))


def test_most(folder: Path) -> None:
    done = vmodel(*sweep(folder, "copy 3", "--most", "2"), cwd=folder)
    assert done.returncode == 0 and "\n3 events: only the first 2 will fail (--most)\n" in done.stderr
    assert [fired(row) for row in rows(folder / "edu-dma.read.runs")] == [False, True, True]


def test_it_fails_without_a_fault(folder: Path) -> None:
    done = vmodel(*sweep(folder, "break it"), cwd=folder)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "vmodel: edu-dma.read.runs/1: the run without a fault fails, too: harness error: RuntimeError: the lab is "
    )
    assert len(rows(folder / "edu-dma.read.runs")) == 1


def test_no_events(folder: Path) -> None:
    done = vmodel(*sweep(folder, "note log"), cwd=folder)
    assert done.returncode == 0 and "\n0 events\n" in done.stderr
    assert len(rows(folder / "edu-dma.read.runs")) == 1


def test_interrupted(folder: Path) -> None:
    words = sweep(folder, "sleep 0.2 careful 6")
    with running(*words, cwd=folder) as run:
        eventually(lambda: len(ended(folder / "edu-dma.read.runs")) >= 3)
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=patience(30))
    assert run.returncode == 130
    before = {row.id: row.ended for row in ended(folder / "edu-dma.read.runs")}
    assert len(before) < 8
    assert vmodel(*words, cwd=folder).returncode == 0
    after = {row.id: row.ended for row in ended(folder / "edu-dma.read.runs")}
    assert len(after) == 8 and before.items() <= after.items()
