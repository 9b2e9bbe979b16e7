"""SIGINT and SIGTERM end a command in order: what it has started ends first, and temporary files are removed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

#: Seconds that the first signal's cleaning up may take.
PATIENCE = 8.0


class Interrupts:
    """The signal that has arrived; `number` is 0 before."""

    def __init__(self) -> None:
        self.number = 0
        self._at = 0.0

    def _came(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._at = number, time.monotonic()
            raise KeyboardInterrupt
        # A second Ctrl-C must not interrupt the cleaning up, unless that hangs.
        if time.monotonic() - self._at > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def uncovered() -> Iterator[None]:
    """Within this context, a KeyboardInterrupt that pydantic has replaced by an error of its own is raised as itself.

    It does so if the signal comes while it calls Python code to serialize a value, as of a path.
    """
    try:
        yield
    except Exception as error:
        # By name: pydantic is not imported for a command that needs none.
        if type(error).__name__ == "PydanticSerializationError" and KeyboardInterrupt.__name__ in str(error):
            raise KeyboardInterrupt from error
        raise


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Within this context, the first SIGINT or SIGTERM raises KeyboardInterrupt; further ones wait for its end.

    A signal that is ignored, as in a script's background jobs, or has a handler of somebody else, stays so.
    """
    found = Interrupts()
    before = {}
    if threading.current_thread() is threading.main_thread():  # only there handlers can be set
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = handler
                signal.signal(number, found._came)
    try:
        with uncovered():
            yield found
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == found._came:
                signal.signal(number, handler)
