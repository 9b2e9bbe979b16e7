"""vmodel explore as a user runs it, with the simulated program instead of guests."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.files import MACHINE
from tests.campaign.runs import ended, running
from tests.cli.commands import refused, vmodel
from tests.explore.simulated import FULL
from tests.waiting import until
from vmodel.errors import ConfigError
from vmodel.experiment.oracle import Outcome
from vmodel.explore.script import cycle

SIMULATED = Path(__file__).with_name("simulated.py")
LINE = ("explore", "edu.toml", "--driver", "simulated", "--workload", "run", "--rig", "simulated.py:Simulated")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "edu.toml").write_text(MACHINE)
    shutil.copy(SIMULATED, tmp_path)
    return tmp_path


def test_a_search_from_the_command_line(folder: Path) -> None:
    done = vmodel(*LINE, "--runs", "60", "-j", "2", cwd=folder)
    assert done.returncode == 1, done.stderr  # it found something
    assert "problems in 60 plans" in done.stdout and "vmodel reproduce edu-explore.runs/" in done.stdout
    assert "find 1: " in done.stderr and "new instructions: " in done.stderr
    # Again: from the store, with the same plans.
    again = vmodel(*LINE, "--runs", "60", "--format", "json", cwd=folder)
    said = json.loads(again.stdout)
    assert said["runs"] == 60 and said["found"][0]["again"] == 3 and " explore / " not in again.stderr
    # Its runs are those of a campaign.
    report = json.loads(vmodel("report", "edu-explore.runs", "--format", "json", cwd=folder).stdout)
    assert report["kind"] == "explore" and len(report["runs"]) == said["all_runs"]
    first = vmodel("reproduce", said["found"][0]["reproduce"], "--trust", cwd=folder)
    assert first.returncode == 0 and "as before" in first.stdout


def test_ctrl_c_keeps_what_ended_and_prints_the_summary(folder: Path) -> None:
    with running(*LINE, "--runs", "5000", "-j", "2", cwd=folder) as run:
        until(lambda: len(ended(folder / "edu-explore.runs")) > 30, "thirty runs", 60)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "it was interrupted: the same command continues" in out and "Traceback" not in err
    kept = len(ended(folder / "edu-explore.runs"))
    assert kept > 30 and not list((folder / "edu-explore.runs").glob(".part-*"))
    said = json.loads(vmodel(*LINE, "--runs", "20", "--format", "json", cwd=folder).stdout)
    assert said["runs"] == 20
    assert len(ended(folder / "edu-explore.runs")) >= kept


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ((), "say when the search ends: --budget 30m, or --runs 500"),
        (("--runs", "0"), "--runs 0: must be at least 1"),
        (("--budget", "0s"), "--budget 0s: must be a time of more than 0, as 30m, 90s or 2h"),
        (("--budget", "soon"), "--budget soon: must be a time of more than 0, as 30m, 90s or 2h"),
        (("--runs", "5", "--timeout", "0"), "--timeout 0: must be more than 0 seconds, and have an end"),
        (("--runs", "5", "--device", "nix"), "--device nix: there is none in edu.toml: devices are edu0"),
        (("--runs", "5", "--driver", "./x.o"), "--driver ./x.o: there is no module or source folder './x.o'"),
        (
            ("--runs", "5", "--driver", "vmlinux:"),
            'must have the beginning of a function\'s name behind the colon, as "vmlinux:pci_"',
        ),
        (
            ("--runs", "5", "--suspend", "--bare"),
            "--suspend: needs a driver that each run loads, a module without --bare or --boot: do it in the workload"
            " instead",
        ),
        (
            ("--runs", "5", "--wait-for", "/dev/card"),
            "--wait-for: needs a driver that each run loads, a module without --bare or --boot: do it in the workload"
            " instead",
        ),
        (("--runs", "5", "--format", "xml"), "--format xml: formats are text, json"),
        (("--runs", "5", "--against", "nowhere"), "nowhere: is not a campaign's folder: it has no campaign.db"),
    ],
)
def test_bad_input_is_one_line(folder: Path, more: tuple[str, ...], line: str) -> None:
    assert refused(vmodel(*LINE, *more, cwd=folder)).endswith(line)
    assert not (folder / "edu-explore.runs").exists()


def test_a_workload_that_fails_is_one_line(folder: Path) -> None:
    line = [part if part != "run" else "fail" for part in LINE]
    done = vmodel(*line, "--runs", "5", cwd=folder)
    assert done.returncode == 1 and done.stdout == ""
    text = "vmodel: edu-explore.runs/1: the workload fails without faults: harness error: exit status 7"
    assert done.stderr.splitlines()[-1] == text


def test_a_full_disk_ends_the_search_and_keeps_what_ended(folder: Path) -> None:
    line = [part if part != "run" else "full" for part in LINE]
    further = "what has ended is stored, and the same command continues"
    for n in (1, 2):
        done = vmodel(*line, "--runs", "30", cwd=folder)
        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr.splitlines()[-1] == f"vmodel: edu-explore.runs: No space left on device: {further}"
        kept = ended(folder / "edu-explore.runs")
        assert len(kept) == n * FULL and all(row.result.outcome is not Outcome.HARNESS for row in kept if row.result)
        assert not list((folder / "edu-explore.runs").glob(".part-*"))


def test_a_folder_that_could_not_be_made_is_made_by_the_next_run(folder: Path) -> None:
    """A full disk, or Ctrl-C, while the folder is new."""
    new = folder / "edu-explore.runs"
    new.mkdir()
    for name in ("lock", "campaign.new", "campaign.new-journal"):
        (new / name).write_bytes(b"x")
    done = vmodel(*LINE, "--runs", "2", cwd=folder)
    assert done.returncode in (0, 1) and len(ended(new)) >= 5
    assert not list(new.glob("*.new*"))
    shutil.rmtree(new)
    new.mkdir()
    (new / "mine").touch()
    says = "edu-explore.runs: is not a campaign's folder, and not empty: name another one with -o"
    assert refused(vmodel(*LINE, "--runs", "2", cwd=folder)) == says


def test_another_folder_is_read_before_the_search(folder: Path) -> None:
    assert vmodel(*LINE, "--runs", "2", "-o", "other", cwd=folder).returncode in (0, 1)
    reached = {path: path.read_text() for path in (folder / "other").glob("*/reached.json")}
    for path in reached:
        path.write_text("{}")
    says = 'other: no run says what it reached: a campaign needs coverage = ["MODULE"]'
    assert refused(vmodel(*LINE, "--runs", "2", "--against", "other", cwd=folder)) == says
    for path, text in reached.items():
        path.write_text(text)
    (folder / "other" / "2" / "reached.json").unlink()
    says = "other/2/reached.json: cannot be read: No such file or directory"
    assert refused(vmodel(*LINE, "--runs", "2", "--against", "other", cwd=folder)) == says
    assert not (folder / "edu-explore.runs").exists()


def test_sanitize_is_kept_for_all_that_repeats_runs(folder: Path) -> None:
    assert vmodel(*LINE, "--runs", "40", "--sanitize", cwd=folder).returncode == 1
    kept = ended(folder / "edu-explore.runs")
    assert any(row.run.plan.startswith("find ") for row in kept)
    # `vmodel reproduce` and `vmodel minimise` run the case of a row.
    assert all(row.run.case.sanitize for row in kept)
    says = "edu-explore.runs: belongs to the search 'edu: "
    assert says in refused(vmodel(*LINE, "--runs", "40", "--seed", "1", cwd=folder))
    says = "contains another version of this search (its workload, machine or a program has changed)"
    assert says in refused(vmodel(*LINE, "--runs", "40", cwd=folder))


def script(text: str, tmp_path: Path, *, loads: bool = True) -> tuple[int, list[str]]:
    """The exit status of a cycle's script on this host, and which modules it loaded and removed."""
    sys, log = tmp_path / "sys", tmp_path / "log"
    (sys / "module").mkdir(parents=True, exist_ok=True)
    log.write_text("")
    tool = tmp_path / "modprobe"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n'
        f"case $1 in -r) rm -r {sys}/module/$2;; *) mkdir {sys}/module/$1; {'true' if loads else 'false'};; esac\n"
    )
    tool.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", text.replace("/sys/", f"{sys}/")],
        env={"PATH": f"{tmp_path}:/bin:/usr/bin"},
        timeout=60,
        check=False,
    )
    return done.returncode, log.read_text().split("\n")[:-1]


def test_the_script_of_a_run(tmp_path: Path) -> None:
    whole = ["core", "card", "-r card", "-r core"]
    assert script(cycle(["core", "card"], "true"), tmp_path) == (0, whole)
    # The workload's status is the script's; the driver is removed in any case.
    assert script(cycle(["core", "card"], "set -e\nexit 65"), tmp_path) == (65, whole)
    assert script(cycle(["card"], "touch worked", wait_for="/nowhere-at-all"), tmp_path) == (1, ["card", "-r card"])
    assert script(cycle(["card"], "exit 7"), tmp_path, loads=False) == (1, ["card", "-r card"])
    assert script(cycle(["card"], "true", suspend=True), tmp_path) == (0, ["card", "-r card"])


def test_harness_errors_are_in_the_summary(folder: Path) -> None:
    line = [part if part != "run" else "breaks" for part in LINE]
    done = vmodel(*line, "--runs", "16", cwd=folder)
    broken = [row for row in ended(folder / "edu-explore.runs") if row.result.outcome is Outcome.HARNESS]
    assert len(broken) == 1 and done.returncode == 1
    says = f"The harness failed in 1 run, which says nothing of the driver: {broken[0].folder.name}"
    assert says in " ".join(done.stdout.replace("edu-explore.runs/", "").split())
    again = vmodel(*line, "--runs", "16", "--retry", "--format", "json", cwd=folder)
    assert json.loads(again.stdout)["harness_errors"] == []


def test_a_long_text_of_a_guest_is_cut_in_the_summary(folder: Path) -> None:
    assert vmodel(*LINE, "--runs", "40", "-j", "2", cwd=folder).returncode == 1

    def longer(_: int, result: dict[str, Any]) -> dict[str, Any]:
        text = f"BUG:\n{'x' * 1_000_000}"
        return {**result, "evidence": [{**finding, "text": text} for finding in result["evidence"]]}

    change(folder / "edu-explore.runs", longer)
    done = vmodel(*LINE, "--runs", "40", cwd=folder)
    assert done.returncode == 1 and "crash: BUG: xxx" in done.stdout
    assert len(done.stdout) < 4000 and len(done.stderr) < 4000


def test_a_run_that_is_damaged_is_one_line(folder: Path) -> None:
    store = folder / "edu-explore.runs"
    assert vmodel(*LINE, "--runs", "12", cwd=folder).returncode in (0, 1)
    before = {row.id: row.result.model_dump_json() for row in ended(store) if row.result}
    says = "edu-explore.runs/campaign.db: run 5 is damaged, or was written by another version of vmodel"
    rules = [{"fired": [1]}], [{"fired": -1}], [{"fired": 10**30}], [{"fired": "x"}], [{"fired": True}], [7], 7
    wrong: list[dict[str, object]] = [{"rules": value} for value in rules]
    wrong += [{"injections": [{"nth": value}]} for value in (0, -1, "x", None, 10**30)]
    wrong += [{"wall": -7}, {"workload_time": -1}, {"injected": -1}, {"nth": 0}, {"nth": 1 << 64}]
    for keys in wrong:
        change(store, lambda id, result, keys=keys: {**json.loads(before[id]), **(keys if id == 5 else {})})
        with pytest.raises(ConfigError) as raised:
            ended(store)
        assert str(raised.value) == f"{folder}/{says}", keys
    assert refused(vmodel(*LINE, "--runs", "12", cwd=folder)) == says


def change(store: Path, how: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    """Changes the results that are stored; `how` gets a run's number and result."""
    with contextlib.closing(sqlite3.connect(store / "campaign.db")) as database, database:
        for id, text in database.execute("SELECT id, result FROM run").fetchall():
            changed = json.dumps(how(id, json.loads(text)))
            database.execute("UPDATE run SET result = ? WHERE id = ?", (changed, id))
