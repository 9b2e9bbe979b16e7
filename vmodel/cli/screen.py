"""Merges several sources (a guest's command, its kernel, vmodel's log) on one terminal, line by line."""

from __future__ import annotations

import codecs
import io
import os
import re
import threading
from collections.abc import Callable
from typing import TextIO

from vmodel.guest.running import writer
from vmodel.printable import printable

#: The other sources wait at most this many seconds, and bytes, for the end of an open line: a prompt has none.
_PATIENCE = 1.0
_MOST = 1 << 16


class Screen:
    """A file shared by several sources, which keeps each source's lines whole.

    While one source has an open line, the others wait until it ends; after a second they start a new line.
    Output of a single source passes at once and unchanged.
    """

    def __init__(self, fd: int) -> None:
        self._write = writer(fd)
        self._lock = threading.Lock()
        self._open: str | None = None
        self._waiting: list[tuple[str, bytes]] = []
        self._timer: threading.Timer | None = None
        self._error: OSError | None = None
        #: Called before data is written, to erase something else that the terminal shows, such as a spinner.
        self.erase: Callable[[], None] = lambda: None

    def put(self, source: str, data: bytes) -> None:
        """Writes `data` of `source`, at once or when the open line of another source has ended."""
        self.erase()
        with self._lock:
            self._check()
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
        """Writes all data that is waiting; open lines of other sources are ended for it."""
        with self._lock:
            self._check()
            while self._waiting:
                self._break()

    def end_line(self) -> None:
        """Writes all data that is waiting, and ends an open line, so that the next output starts a new one."""
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
            self._flush()
            if tail:
                self._take(source, tail)
        elif data:
            self._write(data)
            self._open = source if tail else None

    def _flush(self) -> None:
        """A line has ended: takes the waiting data, in its order."""
        waiting, self._waiting = self._waiting, []
        for source, data in waiting:
            self._take(source, data)

    def _break(self) -> None:
        self._write(b"\n")
        self._open = None
        self._flush()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        with self._lock:
            self._timer = None
            if self._waiting:
                try:
                    self._break()
                except OSError as error:
                    self._error = error

    def _check(self) -> None:
        """Raises the error of a late write, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error


class Log(io.TextIOBase):
    """A text stream that writes log lines to a screen."""

    def __init__(self, screen: Screen, stream: TextIO) -> None:
        self._screen, self._stream = screen, stream

    def write(self, text: str) -> int:
        """Writes text, which the caller has made printable already."""
        self._screen.put("log", text.encode(errors="backslashreplace"))
        return len(text)

    def isatty(self) -> bool:
        """Whether the stream that this one replaces is a terminal."""
        return self._stream.isatty()


def shared(one: TextIO, other: TextIO) -> bool:
    """Whether two streams write to the same file or terminal."""
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except OSError:
        return False


def decoded(put: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """A sink for a console's bytes, in pieces of any size; it escapes unprintable text and calls `put`."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def take(data: bytes) -> None:
        put(printable(decoder.decode(data)).encode())

    return take


def with_places(put: Callable[[bytes], None], place: Callable[[str], str]) -> Callable[[bytes], None]:
    """A sink for a console's bytes, in pieces of any size: it calls `put` with `place(line)` behind each line."""
    line = b""

    def take(data: bytes) -> None:
        nonlocal line
        *ends, rest = data.split(b"\n")
        said = b""
        for end in ends:
            found = place((line + end).decode(errors="replace"))
            said += end + (f" ({found})".encode(errors="backslashreplace") if found else b"") + b"\n"
            line = b""
        line = (line + rest)[-1024:]
        put(said + rest)

    return take


def unix_lines(put: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """A sink for a serial console's bytes, in pieces of any size: it calls `put` with LF for CR LF."""
    held = b""

    def take(data: bytes) -> None:
        nonlocal held
        data = held + data
        # A CR at the end waits for the LF that may follow in the next piece; several are as good as one.
        whole = data.rstrip(b"\r")
        held = b"\r" if len(whole) < len(data) else b""
        data = re.sub(rb"\r+\n", b"\n", whole)
        if data:
            put(data)

    return take
