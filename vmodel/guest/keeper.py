"""A guest must not outlive what drives it: a small process waits for the end of this one, even by SIGKILL."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from vmodel.closing import Closing

#: Its input ends without a line when this process has ended.  Ctrl-C in a terminal reaches it, too.
_SCRIPT = 'trap "" HUP INT QUIT TERM; read -r _ && exit; kill -9 "$1"; [ -z "$2" ] || rm -rf "$2"'


class Keeper(Closing):
    """Kills a process, and removes a folder, if this process ends before `close`."""

    def __init__(self, process: subprocess.Popen[bytes], scratch: Path | None = None) -> None:
        """`process` has not been waited for.  OSError: no process can be started."""
        self._shell: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["sh", "-c", _SCRIPT, "sh", str(process.pid), str(scratch or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )

    def close(self) -> None:
        """Ends the waiting."""
        shell, self._shell = self._shell, None
        if shell is not None:
            with contextlib.suppress(BrokenPipeError):
                shell.communicate(b"\n")
