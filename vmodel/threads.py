"""Which thread owns a device, and how others end its waits; docs/threads.md lists which thread owns what.

With `VMODEL_CHECK_THREADS=1` in the environment, a method marked `@owned` raises WrongThread if a thread other than the
one that serves the device calls it.  Otherwise the mark costs nothing.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

#: Read once: `owned` decides when a class is made.
CHECKED = bool(os.environ.get("VMODEL_CHECK_THREADS"))

_F = TypeVar("_F", bound=Callable[..., Any])


class WrongThread(AssertionError):
    """A bug in vmodel or in a model: a method that belongs to one thread was called on another."""


def place(thread: int | None) -> str:
    """Where the thread of this id is executing: functions with file and line, the innermost first."""
    frame = sys._current_frames().get(thread or 0)
    found = traceback.extract_stack(frame)[-3:] if frame is not None else []
    return ", called by ".join(f"{one.name} ({one.filename}:{one.lineno})" for one in reversed(found)) or "no function"


class Owner:
    """The thread that owns a device.  While none serves it, any thread may use it."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The thread's id; 0: no thread serves the device.
        self.thread = 0

    def take(self) -> None:
        """Makes the calling thread the owner."""
        self.thread = threading.get_ident()

    def leave(self) -> None:
        """Ends the ownership: the device is not served any more."""
        self.thread = 0

    def is_here(self) -> bool:
        """Whether the calling thread serves the device."""
        return self.thread == threading.get_ident()

    def check(self, what: str) -> None:
        """WrongThread if a thread other than the owner calls it; `what` names the method for the text."""
        if self.thread not in (0, threading.get_ident()):
            raise WrongThread(
                f"{what} of {self.name} belongs to the thread that serves it, not to {threading.current_thread().name}:"
                " use defer()"
            )


class Pause:
    """Waits on a device's thread that a stop of its server ends.  Any thread may call all but `wait`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stopped = False

    def wait(self, seconds: float, over: Callable[[], bool]) -> None:
        """Blocks for `seconds`, until a stop, or until `over()` is true: it is called at first and after `look`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or over(), seconds)

    def look(self) -> None:
        """Makes waits call their `over` again."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends all waits, also those that begin before `resume`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def resume(self) -> None:
        """Lets waits last again, as the device is served again."""
        with self._changed:
            self._stopped = False


def owned(method: _F) -> _F:
    """Marks a method of an object with an `owner: Owner` as one that only its thread may call."""
    if not CHECKED:
        return method

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.owner.check(method.__qualname__)
        return method(self, *args, **kwargs)

    return checked  # type: ignore[return-value]
