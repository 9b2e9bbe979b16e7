"""A command with a terminal of its own, which a test types at."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

from tests import needs
from tests.cli.commands import environ
from vmodel.closing import Closing
from vmodel.patience import patience


class Console(Closing):
    """`vmodel` on a terminal with 30 lines of 100 characters; a context manager that kills it."""

    def __init__(self, *arguments: str | Path, program: tuple[str, ...] = ("-m", "vmodel")) -> None:
        needs.pty()
        self._ours, self._theirs = os.openpty()
        self.resize(30, 100)
        #: The terminal's settings before.
        self.before = self.settings()
        self.shown = b""
        self.process = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env=environ(TERM="xterm"),
            start_new_session=True,
        )

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._theirs)

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def expect(self, pattern: bytes, seconds: float = 60.0) -> re.Match[bytes]:
        """Waits until it shows this; what was shown up to its end is not looked at again."""
        deadline = time.monotonic() + patience(seconds)
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            self._read(0.5)
        self.shown = self.shown[found.end() :]
        return found

    def ended(self, seconds: float = 30.0) -> int:
        """Its exit status, once it has ended; what it shows meanwhile is read."""
        deadline = time.monotonic() + patience(seconds)
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end; it shows {self.shown!r}"
            self._read(0.1)
        while self._read(0):
            pass
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        ready = bool(select.select([self._ours], [], [], seconds)[0])
        if ready:
            self.shown += os.read(self._ours, 4096)
        return ready

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # QEMU, too
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)
