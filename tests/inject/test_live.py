"""`vmodel plan`, `--plan`, `--fault`, `vmodel inject` and `vmodel log`, as a user meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE, environ, refused, serving, vmodel
from vmodel.control import ask, socket_of
from vmodel.errors import ConfigError
from vmodel.patience import patience
from vmodel.vfio_user.client import Client

pytestmark = pytest.mark.slow

PLAN = """
seed = 7

[[rule]]
name = "blind"
point = "mmio.read"
device = "edu0"
register = "ID"
nth = 2
do = "ones"
"""
ID = 0x0100_00ED


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def look(folder: Path, reads: int = 3) -> list[int]:
    """edu's ID, read so often."""
    with Client.connect(folder / "edu0.sock") as client:
        client.negotiate()
        client.region_write(7, 4, b"\x06\x00")
        return [int.from_bytes(client.region_read(0, 0, 4), "little") for _ in range(reads)]


def test_check(plan: Path, tmp_path: Path) -> None:
    done = vmodel("plan", "check", plan)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "blind: mmio.read device=edu0 register=ID do=ones nth=2",
        f"{plan}: 1 rule, seed 7",
    ]
    assert vmodel("plan", "check", plan, "--machine", EXAMPLE).returncode == 0
    plan.write_text(PLAN.replace("ID", "IDD"))
    assert vmodel("plan", "check", plan).returncode == 0
    said = refused(vmodel("plan", "check", plan, "--machine", EXAMPLE))
    assert said == f"{plan}: rule[0] (blind).register: no register is called 'IDD': did you mean 'ID'?"
    # All mistakes at once; a rule without a name has that of the log.
    plan.write_text(f'{PLAN}\n[[rule]]\npoint = "irq"\ndevice = "edu1"\ndo = "drop"\n'.replace("ID", "IDD"))
    done = vmodel("plan", "check", plan, "--machine", EXAMPLE)
    assert [line.removeprefix(f"vmodel: {plan}: ").partition(": ")[0] for line in done.stderr.splitlines()] == [
        "rule[0] (blind).register",
        "rule[1] (rule2).device",
    ]
    plan.write_text(PLAN.replace("ones", "once"))
    assert refused(vmodel("plan", "check", plan)).startswith(f"{plan}: rule[0] (blind).do: 'once': there is no action")
    assert refused(vmodel("plan", "check", tmp_path / "no.toml")).endswith("cannot be read: No such file or directory")


def test_schema_has_every_key_and_action(plan: Path) -> None:
    done = vmodel("schema", "plan")
    schema = json.loads(done.stdout)
    rule = schema["$defs"]["Rule"]["properties"]
    assert {"point", "register", "iova", "phase", "nth", "between", "duration", "do"} <= set(rule)
    actions = {table["properties"]["action"]["const"] for table in rule["do"]["anyOf"] if "properties" in table}
    assert {"partial", "flip", "use-after-unmap", "disconnect"} <= actions
    assert "dma.write" in rule["point"]["enum"]


def test_plan_and_faults_of_a_server(plan: Path, tmp_path: Path) -> None:
    extra = "mmio.read register=ID nth=3 do=value(5) name=extra"
    with serving(EXAMPLE, "--run-dir", tmp_path, "--plan", plan, "--fault", extra, "--seed", "9") as (run, _):
        assert look(tmp_path) == [ID, 0xFFFF_FFFF, 5]
        done = vmodel("inject", "list", EXAMPLE, "--run-dir", tmp_path, "--json")
        rules = json.loads(done.stdout)
        assert [(r["name"], r["matched"], r["fired"], r["state"]) for r in rules] == [
            ("blind", 2, 1, "over"),
            ("extra", 3, 1, "over"),
        ]
        table = vmodel("inject", "list", EXAMPLE, "--run-dir", tmp_path).stdout.splitlines()
        assert table[1].split()[:4] == ["blind", "over", "2", "1"]
        log = vmodel("log", EXAMPLE, "--run-dir", tmp_path)
        first, second = log.stdout.splitlines()
        assert first.split(" ", 1)[1] == "blind #1 mmio.read edu0 0x0+4 ones: ed000001 -> ffffffff"
        assert "extra #1" in second
        run.send_signal(signal.SIGTERM)
        assert run.wait(20) == 0
        assert run.stderr is not None
        assert run.stderr.read() == f"vmodel: 2 injections, see {tmp_path}/edu.injections.jsonl\n"
    records = [json.loads(line) for line in (tmp_path / "edu.injections.jsonl").read_text().splitlines()]
    assert [(r["n"], r["rule"], r["count"], r["before"], r["after"]) for r in records] == [
        (1, "blind", 1, "ed000001", "ffffffff"),
        (2, "extra", 1, "ed000001", "05000000"),
    ]


def test_a_plan_that_does_nothing_is_not_silent(plan: Path, tmp_path: Path) -> None:
    """A rule that never fired is named; the log of an earlier run does not stay, as if it were this run's."""
    journal = tmp_path / "edu.injections.jsonl"
    journal.write_text('{"n": 1}\n')
    late = "mmio.read register=ID nth=9 do=ones name=late"
    with serving(EXAMPLE, "--run-dir", tmp_path, "--fault", late, "--fault", "irq do=drop") as (run, _):
        assert not journal.exists()
        look(tmp_path)
        run.send_signal(signal.SIGTERM)
        assert run.wait(20) == 0
        assert run.stderr is not None
        assert run.stderr.read().splitlines() == [
            "vmodel: late never fired: it matched 3 events",
            "vmodel: rule1 never fired: it matched 0 events",
        ]
    assert not journal.exists()


def test_a_refused_server_leaves_the_log_of_the_one_that_runs(tmp_path: Path) -> None:
    with serving(EXAMPLE, "--run-dir", tmp_path, "--fault", "mmio.read register=ID do=ones") as (run, _):
        look(tmp_path)
        before = (tmp_path / "edu.injections.jsonl").read_text()
        refused(vmodel("serve", EXAMPLE, "--run-dir", tmp_path))
        assert before and (tmp_path / "edu.injections.jsonl").read_text() == before
        run.send_signal(signal.SIGTERM)


def test_live(tmp_path: Path) -> None:
    def inject(*words: str) -> subprocess.CompletedProcess[str]:
        return vmodel("inject", words[0], EXAMPLE, *words[1:], "--run-dir", tmp_path)

    with serving(EXAMPLE, "--run-dir", tmp_path) as (run, _):
        assert look(tmp_path, 1) == [ID]
        line = [
            sys.executable,
            "-m",
            "vmodel",
            "log",
            str(EXAMPLE),
            "--run-dir",
            str(tmp_path),
            "-f",
            "--json",
            "--injections",
        ]
        with subprocess.Popen(line, env=environ(), stdout=subprocess.PIPE, text=True) as follower:
            watchdog = threading.Timer(60, follower.kill)  # its lines are waited for without a limit
            watchdog.start()
            assert inject("add", "mmio.read register=ID do=ones").stdout == "rule1\n"
            assert look(tmp_path, 1) == [0xFFFF_FFFF]
            assert follower.stdout is not None
            assert json.loads(follower.stdout.readline())["rule"] == "rule1"
            assert inject("pause").returncode == 0
            assert look(tmp_path, 1) == [ID]
            assert inject("resume", "rule1").returncode == 0
            assert look(tmp_path, 1) == [0xFFFF_FFFF]
            assert json.loads(follower.stdout.readline())["n"] == 2
            assert inject("remove", "rule1").returncode == 0
            assert look(tmp_path, 1) == [ID]
            where = f"the server in {tmp_path}: "
            assert refused(inject("remove", "rule1")) == f"{where}no rule is called 'rule1': there are no rules"
            assert refused(inject("add", "irq do=dorp")).startswith(
                f"{where}rule 'irq do=dorp': do: 'dorp': there is no"
            )
            assert refused(inject("add", "irq device=x do=drop")).startswith(f"{where}device: no device is called 'x'")
            run.send_signal(signal.SIGTERM)
            assert run.wait(20) == 0
            assert follower.wait(20) == 0
            watchdog.cancel()
    assert "no server runs" in refused(inject("list"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--fault", "irq do=drop device=edu1"],
            "irq device=edu1 do=drop: device: no device is called 'edu1': did you",
        ),
        (["--fault", "irq"], "--fault 'irq': do: is missing"),
        (["--fault", "irq do=drop name=a", "--fault", "irq do=drop name=a"], "rule[1].name: 'a' is used twice"),
        (["--plan", "/no/plan.toml"], "/no/plan.toml: cannot be read: No such file or directory"),
        (["--seed", "-1"], "invalid value for '--seed'"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "run", "guest"])
def test_wrong_options(tmp_path: Path, command: str, options: list[str], said: str) -> None:
    words = ["--", "true"] if command == "guest" else []
    done = vmodel(command, EXAMPLE, "--run-dir", tmp_path, *options, *words)
    assert said in refused(done)


def test_requests_that_are_no_text(tmp_path: Path) -> None:
    with serving(EXAMPLE, "--run-dir", tmp_path):
        socket = socket_of(tmp_path, "edu")
        for command, arguments in (
            ("inject.add", {"rule": 3}),
            ("inject.remove", {"name": ["x"]}),
            ("log", {"since": "x"}),
        ):
            with pytest.raises(ConfigError, match="must be"):
                ask(socket, command, **arguments)
        start = time.monotonic()
        assert ask(socket, "log", since=5) == [] and time.monotonic() - start < patience(5)
