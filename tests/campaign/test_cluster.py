"""Campaigns on a Dask cluster: one of this machine's, whose workers are processes."""

from __future__ import annotations

import importlib
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.runs import ended, eventually, rows, running, workers, write
from tests.cli.commands import vmodel
from vmodel.campaign.cluster import pack, unpack
from vmodel.experiment.oracle import Outcome
from vmodel.patience import patience

pytestmark = pytest.mark.slow

distributed: Any = importlib.import_module("distributed")


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the cluster's workers put temporary files."""
    folder = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, temporary: Path) -> Iterator[Any]:
    """Two workers."""
    with (
        warnings.catch_warnings(),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            host="127.0.0.1",
            local_directory=str(tmp_path_factory.mktemp("dask")),
            silence_logs=50,
        ) as made,
    ):
        warnings.simplefilter("ignore")
        yield made


def untimed(folder: Path) -> list[tuple[object, ...]]:
    """What does not depend on where and how fast a run was made."""
    return [
        (row.run.key, row.result.outcome, row.result.signatures, sorted(row.result.artefacts.items()))
        for row in rows(folder)
        if row.result is not None
    ]


def test_the_same_as_here(folder: Path, cluster: Any) -> None:
    path = write(folder, "careful 4", seeds=4, faults={"abort": "dma.read probability=0.4 do=abort"})
    done = vmodel("campaign", path, "--scheduler", cluster.scheduler_address, "-o", "there", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert vmodel("campaign", path, "-o", "here", cwd=folder).returncode == 0
    assert untimed(folder / "there") == untimed(folder / "here") and len(untimed(folder / "here")) == 5
    for row in rows(folder / "there"):
        assert row.result is not None
        for name in row.result.artefacts.values():
            assert (row.folder / name).is_file()
    records = [(folder / place / "2" / "injections.jsonl").read_text().count("\n") for place in ("here", "there")]
    assert records[0] == records[1] > 0


def test_a_worker_that_dies(folder: Path, cluster: Any, temporary: Path) -> None:
    """The cluster's own worker: what it was at is made elsewhere, and nothing is lost or left."""
    path = write(folder, "sleep 0.3 copy 1", seeds=12)
    with running("campaign", str(path), "--scheduler", cluster.scheduler_address, cwd=folder) as run:
        eventually(lambda: len(ended(folder / "c.runs")) >= 2)
        os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
        _, err = run.communicate(timeout=patience(120))
    assert run.returncode == 0, err
    found = [row.result.outcome for row in rows(folder / "c.runs") if row.result is not None]
    assert found == [Outcome.NOT_ACTIVATED] + [Outcome.MASKED] * 12
    eventually(lambda: not list(temporary.glob("vmodel-run-*")))


def test_a_case_that_kills(folder: Path, cluster: Any) -> None:
    """It dies in a process of its own: the cluster's worker goes on."""
    pids = {worker.pid for worker in cluster.workers.values()}
    path = write(folder, "die now", seeds=1)
    done = vmodel("campaign", path, "--scheduler", cluster.scheduler_address, cwd=folder)
    assert done.returncode == 1, done.stderr
    found = [row.result for row in rows(folder / "c.runs") if row.result is not None]
    assert [result.outcome for result in found] == [Outcome.HARNESS] * 2
    assert found[0].evidence[0].text == "its worker process was killed by signal 9"
    assert {worker.pid for worker in cluster.workers.values()} == pids


def test_the_users_mistake(folder: Path, cluster: Any) -> None:
    path = write(folder, "refuse that-file", seeds=1)
    done = vmodel("campaign", path, "--scheduler", cluster.scheduler_address, cwd=folder)
    assert (done.returncode, done.stderr) == (2, "vmodel: that-file\n")


def test_interrupted(folder: Path, cluster: Any) -> None:
    path = write(folder, "sleep 0.3", seeds=9)
    words = ["campaign", str(path), "--scheduler", cluster.scheduler_address]
    with running(*words, cwd=folder) as run:
        eventually(lambda: len(ended(folder / "c.runs")) >= 2)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=patience(60))
    assert run.returncode == 130, err
    assert err.splitlines()[-1].startswith("vmodel: interrupted after ")
    before = {row.id: row.ended for row in ended(folder / "c.runs")}
    assert vmodel(*words, cwd=folder).returncode == 0
    after = {row.id: row.ended for row in ended(folder / "c.runs")}
    assert len(after) == 10 and before.items() <= after.items()
    # What the workers keep for the next case ends with them.
    cluster.close()
    eventually(lambda: not workers(folder))


def test_artefacts_travel(tmp_path: Path) -> None:
    (tmp_path / "from" / "below").mkdir(parents=True)
    (tmp_path / "from" / "below" / "file").write_bytes(b"\0\1")
    (tmp_path / "from" / "link").symlink_to("/etc/passwd")
    unpack(pack(tmp_path / "from"), tmp_path / "to")
    assert (tmp_path / "to" / "below" / "file").read_bytes() == b"\0\1"
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["below"]
