"""Nothing must outlive what drives a guest: a small process waits for the end of this one, even by SIGKILL."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from vmodel.closing import Closing

#: Its input ends without a line when this process has ended.
_SCRIPT = 'trap "" HUP INT QUIT TERM; read -r _ && exit; [ -z "$1" ] || kill -9 "$1"; [ -z "$2" ] || rm -rf "$2"'


class Keeper(Closing):
    """Kills a process, and removes a folder, if this process ends before `close`."""

    def __init__(self, process: subprocess.Popen[bytes] | None, scratch: Path | None = None) -> None:
        """`process` has not been waited for.  OSError: no process can be started."""
        pid = "" if process is None else str(process.pid)
        self._shell: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["sh", "-c", _SCRIPT, "sh", pid, str(scratch or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # Neither Ctrl-C in a terminal nor the end of this process's group reaches it.
            start_new_session=True,
        )

    def close(self) -> None:
        """Ends the waiting."""
        shell, self._shell = self._shell, None
        if shell is not None:
            with contextlib.suppress(BrokenPipeError):
                shell.communicate(b"\n")


@contextlib.contextmanager
def removing(folder: Path) -> Iterator[None]:
    """Removes a folder at the end of the block, or when this process is killed in it.  OSError: as of Keeper."""
    with Keeper(None, folder):
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
