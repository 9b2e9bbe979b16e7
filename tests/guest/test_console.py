"""`vmodel guest -i` on a terminal: the command has a terminal of its own, and this one is as before afterwards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE
from tests.cli.consoles import Console
from tests.waiting import until

pytestmark = pytest.mark.guest


def console(tmp_path: Path, *command: str) -> Console:
    return Console("guest", EXAMPLE, "--run-dir", tmp_path / "run", "-i", "--", *command)


def test_a_shell(tmp_path: Path) -> None:
    """Controlling terminal, size and its changes, Ctrl-C, $TERM, exit status."""
    with console(tmp_path, "sh") as shell:
        shell.expect(rb"vmodel: booting \S+; Ctrl-\] ends the guest\r\n")
        before = shell.expect(rb"(?s)^(.*)# ")[1]
        assert b"job control" not in before
        shell.press(b"tty; stty size; echo $TERM; echo in $((1 + 1))\r")
        shell.expect(rb"/dev/ttyS1\r+\n30 100\r+\nxterm\r+\nin 2\r+\n")
        shell.press(b"sh -c 'trap \"stty size\" WINCH; echo s''et; sleep 1000 & wait; kill $!'\r")
        shell.expect(rb"set\r+\n")
        shell.resize(40, 90)
        shell.expect(rb"40 90\r+\n")
        shell.press(b"sh -c 'echo sl''eeps; exec sleep 1000'\r")
        shell.expect(rb"sleeps\r+\n")
        shell.press(b"\x03")
        shell.expect(rb"# ")
        shell.press(b"echo status-$?\r")
        shell.expect(rb"status-130\r+\n")
        shell.press(b"seq 2000; exit 7\r")
        shell.expect(rb"\n2000\r+\n")
        assert shell.ended() == 7
        assert shell.settings() == shell.before


def test_a_program_that_is_interrupted(tmp_path: Path) -> None:
    """Without a shell, too: Ctrl-C ends the command, and its status is the signal's."""
    with console(tmp_path, "sh", "-c", "echo beg''in; sleep 1000") as shell:
        shell.expect(rb"begin\r+\n")
        shell.press(b"\x03")
        assert shell.ended() == 128 + signal.SIGINT
        assert shell.settings() == shell.before


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("escape while it boots", 128 + signal.SIGINT, b""),
        ("escape", 128 + signal.SIGINT, b""),
        ("SIGTERM", 128 + signal.SIGTERM, b""),
        ("SIGKILL", -signal.SIGKILL, b""),
        ("QEMU dies", None, rb"vmodel: QEMU ended by signal 9"),
    ],
)
def test_other_ends(how: str, status: int | None, said: bytes, tmp_path: Path) -> None:
    with console(tmp_path, "cat") as shell:
        shell.expect(rb"ends the guest\r\n")
        if how != "escape while it boots":
            shell.press(b"typed ahead\r")
            shell.expect(rb"typed ahead\r+\ntyped ahead\r+\n")  # by the guest's terminal, and by cat
        if how.startswith("SIG"):
            shell.process.send_signal(signal.Signals[how])
        elif how == "QEMU dies":
            line = ["ps", "--ppid", str(shell.process.pid), "-ww", "-o", "pid=,args="]
            (pid,) = re.findall(r"(\d+) .*-accel tcg", subprocess.check_output(line, text=True))
            os.kill(int(pid), signal.SIGKILL)
        else:
            shell.press(b"\x1d")
        assert shell.ended() == status or status is None
        until(lambda: shell.settings() == shell.before, "the terminal is as before")
        assert re.search(said, shell.shown), shell.shown
