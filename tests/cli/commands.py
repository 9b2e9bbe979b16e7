"""Commands as a user runs them: each in a process of its own."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests import needs
from vmodel.patience import patience

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "edu.toml"
#: What to do about a server that is there.
ELSE = "stop that server first, or choose another --run-dir"


def environ(**changes: str) -> dict[str, str]:
    """This process's, without what would make the runs depend on it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "VMODEL_", "PYTEST_"))}
    # The test's own `vmodel` is what runs, wherever it was imported from.
    return {**clean, "PYTHONPATH": str(ROOT), **changes}


def vmodel(*arguments: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vmodel", *map(str, arguments)]
    return subprocess.run(
        line,
        cwd=cwd,
        env=environ(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience(60),
    )


def refused(done: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """The one line that it said, where it failed as it should."""
    assert (done.returncode, done.stdout) == (status, ""), done
    line, rest = done.stderr.split("\n", 1)
    assert rest == "" and line.startswith("vmodel: ")
    return line.removeprefix("vmodel: ")


def until_ready(run: subprocess.Popen[str]) -> list[str]:
    """What a server prints before it is ready; it is killed if it is not in a minute."""
    assert run.stdout is not None
    said: list[str] = []
    watchdog = threading.Timer(patience(60), run.kill)
    watchdog.start()
    try:
        while (text := run.stdout.readline()) != "ready\n":
            assert text, f"it ended with status {run.wait(patience(10))}, not ready; it said {said}"
            said.append(text.rstrip("\n"))
    finally:
        watchdog.cancel()
    return said


@contextmanager
def serving(*arguments: str | Path, **env: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`vmodel serve` once it is ready: the process, and the lines that it printed before."""
    line = [sys.executable, "-m", "vmodel", "serve", *map(str, arguments)]
    with subprocess.Popen(line, env=environ(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            yield run, until_ready(run)
        finally:
            run.kill()


#: Makes standard input the terminal of its session, then becomes Python with these arguments.
_TAKES_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def on_terminal(*arguments: str, env: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """Python on a terminal of its own, and the fd of the terminal's other end.  (pty.fork is not for threads.)"""
    needs.pty()
    ours, theirs = os.openpty()
    line = [sys.executable, "-I", "-S", "-c", _TAKES_TERMINAL, *arguments]
    try:
        run = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    finally:
        os.close(theirs)
    return run, ours


def in_terminal(*arguments: str | Path, env: Mapping[str, str] = {}, keys: bytes = b"", until: bytes = b"") -> bytes:
    """What a terminal shows; `keys` are pressed once `until` has come."""
    run, fd = on_terminal("-m", "vmodel", *map(str, arguments), env=environ(**{"TERM": "xterm", **env}))
    shown, deadline = b"", time.monotonic() + patience(30)
    while time.monotonic() < deadline:
        if not select.select([fd], [], [], 1)[0]:
            continue
        try:
            shown += os.read(fd, 4096)
        except OSError:  # EIO: it has ended
            break
        if keys and until in shown:
            os.write(fd, keys)
            keys = b""
    else:
        run.kill()
    os.close(fd)
    return shown + b"status %d" % run.wait(patience(30))
