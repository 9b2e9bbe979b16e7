"""Page requests (7.4 to 7.7): a device's access waits for a page that the guest has yet to put into its tables.

The access waits on the thread of its device, which serves the client meanwhile; the queue is written on the unit's.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from vmodel.device import PciDevice
from vmodel.devices.vtd.events import EventRegisters
from vmodel.devices.vtd.regs import PageAddress, PageOffset, PageStatus, VtdRegs
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.logs import limited
from vmodel.regs import Bit, Bits, Layout
from vmodel.span import PAGE

log = limited(__name__)

#: How long an access waits, in seconds; on PCIe there is no limit.
PATIENCE = 5.0
_DESCRIPTOR = struct.Struct("<4Q")
_INDICES = 512


class _PageRequestWord(Layout):
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
    """An access that waits, and what becomes of it."""

    device: PciDevice
    response: PageResponse = PageResponse.INVALID
    answered: threading.Event = field(default_factory=threading.Event)

    def answer(self, response: PageResponse) -> None:
        """Any thread: the access goes on."""
        self.response = response
        self.answered.set()
        self.device.post(_nothing)  # wakes its thread


def _nothing() -> None:
    pass


class PageRequests:
    """The page request queue of a unit; `defer` runs something on the unit's thread."""

    def __init__(
        self, regs: VtdRegs, dma: Dma, event: EventRegisters, defer: Callable[[Callable[[], None]], None]
    ) -> None:
        self._regs = regs
        self._dma = dma
        self._event = event
        self._defer = defer
        self._waiting: dict[Key, Waiting] = {}
        self._lock = threading.Lock()

    # ---- the device's thread ---------------------------------------------------------------

    def ask(self, device: PciDevice, source: int, request: PageRequest) -> PageResponse:
        """Puts a request of a device into the queue and waits for its answer."""
        key = source, request.pasid, request.group_index % _INDICES
        waiting = Waiting(device)
        with self._lock:
            if key in self._waiting:  # 512 are under way
                return PageResponse.FAILURE
            self._waiting[key] = waiting
        self._defer(lambda: self._enqueue(key, request, waiting))
        courier = device.dma.courier
        try:
            event = waiting.answered
            if not (event.wait(PATIENCE) if courier is None else courier.wait(event, PATIENCE)):
                log.warning("%s: the guest does not answer a page request: the access fails", device.name)
            return waiting.response
        finally:
            with self._lock:
                del self._waiting[key]

    # ---- any thread ------------------------------------------------------------------------

    def answer(self, source: int, pasid: int | None, index: int, response: PageResponse) -> None:
        """A page group response (7.7.1); one that nobody waits for any more is dropped."""
        with self._lock:
            for (rid, asked, group), waiting in self._waiting.items():
                if (rid & 0xFFFF, asked, group) == (source, pasid, index):
                    waiting.answer(response)

    def cancel(self) -> None:
        """The unit is reset: nobody will answer."""
        with self._lock:
            for waiting in self._waiting.values():
                waiting.answer(PageResponse.INVALID)

    # ---- the unit's thread -----------------------------------------------------------------

    def _enqueue(self, key: Key, request: PageRequest, waiting: Waiting) -> None:
        regs = self._regs
        size = PAGE << PageAddress(regs.PQA).PQS
        tail, head = (at & PageOffset.OFFSET.mask & size - 1 for at in (regs.PQT, regs.PQH))
        following = (tail + _DESCRIPTOR.size) % size
        if PageStatus(regs.PRS).PRO or following == head:
            # 7.4.1: the device is told to try again.
            self._raise(PageStatus.PRO.mask, waiting)
            waiting.answer(PageResponse.SUCCESS)
            return
        try:
            self._dma.write((regs.PQA & PageAddress.PQA.mask) + tail, _DESCRIPTOR.pack(*_descriptor(key, request)))
        except DmaFault as fault:
            log.warning("%s: the page request queue cannot be written: %s", waiting.device.name, fault)
            waiting.answer(PageResponse.FAILURE)
            return
        regs.PQT = following
        self._raise(PageStatus.PPR.mask, waiting)

    def _raise(self, mask: int, waiting: Waiting) -> None:
        """7.6: what comes when something is pending already makes no interrupt of its own."""
        quiet = not self._regs.PRS
        self._regs.PRS |= mask
        if quiet:
            self._event.happen(waiting.device.name)


def _descriptor(key: Key, request: PageRequest) -> tuple[int, int, int, int]:
    source, pasid, index = key
    first, second = _PageRequestWord.TYPE.put(0, 1), _Page.LPIG.mask
    for field_, value in (
        (_PageRequestWord.PP, int(pasid is not None)),
        (_PageRequestWord.RID, source & 0xFFFF),
        (_PageRequestWord.PASID, pasid or 0),
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
