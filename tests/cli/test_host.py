"""Failures of the host (a full disk, a closed stdout, no memory) are one line, with status 1; Ctrl-C prints nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE, ROOT, environ, refused, vmodel
from vmodel.patience import patience

LONG = "a" * 5000


def shell(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A line for sh, in which `vmodel` is this one."""
    return subprocess.run(
        ["sh", "-c", f'vmodel() {{ "{sys.executable}" -m vmodel "$@"; }}\n{line}'],
        cwd=cwd,
        env=environ(EXAMPLE=str(EXAMPLE), **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience(60),
    )


# ---- stdout ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("target", "buffering"), [(">/dev/full", ""), (">/dev/full", "1"), (">&-", "")])
def test_stdout_cannot_be_written(target: str, buffering: str, tmp_path: Path) -> None:
    said = {">/dev/full": "No space left on device", ">&-": "Bad file descriptor"}[target]
    for command in ("devices", "regs edu", "--help", "groups $EXAMPLE --json", "serve $EXAMPLE --run-dir run"):
        done = shell(f"vmodel {command} {target}", tmp_path, PYTHONUNBUFFERED=buffering)
        assert refused(done, 1) == f"stdout: {said}", command
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_closed_stream_lends_its_number_to_no_file(tmp_path: Path) -> None:
    """What prints nothing on stdout does its work; stderr may be closed or full as well, and the status stays."""
    assert shell("vmodel groups $EXAMPLE --svg g.svg <&- >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "g.svg").read_text().startswith("<svg")
    for target in ("2>&-", "2>/dev/full"):
        done = shell(f"vmodel servee {target}", tmp_path, PYTHONUNBUFFERED="")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_an_encoding_that_lacks_characters(tmp_path: Path) -> None:
    (tmp_path / "é.toml").write_text('[[rule]]\npoint = "dma.write"\ndo = "drop"\n')
    done = vmodel("plan", "check", "é.toml", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and "\\xe9.toml" in done.stdout


@pytest.mark.slow
def test_a_run_directory_that_is_not_text(tmp_path: Path) -> None:
    """QEMU takes a socket's path in JSON, which is UTF-8."""
    for command in ("serve", "qemu-args"):
        text = refused(shell(f"vmodel {command} $EXAMPLE --run-dir \"$(printf 'r\\377')\"", tmp_path))
        assert "is not UTF-8 text" in text and "r\\udcff/edu0.sock" in text


# ---- other files, memory, threads -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("status", "command"), [
    (2, ["report", LONG]),
    (2, ["reproduce", f"{LONG}/1"]),
    (2, ["minimise", f"{LONG}/1"]),
    (1, ["build", LONG]),
    (125, ["guest", str(EXAMPLE), "--file", LONG, "--", "true"]),
])  # fmt: skip
def test_a_name_that_is_too_long(status: int, command: list[str], tmp_path: Path) -> None:
    assert LONG in (said := refused(vmodel(*command, cwd=tmp_path), status)) and said.endswith("File name too long")


HOST_FAILS = """
import sqlite3, sys
from vmodel import cli
from vmodel.cli import inspect

def fail(*_):
    raise {error}

inspect.console = fail
sys.exit(cli.main(["devices"]))
"""


def failing(error: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", HOST_FAILS.format(error=error)]
    return subprocess.run(line, env=environ(), capture_output=True, text=True, timeout=patience(60))


@pytest.mark.slow
@pytest.mark.parametrize(("error", "said"), [
    ("MemoryError", "there is not enough memory"),
    ("RuntimeError(\"can't start new thread\")", "the host allows no more threads, or no memory for them"),
    ("sqlite3.OperationalError('database or disk is full')", "the campaign's database: database or disk is full"),
    ("OSError(28, 'No space left on device', b'x/\\xff')", "x/\\udcff: No space left on device"),
    ("OSError(28, 'No space left on device')", "No space left on device"),
])  # fmt: skip
def test_the_host_fails(error: str, said: str) -> None:
    assert refused(failing(error), 1) == said


@pytest.mark.slow
@pytest.mark.parametrize("error", ["RuntimeError('x')", "sqlite3.ProgrammingError('x')", "ValueError('x')"])
def test_a_bug_is_a_traceback(error: str) -> None:
    done = failing(error)
    assert done.returncode == 1 and "Traceback" in done.stderr and "in fail" in done.stderr


# ---- Ctrl-C ---------------------------------------------------------------------------------------


def pressed(module: str, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command that gets SIGINT when it first imports `module`."""
    (folder / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n1 / 0\n")
    line = [sys.executable, "-m", "vmodel", *arguments]
    env = environ(**env, PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]))
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=patience(60))


@pytest.mark.parametrize("module", ["typer", "pydantic", "tomllib"])
def test_ctrl_c_while_modules_load(module: str, tmp_path: Path) -> None:
    """The first are imported with the command line, the last with the command.  The signal ends it: 130 in a shell."""
    done = pressed(module, tmp_path, "serve", str(EXAMPLE))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_while_the_shell_completes(tmp_path: Path) -> None:
    asked = {"_VMODEL_COMPLETE": "complete_bash", "COMP_WORDS": "vmodel re", "COMP_CWORD": "1"}
    done = pressed("pydantic", tmp_path, **asked)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


ENDS = """
import atexit, os, signal, sys
atexit.register(os.kill, os.getpid(), signal.SIGINT)
if {ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["vmodel", "--version"]
from vmodel.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(("ignored", "status"), [(False, -signal.SIGINT), (True, 0)])
def test_ctrl_c_while_the_process_ends(ignored: bool, status: int) -> None:
    """An ignored signal, as in a script's background jobs, stays ignored."""
    line = [sys.executable, "-c", ENDS.format(ignored=ignored)]
    done = subprocess.run(line, env=environ(), capture_output=True, text=True, timeout=patience(60))
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.slow
def test_ctrl_c_in_a_command() -> None:
    """There Python's own handler is in place: what the command holds is released."""
    done = failing("KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
