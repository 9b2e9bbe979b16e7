"""What the Atheris targets share: an input taken apart, and what counts as a failure besides an exception."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import atheris


class Input:
    """Bytes are taken from its front; zeros follow its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return max(len(self.data) - self.at, 0)

    def bytes(self, n: int) -> bytes:
        """The next n bytes."""
        self.at += n
        return self.data[self.at - n : self.at].ljust(n, b"\0")

    def rest(self) -> bytes:
        """All that is left."""
        return self.bytes(self.left)

    def number(self, n: int) -> int:
        """The next n bytes, little-endian."""
        return int.from_bytes(self.bytes(n), "little")

    def address(self) -> int:
        """A number that is likely to be a page's, or at a border."""
        kind = self.number(1)
        if kind & 15 == 8:
            return self.number(8)
        if kind & 15 == 9:
            return (1 << 64) - 1 - self.number(2)
        if kind & 15 == 10:
            return (1 << (kind >> 4) * 4) + self.number(1) - 128 & (1 << 64) - 1
        return self.number(1) << 12 | (self.number(2) & 0xFFF if kind & 16 else 0)


class Abort(logging.Handler):
    """A failure of our own code that was only logged, so that the server goes on, ends the run."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or (record.exc_info and record.exc_info[0]):
            print(self.format(record), file=sys.stderr, flush=True)
            os.abort()


def fuzz(one_input: Callable[[bytes], None]) -> None:
    """Runs until libFuzzer's own limits; an exception is a failure.  `--reach FILE...`: see `reach`."""
    logger = logging.getLogger("vmodel")
    logger.addHandler(Abort(logging.WARNING))
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    threading.excepthook = lambda args: os.abort()
    if sys.argv[1:2] == ["--reach"]:
        for path in sys.argv[2:]:
            print(len(reach(one_input, Path(path).read_bytes())), path)
        return
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


#: Lines of vmodel's that inputs have reached so far.
_reached: set[tuple[str, int]] = set()


def reach(one_input: Callable[[bytes], None], data: bytes) -> set[tuple[str, int]]:
    """The lines of vmodel's that this input reaches and none before it has."""
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        name = frame.f_code.co_filename
        if "/vmodel/" not in name:
            return None
        seen.add((name, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        one_input(data)
    finally:
        sys.settrace(None)
    new = seen - _reached
    _reached.update(new)
    return new
