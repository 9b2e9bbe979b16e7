"""Which thread owns an object, checked while vmodel itself is developed (docs/threads.md says who owns what).

With `VMODEL_CHECK_THREADS=1` in the environment a method marked `@owned` raises WrongThread when another thread than
the one that serves the device calls it.  Without, the mark costs nothing.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

#: Read once: marks of a class stay as they were when it was made.
CHECKED = bool(os.environ.get("VMODEL_CHECK_THREADS"))

_F = TypeVar("_F", bound=Callable[..., Any])


class WrongThread(AssertionError):
    """A bug of vmodel's, or of a model's: a method that belongs to one thread was called on another."""


class Owner:
    """The thread to which a device belongs.  While nobody serves it, it belongs to whoever uses it."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: Its id; 0: nobody's.
        self.thread = 0

    def take(self) -> None:
        """The calling thread serves it from now on."""
        self.thread = threading.get_ident()

    def leave(self) -> None:
        """It is not served any more."""
        self.thread = 0

    def check(self, what: str) -> None:
        """WrongThread on another thread than the owner's."""
        if self.thread not in (0, threading.get_ident()):
            raise WrongThread(
                f"{what} of {self.name} belongs to the thread that serves it, not to {threading.current_thread().name}:"
                " use defer()"
            )


def owned(method: _F) -> _F:
    """Marks a method of an object with an `owner: Owner` as one that only its thread may call."""
    if not CHECKED:
        return method

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.owner.check(method.__qualname__)
        return method(self, *args, **kwargs)

    return checked  # type: ignore[return-value]
