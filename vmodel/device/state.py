"""`State`: a device's saved state, as migration carries it (VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE).

It has a head of fixed size, then all stores in one row, then what the model adds: nothing in it has to be parsed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Sequence

from vmodel.errors import PeerError

#: Magic number, and the layout of what follows.
_HEAD = struct.Struct("<4s32s")
_MAGIC = b"VMS3"


class State:
    """All that is declared and has a value: registers, RAM areas, config space, MSI-X table, pending interrupts.

    Timers are not part of it: a model that has some running keeps what it needs in `save_extra`.
    """

    def __init__(self, name: str, layout: object, stores: Sequence[memoryview], max_extra: int) -> None:
        """`layout` (for JSON) tells states of other models, or of other versions of this one, apart.

        `max_extra`: most bytes that the model adds.
        """
        self._name = name
        sizes = [len(store) for store in stores]
        self._head = _HEAD.pack(_MAGIC, hashlib.sha256(json.dumps([layout, sizes]).encode()).digest())
        self._stores = stores
        self._own = sum(sizes)
        self._max_extra = max_extra

    @property
    def max_size(self) -> int:
        """Most bytes that a state of this device can have."""
        return _HEAD.size + self._own + self._max_extra

    def save(self, extra: bytes) -> bytes:
        """The state, with the model's `extra`.  PeerError(EFBIG) when that is more than `max_extra`."""
        if len(extra) > self._max_extra:
            raise PeerError(
                errno.EFBIG, f"{self._name}: save_extra gave {len(extra)} bytes, max_extra is {self._max_extra}"
            )
        return b"".join([self._head, *map(bytes, self._stores), extra])

    def split(self, data: bytes) -> tuple[memoryview, bytes]:
        """(what `load` takes, the model's extra).  PeerError(EINVAL) when `data` is no state of this model."""
        if data[: _HEAD.size] != self._head:
            raise PeerError(errno.EINVAL, f"{self._name}: the state cannot be restored: of another model, or no state")
        if not self._own <= len(data) - _HEAD.size <= self._own + self._max_extra:
            raise PeerError(errno.EINVAL, f"{self._name}: the state cannot be restored: {len(data)} bytes")
        body = memoryview(data)[_HEAD.size :]
        return body[: self._own], bytes(body[self._own :])

    def load(self, body: memoryview) -> None:
        """Stores what `split` gave."""
        at = 0
        for store in self._stores:
            store[:] = body[at : at + len(store)]
            at += len(store)
