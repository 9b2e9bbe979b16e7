"""Handles of the shim's objects, and errno as exceptions."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from vmodel._vmshim import ffi

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check(rc: int) -> int:
    """Turns -errno into OSError; passes anything else through."""
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
    return rc


def in_bounds(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes OSError(EINVAL) of an argument that has more bits than the shim's, or is below 0."""

    @functools.wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return call(*args, **kwargs)
        except OverflowError as error:
            raise OSError(errno.EINVAL, str(error)) from None

    return run


def create(constructor: Any, destroy: Any, kind: str, *args: Any) -> Any:
    """A handle from a `_create` of the header; `destroy` is called when nothing refers to it."""
    out = ffi.new(f"{kind} **")
    check(constructor(*args, out))
    return ffi.gc(out[0], destroy)
