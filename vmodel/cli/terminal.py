"""The user's terminal while it is the console of a guest's command: every key goes to the guest, but one."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import termios
import threading
import tty

from vmodel.closing import Closing
from vmodel.guest.running import Guest
from vmodel.patience import patience

#: The key that ends the guest, and how it is called: Ctrl-] as of telnet and virsh.
ESCAPE, ESCAPE_NAME = b"\x1d", "Ctrl-]"
#: How often the size of the window is looked at, in seconds.  A handler of SIGWINCH would look like a stop to `Stop`.
_SIZE_EVERY = 0.3
#: Restores the terminal when this process has ended, in whatever way: its input ends then.  A background process may
#: set a terminal only if it ignores SIGTTOU.
_RESTORE = "trap '' HUP INT QUIT TERM TTOU TSTP; read -r _; exec stty \"$1\" <&1"


class Terminal(Closing):
    """A terminal in raw mode; a context manager that restores it, also if this process is killed."""

    def __init__(self, fd: int) -> None:
        """`fd`: a terminal's descriptor.  OSError, termios.error: it is none, or has gone."""
        self._fd = fd
        self._lock = threading.Lock()
        self._before = termios.tcgetattr(fd)
        line = ["stty", "-g"]
        saved = subprocess.run(
            line, stdin=fd, stdout=subprocess.PIPE, text=True, check=True, timeout=patience(20)
        ).stdout.strip()
        self._keeper: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["sh", "-c", _RESTORE, "sh", saved], stdin=subprocess.PIPE, stdout=fd, stderr=subprocess.DEVNULL
        )
        try:
            tty.setraw(fd)
            # The kernel's messages end their lines by LF alone.
            now = termios.tcgetattr(fd)
            now[1] |= termios.OPOST | termios.ONLCR
            termios.tcsetattr(fd, termios.TCSADRAIN, now)
        except BaseException:
            self.close()
            raise

    def size(self) -> tuple[int, int]:
        """(rows, columns) of its window; (24, 80) if it has no size."""
        columns, rows = os.get_terminal_size(self._fd)
        return (rows, columns) if rows and columns else (24, 80)

    def forward(self, guest: Guest, listening: threading.Event) -> bool:
        """Sends keys and changes of the window's size to the guest's command, until the guest ends.

        Keys wait until `listening` is set.  True: the user has pressed ESCAPE, or the terminal has gone.
        """
        size, keys = self.size(), b""
        while guest.running():
            if select.select([self._fd], [], [], _SIZE_EVERY if listening.is_set() else 0.05)[0]:
                try:
                    pressed = os.read(self._fd, 4096)
                except OSError:
                    pressed = b""
                if not pressed or ESCAPE in pressed:
                    return True
                keys += pressed
            if not listening.is_set():
                continue
            try:
                if keys:
                    guest.send(keys)
                    keys = b""
                if size != (size := self.size()):
                    guest.resize(*size)
            except OSError:  # one of both has ended
                return False
        return False

    def close(self) -> None:
        """Restores the terminal.  It may be called from any thread, and several times."""
        with self._lock:
            if self._keeper is None:
                return
            # The keeper ends by the end of its input, and does it once more: nothing later may be undone by it.
            self._keeper.communicate()
            self._keeper = None
            with contextlib.suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
