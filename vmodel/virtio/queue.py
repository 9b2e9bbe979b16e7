"""Split virtqueues, the device's side (VIRTIO 1.3, 2.7).  The driver writes their contents: they are not trusted."""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass, field

from vmodel.dma import Dma
from vmodel.errors import DmaFault, GuestError
from vmodel.points import Point, Points

#: Most entries of a queue (2.7).
MAX_SIZE = 32768
#: Most bytes of a chain (2.7.5).
MAX_BYTES = 1 << 32
#: Descriptors that a turn reads, exceeded by at most one chain: one or two milliseconds.
TURN = 1024

_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_AVAIL_NO_INTERRUPT = 1
#: Descriptors that are read by one DMA access.
_AHEAD = 4
_DESCRIPTOR = struct.Struct("<QIHH")
_U16 = struct.Struct("<H")
_USED_ELEMENT = struct.Struct("<II")


class QueueError(GuestError):
    """The driver has violated the queue's rules: the device needs a reset (2.1.2)."""


@dataclass(slots=True)
class Chain:
    """A request: its buffers as (address, size), first those that the device reads, then those that it writes."""

    head: int
    #: The queue's `life` when the request was popped.
    life: int = 0
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
    """One queue.  The transport sets its addresses while it is not enabled.

    The driver may add requests endlessly, so they are served in turns.  Between `begin` and `end`, `pop` returns
    requests as far as a budget of descriptors allows; `end` returns whether another turn is due.
    """

    def __init__(self, dma: Dma, index: int, max_size: int, points: Points | None = None) -> None:
        if not 0 < max_size <= MAX_SIZE or max_size & (max_size - 1):
            raise ValueError(f"a queue has a power of two up to {MAX_SIZE} entries, not {max_size}")
        self.index = index
        self.max_size = max_size
        self._dma = dma
        self._points = points
        #: Counts resets: a request that was popped in an earlier life is not answered any more.
        self.life = 0
        #: Descriptors left in this turn (None: outside a turn, without a limit), and the life in which it began.
        self._budget: int | None = None
        self._turn_life = 0
        self.reset()

    def reset(self) -> None:
        """Resets the queue, as a device reset does.  Chains that were popped before are not answered any more."""
        self.life += 1
        self.size = self.max_size
        self.descriptors = self.driver = self.device = 0
        self.enabled = False
        self.vector = 0xFFFF
        self.event_index = self.indirect = False
        self._next_avail = self._next_used = 0
        self._signalled = 0
        #: Heads read from the available ring and not popped yet, the next one last.
        self._heads: list[int] = []
        #: Whether another turn is due or has been deferred.
        self.due = False

    def enable(self, *, event_index: bool, indirect: bool) -> None:
        """Enables the queue with the negotiated features.  QueueError: its addresses or size are invalid (2.7)."""
        if not 0 < self.size <= self.max_size or self.size & (self.size - 1):
            raise QueueError(f"queue {self.index}: size {self.size}")
        if self.descriptors % 16 or self.driver % 2 or self.device % 4:
            raise QueueError(f"queue {self.index}: its rings are not aligned")
        parts = (self.descriptors, 16 * self.size), (self.driver, 6 + 2 * self.size), (self.device, 6 + 8 * self.size)
        if any(address + size > 1 << 64 for address, size in parts):
            raise QueueError(f"queue {self.index}: a ring extends past the last address")
        self.event_index, self.indirect = event_index, indirect
        self.enabled = True

    # ---- turns -----------------------------------------------------------------------------

    def begin(self) -> bool:
        """Begins a turn.

        Returns False inside another turn, which waits for a message to the client; then a further turn is due.
        """
        if self._budget is not None:
            self.due = True
            return False
        self._budget, self._turn_life, self.due = TURN, self.life, False
        return True

    def end(self) -> bool:
        """Ends the turn; returns whether another one is due."""
        self._budget = None
        return self.due

    def charge(self, descriptors: int) -> None:
        """Takes `descriptors` from this turn's budget."""
        if self._budget is not None:
            self._budget -= descriptors

    @property
    def spent(self) -> bool:
        """Whether this turn's budget is used up, or a reset has ended the turn; then another turn is due."""
        if self._budget is None or (self._budget > 0 and self._turn_life == self.life):
            return False
        self.due = True
        return True

    # ---- requests --------------------------------------------------------------------------

    @property
    def progress(self) -> tuple[int, int]:
        """The device's (available, used) ring indexes, so that the shim can serve the queue, too."""
        return self._next_avail, self._next_used

    @progress.setter
    def progress(self, indexes: tuple[int, int]) -> None:
        self._next_avail, self._next_used = indexes
        self._heads = []

    def pop(self) -> Chain | None:
        """The next request; None: there is none, or this turn's budget is used up.  QueueError."""
        try:
            return None if self.spent else self._pop()
        except DmaFault as fault:
            raise QueueError(f"queue {self.index}: {fault}") from fault

    def _pop(self) -> Chain | None:
        # Memory without a file is read by message, and meanwhile the driver may reset the device.
        life = self.life
        if not self._heads:
            available = self._u16(self.driver + 2)
            if available == self._next_avail:
                if self.event_index:
                    # Ask for a notification of the next request, then check again: it may have been added meanwhile
                    # (2.7.10).
                    self._dma.write(self.device + 4 + 8 * self.size, _U16.pack(self._next_avail))
                    available = self._u16(self.driver + 2)
                if available == self._next_avail:
                    return None
            heads = self._between(self._next_avail, available)
            if life != self.life:
                return None
            self._heads = heads
        chain = self._walk(self._heads[-1])
        if life != self.life:
            return None
        self._heads.pop()
        self._next_avail = (self._next_avail + 1) % 65536
        return chain

    def _between(self, first: int, end: int) -> list[int]:
        """The heads at [first, end) of the available ring, the last one first."""
        count = (end - first) % 65536
        if count > self.size:
            raise QueueError(f"queue {self.index}: {count} requests are more than the queue's size")
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
        """Reads the chain that begins at descriptor `head`, through an indirect table if there is one (2.7.5.3)."""
        chain = Chain(head, self.life)
        table, entries, index, inside = self.descriptors, self.size, head, False
        # Descriptors of a chain are mostly adjacent: a few are read at once.
        first = count = length = total = 0
        data = b""
        while True:  # at most `size` descriptors, and one indirect table
            if not first <= index < first + count:
                if index >= entries:
                    raise QueueError(f"queue {self.index}: descriptor {index} of {entries}")
                first, count = index, min(_AHEAD, entries - index)
                data = self._dma.read(table + 16 * index, 16 * count)
            address, size, flags, following = _DESCRIPTOR.unpack_from(data, 16 * (index - first))
            if address + size > 1 << 64:
                raise QueueError(f"queue {self.index}: {size:#x} bytes at {address:#x} extend past the last address")
            if flags & _INDIRECT:
                if inside or not self.indirect or flags & _NEXT or not size or size % 16:
                    raise QueueError(f"queue {self.index}: an invalid indirect table")
                table, entries, index, inside = address, size // 16, 0, True
                first = count = 0
                continue
            length, total = length + 1, total + size
            if length > self.size or total > MAX_BYTES:  # 2.7.5.3.1, 2.7.5
                raise QueueError(f"queue {self.index}: a chain is too long, or a loop")
            if flags & _WRITE:
                chain.writable.append((address, size))
            elif chain.writable:
                raise QueueError(f"queue {self.index}: a readable descriptor after a writable one")
            else:
                chain.readable.append((address, size))
            if not flags & _NEXT:
                self.charge(length)
                return chain
            index = following

    def read(self, chain: Chain, limit: int) -> bytes:
        """The contents of the chain's readable buffers, at most `limit` bytes.  QueueError."""
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
        """Writes `data` to the chain's writable buffers and puts the chain on the used ring.  QueueError.

        Data that does not fit is cut off.  Does nothing if the queue was reset since the chain was popped.
        """
        if chain.life != self.life:
            return
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
            if chain.life == self.life:
                self._complete(chain, len(data) - left)
        except DmaFault as fault:
            raise QueueError(f"queue {self.index}: {fault}") from fault

    def _complete(self, chain: Chain, written: int) -> None:
        if self._points is None or not self._points.armed(Point.COMPLETION):
            self._push(chain.life, chain.head, written)
            return
        self._points.completion(
            lambda e: self._push(chain.life, e.id, e.length),
            queue=self.index,
            id=chain.head,
            length=written,
        )

    def _push(self, life: int, head: int, written: int) -> None:
        if life != self.life:  # a completion that was delayed until after a reset
            return
        slot = self.device + 4 + 8 * (self._next_used % self.size)
        self._dma.write(slot, _USED_ELEMENT.pack(head & 0xFFFF_FFFF, written & 0xFFFF_FFFF))
        if life == self.life:
            self._next_used = (self._next_used + 1) % 65536
            self._dma.write(self.device + 2, _U16.pack(self._next_used))

    # ---- notifications ---------------------------------------------------------------------

    def wants_interrupt(self) -> bool:
        """Whether the driver wants an interrupt for the requests answered since the last call (2.7.7).  QueueError."""
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
