"""Handles of the shim's objects, and errno as exceptions."""

from __future__ import annotations

import os
from typing import Any

from vmodel._vmshim import ffi


def check(rc: int) -> int:
    """Turns -errno into OSError; passes anything else through."""
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
    return rc


def create(constructor: Any, destroy: Any, kind: str, *args: Any) -> Any:
    """A handle from a `_create` of the header; `destroy` is called when nothing refers to it."""
    out = ffi.new(f"{kind} **")
    check(constructor(*args, out))
    return ffi.gc(out[0], destroy)
