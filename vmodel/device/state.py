"""`State`: a device's saved state for migration (VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE).

It is a header of fixed size, then the contents of all stores in order, then the model's extra bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Sequence

from vmodel.errors import PeerError

#: Header: magic number, and a hash of the layout of what follows.
_HEAD = struct.Struct("<4s32s")
_MAGIC = b"VMS3"


class State:
    """The values of all declared parts: registers, RAM areas, config space, MSI-X table, pending interrupts.

    Timers are not included: a model with running timers saves what it needs in `save_extra`.
    """

    def __init__(self, name: str, layout: object, stores: Sequence[memoryview], max_extra: int) -> None:
        """`layout`, which must be valid for JSON, distinguishes states of other models and other versions of this one.

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
        """Most bytes of a saved state of this device."""
        return _HEAD.size + self._own + self._max_extra

    def save(self, extra: bytes) -> bytes:
        """The state with the model's `extra`.  PeerError(EFBIG): `extra` is longer than `max_extra`."""
        if len(extra) > self._max_extra:
            raise PeerError(
                errno.EFBIG, f"{self._name}: save_extra gave {len(extra)} bytes, max_extra is {self._max_extra}"
            )
        return b"".join([self._head, *map(bytes, self._stores), extra])

    def split(self, data: bytes) -> tuple[memoryview, bytes]:
        """Splits a state into (the part for `load`, the model's extra).  PeerError(EINVAL): not of this model."""
        if data[: _HEAD.size] != self._head:
            raise PeerError(errno.EINVAL, f"{self._name}: the state cannot be restored: it is not of this model")
        if not self._own <= len(data) - _HEAD.size <= self._own + self._max_extra:
            raise PeerError(errno.EINVAL, f"{self._name}: the state cannot be restored: {len(data)} bytes")
        body = memoryview(data)[_HEAD.size :]
        return body[: self._own], bytes(body[self._own :])

    def load(self, body: memoryview) -> None:
        """Loads the first part that `split` returned into the stores."""
        at = 0
        for store in self._stores:
            store[:] = body[at : at + len(store)]
            at += len(store)
