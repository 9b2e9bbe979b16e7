"""What several write on one terminal (a guest's command, its kernel, vmodel's log) a line at a time."""

from __future__ import annotations

import codecs
import io
import os
import threading
from collections.abc import Callable
from typing import TextIO

from vmodel.guest.running import writer
from vmodel.printable import printable

#: Seconds, and bytes, that others wait for the end of somebody's line: a prompt has none.
_PATIENCE = 1.0
_MOST = 1 << 16


class Screen:
    """One file, on which each source's lines stay whole.

    While somebody is in the middle of a line, others wait until it ends; after a second they begin a line of their own.
    A source that is alone gets through at once and byte for byte.
    """

    def __init__(self, fd: int) -> None:
        self._write = writer(fd)
        self._lock = threading.Lock()
        self._open: str | None = None
        self._waiting: list[tuple[str, bytes]] = []
        self._timer: threading.Timer | None = None

    def put(self, source: str, data: bytes) -> None:
        """Writes what `source` says, now or when a line has ended."""
        with self._lock:
            self._take(source, data)
            if not self._waiting:
                self._stop_waiting()
            elif sum(len(data) for _, data in self._waiting) > _MOST:
                self._break()
            elif self._timer is None:
                self._timer = threading.Timer(_PATIENCE, self._late)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        """Writes what still waits, and ends a line that is open if anybody else wants to write after it."""
        with self._lock:
            while self._waiting:
                self._break()

    def end_line(self) -> None:
        """What is written next by others begins a line."""
        self.close()
        with self._lock:
            if self._open is not None:
                self._open = None
                self._write(b"\n")

    def _take(self, source: str, data: bytes) -> None:
        if self._open not in (None, source):
            self._waiting.append((source, data))
            return
        head, newline, tail = data.rpartition(b"\n")
        if newline and self._waiting:
            self._write(head + newline)
            self._open = None
            self._go_on()
            if tail:
                self._take(source, tail)
        elif data:
            self._write(data)
            self._open = source if tail else None

    def _go_on(self) -> None:
        """A line has ended: those that waited, in their order."""
        waiting, self._waiting = self._waiting, []
        for source, data in waiting:
            self._take(source, data)

    def _break(self) -> None:
        self._write(b"\n")
        self._open = None
        self._go_on()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        with self._lock:
            self._timer = None
            if self._waiting:
                self._break()


class Log(io.TextIOBase):
    """A stream for log lines on a screen."""

    def __init__(self, screen: Screen, stream: TextIO) -> None:
        self._screen, self._stream = screen, stream

    def write(self, text: str) -> int:
        """As any stream's.  Text is printable already, or rich's."""
        self._screen.put("log", text.encode(errors="backslashreplace"))
        return len(text)

    def isatty(self) -> bool:
        """As the stream whose place it takes."""
        return self._stream.isatty()


def shared(one: TextIO, other: TextIO) -> bool:
    """Whether two streams are one file or terminal."""
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except OSError:
        return False


def decoded(put: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Takes a kernel's console in pieces, and passes it on printable."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def take(data: bytes) -> None:
        put(printable(decoder.decode(data)).encode())

    return take
