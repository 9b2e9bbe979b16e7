"""Page requests (7.4 to 7.7): a device's access waits for a page that the guest has yet to put into its tables.

The access waits on the thread of its device, the queue is written on that of the unit.  What else the device has to do
meanwhile, which is to send the unit's interrupt, comes to the waiting thread by `Waiting.inbox`.
"""

from __future__ import annotations

import logging
import queue
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vmodel.devices.vtd.events import Event
from vmodel.devices.vtd.regs import PageAddress, PageOffset, PageStatus, VtdRegs
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.regs import Bit, Bits, Layout
from vmodel.span import PAGE

log = logging.getLogger(__name__)

#: How long an access waits, in seconds.  On PCIe there is no limit, but nobody else waits there: here the guest cannot
#: reach the device's registers meanwhile, and a guest with one CPU that tries would not answer.
PATIENCE = 1.0
_DESCRIPTOR = struct.Struct("<4Q")
_INDICES = 512


class _Request(Layout):
    """Page request descriptor (7.4.1.1), first word."""

    TYPE = Bits(0, 7)
    PP = Bit(8)
    RID = Bits(16, 31)
    PASID = Bits(32, 51)


class _Page(Layout):
    """Its second word."""

    R = Bit(0)
    W = Bit(1)
    LPIG = Bit(2)
    PRGI = Bits(3, 11)
    ADDR = Bits(12, 63)


#: Requester, PASID or None, group index.
Key = tuple[int, int | None, int]


@dataclass
class Waiting:
    """An access that waits: its device's name, and what its thread is to do."""

    name: str
    inbox: queue.SimpleQueue[PageResponse | Callable[[], None]] = field(default_factory=queue.SimpleQueue)


class PageRequests:
    """The page request queue of a unit; `defer` runs something on the unit's thread."""

    def __init__(self, regs: VtdRegs, dma: Dma, event: Event, defer: Callable[[Callable[[], None]], None]) -> None:
        self._regs = regs
        self._dma = dma
        self._event = event
        self._defer = defer
        self._waiting: dict[Key, Waiting] = {}
        self._lock = threading.Lock()

    # ---- the device's thread ---------------------------------------------------------------

    def ask(self, source: int, request: PageRequest) -> PageResponse:
        """Puts a request into the queue and waits for its answer."""
        key = source, request.pasid, request.group_index % _INDICES
        waiting = Waiting(request.requester)
        with self._lock:
            if key in self._waiting:  # 512 are under way
                return PageResponse.FAILURE
            self._waiting[key] = waiting
        self._defer(lambda: self._enqueue(key, request, waiting))
        try:
            return self._wait(waiting)
        finally:
            with self._lock:
                del self._waiting[key]
            while not waiting.inbox.empty():
                if callable(left := waiting.inbox.get()):
                    left()

    def _wait(self, waiting: Waiting) -> PageResponse:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                item = waiting.inbox.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                log.warning("%s: the guest does not answer a page request: the access fails", waiting.name)
                return PageResponse.INVALID
            if isinstance(item, PageResponse):
                return item
            item()

    # ---- any thread ------------------------------------------------------------------------

    def run_on(self, name: str, call: Callable[[], None]) -> bool:
        """Has `call` run by a device's thread if that waits here; False: it does not."""
        with self._lock:
            waiting = next((w for w in self._waiting.values() if w.name == name), None)
            if waiting is not None:
                waiting.inbox.put(call)
            return waiting is not None

    def answer(self, source: int, pasid: int | None, index: int, response: PageResponse) -> None:
        """A page group response (7.7.1); one that nobody waits for any more is dropped."""
        with self._lock:
            for (rid, asked, group), waiting in self._waiting.items():
                if (rid & 0xFFFF, asked, group) == (source, pasid, index):
                    waiting.inbox.put(response)

    def cancel(self) -> None:
        """The unit is reset: nobody will answer."""
        with self._lock:
            for waiting in self._waiting.values():
                waiting.inbox.put(PageResponse.INVALID)

    # ---- the unit's thread -----------------------------------------------------------------

    def _enqueue(self, key: Key, request: PageRequest, waiting: Waiting) -> None:
        regs = self._regs
        size = PAGE << PageAddress(regs.PQA).PQS
        tail, head = (at & PageOffset.OFFSET.mask & size - 1 for at in (regs.PQT, regs.PQH))
        following = (tail + _DESCRIPTOR.size) % size
        if PageStatus(regs.PRS).PRO or following == head:
            # 7.4.1: the device is told to try again.
            self._raise(PageStatus.PRO.mask, waiting)
            waiting.inbox.put(PageResponse.SUCCESS)
            return
        try:
            self._dma.write((regs.PQA & PageAddress.PQA.mask) + tail, _DESCRIPTOR.pack(*_descriptor(key, request)))
        except DmaFault as fault:
            log.warning("%s: the page request queue cannot be written: %s", waiting.name, fault)
            waiting.inbox.put(PageResponse.FAILURE)
            return
        regs.PQT = following
        self._raise(PageStatus.PPR.mask, waiting)

    def _raise(self, mask: int, waiting: Waiting) -> None:
        """7.6: what comes when something is pending already makes no interrupt of its own."""
        quiet = not self._regs.PRS
        self._regs.PRS |= mask
        if quiet:
            self._event.happen(waiting.name)


def _descriptor(key: Key, request: PageRequest) -> tuple[int, int, int, int]:
    source, pasid, index = key
    first, second = _Request.TYPE.put(0, 1), _Page.LPIG.mask
    for field_, value in (
        (_Request.PP, int(pasid is not None)),
        (_Request.RID, source & 0xFFFF),
        (_Request.PASID, pasid or 0),
    ):
        first = field_.put(first, value)
    for field_, value in (
        (_Page.R, int(Access.READ in request.access)),
        (_Page.W, int(Access.WRITE in request.access)),
        (_Page.PRGI, index),
        (_Page.ADDR, request.iova // PAGE),
    ):
        second = field_.put(second, value)
    return first, second, 0, 0
