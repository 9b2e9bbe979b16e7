"""A terminal in raw mode is restored, in whatever way the process ends."""

from __future__ import annotations

import signal
import termios

import pytest

from tests.cli.consoles import Console
from tests.waiting import until

_PROGRAM = """
import sys
from vmodel.cli.terminal import Terminal
with Terminal(0) as terminal:
    print("raw", *terminal.size(), flush=True)
    if sys.stdin.read(1) == "x":
        raise RuntimeError("a bug")
print("end", flush=True)
"""


@pytest.mark.parametrize("how", ["end", "exception", "SIGTERM", "SIGKILL"])
def test_restored(how: str) -> None:
    with Console(program=("-c", _PROGRAM)) as console:
        console.expect(rb"raw 30 100\r\n")
        now = console.settings()
        assert not now[3] & (termios.ICANON | termios.ECHO | termios.ISIG), "keys come one by one, Ctrl-C too"
        assert now[1] & termios.OPOST, "lines of the kernel end in LF alone"
        if how.startswith("SIG"):
            console.process.send_signal(signal.Signals[how])
        else:
            console.press(b"x" if how == "exception" else b"\x03")
        console.ended()
        until(lambda: console.settings() == console.before, "the terminal is as before")
        assert (b"end" in console.shown) == (how == "end")


def test_sizes() -> None:
    """A terminal without a size, as a serial one, counts as one of 24 lines."""
    with Console(program=("-c", "import sys; sys.stdin.read(1);" + _PROGRAM.lstrip())) as console:
        console.resize(0, 0)
        console.press(b"\n")
        console.expect(rb"raw 24 80\r\n")
