"""The exit statuses of `vmodel guest` and `vmodel run`, as `vmodel guest --help` says them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmodel.patience import patience

pytestmark = pytest.mark.guest
EXAMPLE = Path(__file__).parents[2] / "examples" / "edu.toml"
PROVOKE = Path(__file__).parent / "driver_that_fails"


def guest(tmp_path: Path, *arguments: str, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vmodel", "guest", str(EXAMPLE), "--run-dir", str(tmp_path / "run"), *arguments]
    return subprocess.run(
        [*line, "--", "sh", "-c", script],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=patience(200),
        check=False,
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """vmodel's own lines on stderr."""
    return [line for line in done.stderr.splitlines() if line.startswith("vmodel: ")]


@pytest.mark.parametrize(("script", "status"), [("/etc", 126), ("nosuch", 127)])
def test_the_commands_status(script: str, status: int, tmp_path: Path) -> None:
    done = guest(tmp_path, script=script)
    assert (done.returncode, said(done)) == (status, []), done.stderr


@pytest.mark.parametrize(
    ("how", "fail_on", "command", "status", "line"),
    [
        ("oops", "panic,model,oops", "true", 72, "vmodel: kernel oops: BUG: kernel NULL pointer dereference"),
        ("warn", "warn", "true", 73, "vmodel: kernel warn: WARNING: "),
        ("panic-at-off", "warn", "true", 71, "vmodel: Kernel panic - not syncing: provoked at power-off"),
    ],
)
def test_what_the_kernel_reports(how: str, fail_on: str, command: str, status: int, line: str, tmp_path: Path) -> None:
    arguments = ["--extra-module", f"{PROVOKE}/", "--fail-on", fail_on]
    done = guest(tmp_path, *arguments, script=f"modprobe provoke how={how}; sleep 1; {command}")
    assert done.returncode == status, done.stderr
    assert any(text.startswith(line) for text in said(done)), done.stderr


@pytest.mark.parametrize(
    ("arguments", "script", "status", "line"),
    [
        ([], "echo c >/proc/sysrq-trigger", 71, r"^vmodel: Kernel panic - not syncing: sysrq triggered crash"),
        (["--timeout", "10"], "sleep 100", 124, r"^vmodel: the guest did not end in 10 s"),
        (["--module", "nosuch"], "true", 125, r"^vmodel: kernel \S+ has no module 'nosuch'$"),
        (["--qemu-arg=-nosuch"], "true", 125, r"^vmodel: QEMU ended with status 1 before the command: .*-nosuch"),
        ([], "poweroff -f; sleep 100", 125, r"^vmodel: the guest powered off or rebooted before the command ended"),
    ],
)
def test_a_command_that_does_not_end(arguments: list[str], script: str, status: int, line: str, tmp_path: Path) -> None:
    done = guest(tmp_path, *arguments, script=script)
    assert (done.returncode, done.stdout) == (status, "")
    assert re.search(line, done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr


def test_a_module_that_oopses_while_it_loads(tmp_path: Path) -> None:
    """The oops is why it did not load: it is said with its line, and the status is its own if --fail-on has it."""
    arguments = ["--module", f"{PROVOKE}/", "--append", "provoke.how=oops-in-init"]
    done = guest(tmp_path, *arguments, script="true")
    assert done.returncode == 72, done.stderr
    oops, failed = said(done)
    assert re.fullmatch(r"vmodel: kernel oops: BUG: kernel NULL pointer dereference, .*provoke\.c:\d+\)", oops), oops
    assert failed.startswith("vmodel: module provoke did not load")
    done = guest(tmp_path, *arguments, "--fail-on", "model", script="true")
    assert done.returncode == 125, done.stderr


#: By what the driver does: patterns of the lines that are printed, and what the kernel prints on its console.
HANGS = {
    "block": ([r"blocked: provoke-block:\d+ in provoke_block\+.*provoke\.c:\d+\)"], "sysrq: Show Blocked State"),
    "spin": (
        [rf"CPU {n}: in the kernel at 0x\w+, interrupts off: provoke-spin/{n}:\d+ in provoke_spin\+.*" for n in (0, 1)],
        "Kernel panic - not syncing: NMI",
    ),
}


@pytest.mark.parametrize("how", HANGS)
def test_a_guest_that_hangs(how: str, tmp_path: Path) -> None:
    """Also where no CPU takes interrupts any more: all are asked from outside, and the status is that of 124."""
    logs = tmp_path / "logs"
    # A limit that the boot does not reach: the hang begins when the command does.
    arguments = ["--extra-module", f"{PROVOKE}/", "--artifacts", str(logs), "--timeout", "15", "--cpus", "2"]
    done = guest(tmp_path, *arguments, script=f"modprobe provoke how={how}; sleep 1000")
    assert done.returncode == 124, done.stderr
    patterns, on_console = HANGS[how]
    last = done.stderr.partition("\nvmodel: the guest did not end in 15 s")[2]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line.strip()) for line in last.splitlines()), done.stderr
    assert on_console in (logs / "console.log").read_text() and on_console in done.stderr
    assert "RIP=" in (logs / "registers.log").read_text()
