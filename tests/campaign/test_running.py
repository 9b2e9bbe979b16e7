"""Campaigns while they run, as a user meets them: interrupted, killed, twice at once, with workers that die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.campaign.runs import ended, eventually, rows, running, workers, write
from tests.cli.commands import EXAMPLE, environ, refused, vmodel
from vmodel.campaign.rig import plain
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.patience import patience

pytestmark = pytest.mark.slow


def test_a_campaign(folder: Path) -> None:
    write(folder, f"note {folder}/log copy 2")
    done = vmodel("campaign", "c.toml", "-j", "2", cwd=folder)
    assert done.returncode == 0
    assert re.fullmatch(
        r"1 +not activated +no rule fired, .*\n5 +masked +a rule fired, .*\n"
        r"0 of 6 runs are not as expected\nnext: vmodel report c.runs -o report.html\n",
        done.stdout,
    )
    lines = done.stderr.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [f"{n}/6" for n in range(1, 7)]
    masked = re.compile(r"\d/6 c\.runs/\d edu w / delay / seed \d: masked \(\d\.\d s\)")
    assert sum(masked.fullmatch(line) is not None for line in lines) == 5
    found = rows(folder / "c.runs")
    assert [row.id for row in found] == [1, 2, 3, 4, 5, 6]
    for row in found:
        assert row.result is not None and row.started is not None and row.ended is not None
        assert row.started < row.ended
        assert {(row.folder / name).is_file() for name in row.result.artefacts.values()} == {True}
    assert len({row.guest for row in found}) <= 2, "each worker has one rig"
    assert sorted(p.name for p in (folder / "c.runs").iterdir()) == [*"123456", "campaign.db", "lock", "workers.log"]
    assert (folder / "log").read_text().count("\n") == 6
    assert workers(folder) == []

    # All have ended: there is nothing to do, and nothing is done again.
    again = vmodel("campaign", "c.toml", cwd=folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")
    assert (folder / "log").read_text().count("\n") == 6

    # More seeds: only those are new.
    write(folder, f"note {folder}/log copy 2", seeds=7)
    assert vmodel("campaign", "c.toml", cwd=folder).returncode == 0
    assert (folder / "log").read_text().count("\n") == 8 == len(rows(folder / "c.runs"))

    # Fewer, or others: then what is there is of another campaign.
    write(folder, f"note {folder}/log copy 3", seeds=7)
    line = refused(vmodel("campaign", "c.toml", cwd=folder))
    assert line.startswith("c.runs: contains 8 runs of another version of this campaign (")


def test_dry_run(folder: Path) -> None:
    write(folder, "copy 2", seeds=2)
    done = vmodel("campaign", "c.toml", "--dry-run", cwd=folder)
    assert done.stdout.splitlines() == [
        "edu / w / no faults",
        "edu / w / delay / seed 0",
        "edu / w / delay / seed 1",
        "c.toml: 3 runs",
    ]
    write(folder, "copy 2", seeds=1)
    done = vmodel("campaign", "c.toml", "--dry-run", cwd=folder)
    assert done.stdout.splitlines() == ["edu / w / no faults", "edu / w / delay", "c.toml: 2 runs"]
    assert not (folder / "c.runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(folder: Path, number: signal.Signals) -> None:
    write(folder, "sleep 0.5", seeds=9)
    with running("campaign", "c.toml", "-j", "2", cwd=folder) as run:
        eventually(lambda: len(ended(folder / "c.runs")) >= 2)
        run.send_signal(number)
        out, err = run.communicate(timeout=patience(30))
    assert (run.returncode, out) == (130, "")
    before = {row.id: row.ended for row in ended(folder / "c.runs")}
    assert 2 <= len(before) < 10
    said = f"vmodel: interrupted after {len(before)} of 10 runs: the same command continues from there"
    assert err.splitlines()[-1] == said
    assert workers(folder) == []
    assert not list((folder / "c.runs").glob(".part-*"))
    assert vmodel("campaign", "c.toml", "-j", "2", cwd=folder).returncode == 0
    after = {row.id: row.ended for row in ended(folder / "c.runs")}
    assert len(after) == 10 and before.items() <= after.items(), "what had ended was not made again"


def test_killed(folder: Path) -> None:
    write(folder, "sleep 0.5", seeds=9)
    with running("campaign", "c.toml", "-j", "2", cwd=folder) as run:
        eventually(lambda: len(ended(folder / "c.runs")) >= 2)
        run.kill()
        run.wait(patience(10))
    eventually(lambda: not workers(folder))
    before = {row.id: row.ended for row in ended(folder / "c.runs")}
    assert len(before) < 10
    done = vmodel("campaign", "c.toml", "-j", "2", cwd=folder)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0].startswith(f"{len(before) + 1}/10 ")
    after = {row.id: row.ended for row in ended(folder / "c.runs")}
    assert len(after) == 10 and before.items() <= after.items()
    assert sorted(p.name for p in (folder / "c.runs").iterdir() if p.is_dir()) == sorted(map(str, range(1, 11)))


def test_a_run_that_was_moved_but_not_written(folder: Path) -> None:
    """Killed between the two: the run is made again, and its folder is the new one's."""
    write(folder, "copy 1", seeds=1)
    assert vmodel("campaign", "c.toml", cwd=folder).returncode == 0
    with sqlite3.connect(folder / "c.runs" / "campaign.db") as database:
        database.execute("UPDATE run SET outcome = NULL, result = NULL WHERE id = 1")
    database.close()
    (folder / "c.runs" / "1" / "left").touch()
    assert vmodel("campaign", "c.toml", cwd=folder).returncode == 0
    assert rows(folder / "c.runs")[0].result is not None
    assert not (folder / "c.runs" / "1" / "left").exists()


def test_twice_at_once(folder: Path) -> None:
    write(folder, "sleep 0.5", seeds=999)  # far more than it gets to
    with running("campaign", "c.toml", cwd=folder) as run:
        eventually(lambda: ended(folder / "c.runs"))
        line = refused(vmodel("campaign", "c.toml", cwd=folder))
        assert line == (f"c.runs: process {run.pid} is using it: wait for that process, or name another folder with -o")
        # To look at it is allowed.
        report = vmodel("report", "c.runs", "--format", "json", cwd=folder)
        assert report.returncode == 0 and '"total": 1000' in report.stdout
        assert run.poll() is None
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=patience(30))


def test_a_worker_that_dies_once(folder: Path) -> None:
    write(folder, f"note {folder}/log kill {folder}/killed copy 2", seeds=3)
    done = vmodel("campaign", "c.toml", "-j", "2", cwd=folder)
    assert done.returncode == 0
    assert "its worker process was killed by signal 9: trying again" in done.stderr
    found = rows(folder / "c.runs")
    assert [row.result.outcome for row in found if row.result] == [Outcome.NOT_ACTIVATED] + [Outcome.MASKED] * 3
    assert sum(row.deaths for row in found) == 1


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_a_worker_that_dies_leaves_no_temporary_files(folder: Path, temporary: Path) -> None:
    write(folder, "die now", seeds=1)
    done = vmodel("campaign", "c.toml", "-j", "2", cwd=folder, TMPDIR=str(temporary))
    assert done.returncode == 1 and "its worker process was killed by signal 9" in done.stderr
    assert list(temporary.iterdir()) == []


def test_all_are_killed_and_leave_no_temporary_files(folder: Path, temporary: Path) -> None:
    """As by Linux when there is no memory left."""
    write(folder, f"note {folder}/log sleep 600")
    with running("campaign", "c.toml", "-j", "2", cwd=folder, TMPDIR=str(temporary)) as run:
        # Both work.
        eventually(lambda: (folder / "log").exists() and (folder / "log").read_text().count("\n") == 2)
        assert len(list(temporary.rglob("edu0.sock"))) == 2
        for pid in (run.pid, *map(int, workers(folder))):
            os.kill(pid, signal.SIGKILL)
        run.wait(patience(10))
    eventually(lambda: not list(temporary.iterdir()))


#: Ignores the exception of a signal's handler, as a callback from C does; says so in a file, and goes on.
STUBBORN = """
import time
from pathlib import Path

class Stubborn:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def run(self, case, folder):
        (folder / "started").touch()
        while True:
            try:
                time.sleep(0.01)
            except SystemExit:
                (folder / "asked").touch()
"""


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also one that ignores its first signal: nobody else is there to end it."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    (scratch := tmp_path / "scratch").mkdir()
    code = (
        "import pathlib, sys; from vmodel.campaign import worker as w; w._GRACE_END = 0.5;"
        " w.main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))"
    )
    ours, theirs = socket.socketpair()
    line = [sys.executable, "-c", code, f"{tmp_path}/stubborn.py:Stubborn", str(theirs.fileno()), str(scratch)]
    case = plain(Case(machine=EXAMPLE, workload="true"))
    with ours, subprocess.Popen(line, pass_fds=[theirs.fileno()], start_new_session=True) as process:
        theirs.close()
        try:
            ours.sendall(json.dumps({"case": case, "folder": str(tmp_path)}).encode() + b"\n")
            eventually((tmp_path / "started").exists)
            ours.close()
            assert process.wait(patience(30)) == -signal.SIGKILL
        finally:
            process.kill()
    assert (tmp_path / "asked").exists()
    eventually(lambda: not scratch.exists())


def test_a_worker_that_always_dies(folder: Path) -> None:
    path = write(folder, "die now", seeds=1)
    path.write_text(path.read_text() + '\n[[workload]]\nname = "well"\nrun = "copy 1"\n')
    done = vmodel("campaign", "c.toml", "-j", "2", cwd=folder)
    assert done.returncode == 1
    found = {(row.run.workload, row.run.plan): row for row in rows(folder / "c.runs")}
    assert [row.result.outcome.value for row in found.values() if row.result] == [
        "harness error",
        "harness error",
        "not activated",
        "masked",
    ]
    dead = found["w", "delay"]
    assert dead.deaths == 3 and dead.result is not None
    assert dead.result.evidence[0].text == "its worker process was killed by signal 9"
    assert "2 of 4 runs are not as expected, the first: c.runs/1\n" in done.stdout

    # They are not made again, unless somebody asks.
    assert vmodel("campaign", "c.toml", cwd=folder).stderr == ""
    again = vmodel("campaign", "c.toml", "--retry", cwd=folder)
    assert len([line for line in again.stderr.splitlines() if "trying again" in line]) == 4


def test_a_worker_that_is_stuck(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmodel.campaign import worker
    from vmodel.campaign.executor import Task
    from vmodel.campaign.worker import Processes
    from vmodel.experiment.case import Case

    monkeypatch.setattr(worker, "time_limit", lambda case: 1.0)
    on = Processes(f"{folder}/lab.py:Lab", 1, (folder / "log").open("ab"))
    try:
        on.submit(Task(1, Case(machine=folder / "edu.toml", workload="sleep 600"), folder / "1"))
        assert on.free == 0
        (answer,) = on.wait()
        assert (answer.result, answer.died) == (None, "its worker did not answer in 1 s")
        assert on.free == 1 and workers(folder) == []
    finally:
        on.close()


def test_a_bug_of_the_rig(folder: Path) -> None:
    write(folder, "break it", seeds=1)
    done = vmodel("campaign", "c.toml", cwd=folder)
    assert done.returncode == 1
    row = rows(folder / "c.runs")[1]
    assert row.result is not None and row.result.outcome is Outcome.HARNESS
    assert re.fullmatch(r"RuntimeError: the lab is broken: it \(lab.py line \d+\)", row.result.evidence[0].text)
    assert "RuntimeError: the lab is broken: it" in (row.folder / row.result.artefacts["traceback"]).read_text()


def test_a_mistake_that_only_the_rig_finds(folder: Path) -> None:
    write(folder, "refuse that-file", seeds=1)
    assert refused(vmodel("campaign", "c.toml", cwd=folder)) == "that-file"
    assert ended(folder / "c.runs") == [] and workers(folder) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["campaign", "nothing.toml"], "nothing.toml: cannot be read: No such file or directory"),
        (
            ["campaign", "c.toml", "-j", "0"],
            "invalid value for '-j' / '--jobs': Input should be greater than or equal to 1",
        ),
        (["campaign", "c.toml", "-o", "edu.toml/x"], "edu.toml/x: Not a directory: name another folder with -o"),
        (["campaign", "c.toml", "-o", "."], ".: is not a campaign's folder, and not empty: name another one with -o"),
        (
            ["campaign", "c.toml", "--scheduler", "tcp://127.0.0.1:1"],
            "--scheduler tcp://127.0.0.1:1: no scheduler answers",
        ),
        (["campaign", "c.toml", "--scheduler", "x"], "--scheduler x: must be an address, as tcp://host:8786"),
        (["report", "."], ".: is not a campaign's folder: it has no campaign.db"),
        (["report", ".", "--format", "htlm"], "--format htlm: did you mean html?"),
        (["reproduce", "x"], "x: must be a run's folder, as edu.runs/17"),
        (["minimise", "x/17"], "x: is not a campaign's folder"),
        (
            ["sweep", "edu.toml", "--point", "dma.raed", "--workload", "x"],
            "--point 'dma.raed': must begin with a point: ",
        ),
        (
            ["sweep", "edu.toml", "--point", "irq", "--workload", "x", "--do", "tear"],
            "--point 'irq do=tear nth=1': do: 'tear'",
        ),
        (["sweep", "edu.toml", "--point", "irq nth=3", "--workload", "x"], "--point 'irq nth=3': the sweep sets nth"),
        (["sweep", "edu.toml", "--point", "irq", "--workload", "x", "--file", "y"], "--file y: there is no file 'y'"),
        (["sweep", "none.toml", "--point", "irq", "--workload", "x"], "none.toml: cannot be read"),
    ],
)
def test_mistakes_of_the_command_line(folder: Path, arguments: list[str], says: str) -> None:
    write(folder, "copy 1")
    rig = ["--rig", "lab.py:Lab"] if arguments[0] == "sweep" else []
    assert says in refused(vmodel(*arguments, *rig, cwd=folder))


def test_a_key_that_no_point_has(folder: Path) -> None:
    line = refused(vmodel("sweep", "edu.toml", "--point", "irq devise=edu0", "--workload", "x", cwd=folder))
    assert line == "--point 'irq devise=edu0 do=drop nth=1': devise: unknown key: did you mean 'device'?"


def test_a_folder_of_another_campaign(folder: Path) -> None:
    write(folder, "copy 1", seeds=1)
    assert vmodel("campaign", "c.toml", cwd=folder).returncode == 0
    (folder / "d.toml").write_text((folder / "c.toml").read_text().replace('"lab"', '"another"'))
    line = refused(vmodel("campaign", "d.toml", "-o", "c.runs", cwd=folder))
    assert line == "c.runs: belongs to the campaign 'lab': name another folder with -o"
    (folder / "c.runs" / "campaign.db").write_bytes(b"no database, but long enough to be one" * 50)
    assert "campaign.db: cannot be read" in refused(vmodel("report", "c.runs", cwd=folder))


def test_in_a_terminal(folder: Path) -> None:
    """A bar, and what is wrong; no line for each run."""
    write(folder, "copy 2", seeds=3, faults={"gone": "mmio.read register=ID do=ones"})
    needs.pty()
    master, slave = os.openpty()
    line = [sys.executable, "-m", "vmodel", "campaign", "c.toml"]
    env = environ(TERM="xterm", COLUMNS="160", LINES="40")
    with subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=slave, text=True) as run:
        os.close(slave)
        shown = b""
        watchdog = threading.Timer(patience(120), run.kill)
        watchdog.start()
        with contextlib.suppress(OSError):  # EIO: the other side has closed it
            while piece := os.read(master, 4096):
                shown += piece
        watchdog.cancel()
        assert run.wait(patience(30)) == 1
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "4/4" in text and "3 crash" in text
    assert text.count("crash: kernel BUG at edu.c:17") == 3
    assert "/ no faults /" not in text
