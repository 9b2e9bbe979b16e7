"""Split virtqueues, the device's side (VIRTIO 1.3, 2.7).  What is in them is the driver's, and so not to be trusted."""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass, field

from vmodel.dma import Dma
from vmodel.errors import DmaFault, GuestError
from vmodel.points import Point, Points

#: Most entries that a queue may have (2.7).
MAX_SIZE = 32768

_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_AVAIL_NO_INTERRUPT = 1
#: Descriptors that are read at once.
_AHEAD = 4
_DESCRIPTOR = struct.Struct("<QIHH")
_U16 = struct.Struct("<H")
_USED_ELEMENT = struct.Struct("<II")


class QueueError(GuestError):
    """The driver has broken the queue's rules: the device needs a reset (2.1.2)."""


@dataclass(slots=True)
class Chain:
    """A request: its parts as (address, size), those that the device reads before those that it writes."""

    head: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)

    @property
    def read_size(self) -> int:
        """Bytes that the device may read."""
        return sum(size for _, size in self.readable)

    @property
    def write_size(self) -> int:
        """Bytes that the device may write."""
        return sum(size for _, size in self.writable)


class Virtqueue:
    """One queue.  Addresses are set by the transport while it is not enabled."""

    def __init__(self, dma: Dma, index: int, max_size: int, points: Points | None = None) -> None:
        if not 0 < max_size <= MAX_SIZE or max_size & (max_size - 1):
            raise ValueError(f"a queue has a power of two up to {MAX_SIZE} entries, not {max_size}")
        self.index = index
        self.max_size = max_size
        self._dma = dma
        self._points = points
        self.reset()

    def reset(self) -> None:
        """As after a device reset."""
        self.size = self.max_size
        self.descriptors = self.driver = self.device = 0
        self.enabled = False
        self.vector = 0xFFFF
        self.event_index = self.indirect = False
        self._next_avail = self._next_used = 0
        self._signalled = 0
        #: Requests that the driver has made available, the next one last.
        self._heads: list[int] = []

    def enable(self, *, event_index: bool, indirect: bool) -> None:
        """Starts it with what was negotiated.  QueueError: addresses or size cannot be (2.7)."""
        if not 0 < self.size <= self.max_size or self.size & (self.size - 1):
            raise QueueError(f"queue {self.index}: size {self.size}")
        if self.descriptors % 16 or self.driver % 2 or self.device % 4:
            raise QueueError(f"queue {self.index}: its parts are not aligned")
        self.event_index, self.indirect = event_index, indirect
        self.enabled = True

    # ---- requests --------------------------------------------------------------------------

    @property
    def progress(self) -> tuple[int, int]:
        """How far both rings have been gone through, for whoever else does that: (available, used)."""
        return self._next_avail, self._next_used

    @progress.setter
    def progress(self, indexes: tuple[int, int]) -> None:
        self._next_avail, self._next_used = indexes
        self._heads = []

    def pop(self) -> Chain | None:
        """The next request; None when there is none.  QueueError."""
        try:
            return self._pop()
        except DmaFault as fault:
            raise QueueError(f"queue {self.index}: {fault}") from fault

    def _pop(self) -> Chain | None:
        if not self._heads:
            available = self._u16(self.driver + 2)
            if available == self._next_avail:
                if self.event_index:
                    # Ask for a notification of the next one, and look again: it may have come meanwhile (2.7.10).
                    self._dma.write(self.device + 4 + 8 * self.size, _U16.pack(self._next_avail))
                    available = self._u16(self.driver + 2)
                if available == self._next_avail:
                    return None
            self._heads = self._between(self._next_avail, available)
        head = self._heads[-1]
        chain = self._walk(head)
        self._heads.pop()
        self._next_avail = (self._next_avail + 1) % 65536
        return chain

    def _between(self, first: int, end: int) -> list[int]:
        """The heads at [first, end) of the available ring, the last one first."""
        count = (end - first) % 65536
        if count > self.size:
            raise QueueError(f"queue {self.index}: {end} requests are more than the queue has")
        at, ring = first % self.size, self.driver + 4
        whole = min(count, self.size - at)
        data = self._dma.read(ring + 2 * at, 2 * whole)
        if whole < count:
            data += self._dma.read(ring, 2 * (count - whole))
        heads = array("H", data)
        if sys.byteorder == "big":
            heads.byteswap()
        heads.reverse()
        return heads.tolist()

    def _u16(self, address: int) -> int:
        value: int = _U16.unpack(self._dma.read(address, 2))[0]
        return value

    def _walk(self, head: int) -> Chain:
        """A chain by its descriptors; an indirect table counts as its parts (2.7.5.3)."""
        chain = Chain(head)
        table, entries, index, inside = self.descriptors, self.size, head, False
        # Descriptors of a chain are mostly neighbours: a few are read at once.
        first = count = seen = 0
        data = b""
        while True:
            if not first <= index < first + count:
                if index >= entries:
                    raise QueueError(f"queue {self.index}: descriptor {index} of {entries}")
                first, count = index, min(_AHEAD, entries - index)
                data = self._dma.read(table + 16 * index, 16 * count)
            address, size, flags, following = _DESCRIPTOR.unpack_from(data, 16 * (index - first))
            if flags & _INDIRECT:
                if inside or not self.indirect or flags & _NEXT or not size or size % 16 or size // 16 > MAX_SIZE:
                    raise QueueError(f"queue {self.index}: an indirect table that cannot be")
                table, entries, index, inside = address, size // 16, 0, True
                first = count = seen = 0
                continue
            if flags & _WRITE:
                chain.writable.append((address, size))
            elif chain.writable:
                raise QueueError(f"queue {self.index}: a part to read behind one to write")
            else:
                chain.readable.append((address, size))
            if not flags & _NEXT:
                return chain
            index, seen = following, seen + 1
            if seen >= entries:
                raise QueueError(f"queue {self.index}: a chain that runs in a circle")

    def read(self, chain: Chain, limit: int) -> bytes:
        """What the driver says, at most `limit` bytes of it.  QueueError."""
        pieces, left = [], limit
        for address, size in chain.readable:
            if not left:
                break
            pieces.append((address, min(size, left)))
            left -= pieces[-1][1]
        try:
            return self._dma.read(*pieces[0]) if len(pieces) == 1 else self._dma.gather(pieces)
        except DmaFault as fault:
            raise QueueError(f"queue {self.index}: {fault}") from fault

    def answer(self, chain: Chain, data: bytes) -> None:
        """Writes `data` to the request's writable parts, from their start, and gives it back.  QueueError."""
        pieces, left = [], len(data)
        for address, size in chain.writable:
            if not left:
                break
            pieces.append((address, min(size, left)))
            left -= pieces[-1][1]
        try:
            if len(pieces) == 1:
                self._dma.write(pieces[0][0], data[: pieces[0][1]])
            elif pieces:
                self._dma.scatter(pieces, data[: len(data) - left])
            self._complete(chain.head, len(data) - left)
        except DmaFault as fault:
            raise QueueError(f"queue {self.index}: {fault}") from fault

    def _complete(self, head: int, written: int) -> None:
        if self._points is None or not self._points.wants(Point.COMPLETION):
            self._push(head, written)
            return
        self._points.completion(
            lambda e: self._push(e.id or 0, e.length or 0), queue=self.index, id=head, length=written
        )

    def _push(self, head: int, written: int) -> None:
        slot = self.device + 4 + 8 * (self._next_used % self.size)
        self._dma.write(slot, _USED_ELEMENT.pack(head & 0xFFFF_FFFF, written & 0xFFFF_FFFF))
        self._next_used = (self._next_used + 1) % 65536
        self._dma.write(self.device + 2, _U16.pack(self._next_used))

    # ---- notifications ---------------------------------------------------------------------

    def wants_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was answered since it was last asked (2.7.7).  QueueError."""
        try:
            before, self._signalled = self._signalled, self._next_used
            if before == self._next_used:
                return False
            if self.event_index:
                event = self._u16(self.driver + 4 + 2 * self.size)
                return (self._next_used - event - 1) % 65536 < (self._next_used - before) % 65536
            return not self._u16(self.driver) & _AVAIL_NO_INTERRUPT
        except DmaFault as fault:
            raise QueueError(f"queue {self.index}: {fault}") from fault
