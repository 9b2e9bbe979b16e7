"""Page requests (7.4 to 7.7): a device's access waits until the guest has mapped a page.

The access waits on the thread of its device, which serves the client meanwhile.  The unit's thread writes the queue.
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

#: Seconds that an access waits at most; PCIe has no limit.
PATIENCE = 5.0
_DESCRIPTOR = struct.Struct("<4Q")
_INDICES = 512
_ALL = (1 << 64) - 1


class _PageRequestWord(Layout):
    """Page request descriptor (7.4.1.1), first word."""

    TYPE = Bits(0, 7)
    PP = Bit(8)
    RID = Bits(16, 31)
    PASID = Bits(32, 51)


class _Page(Layout):
    """Page request descriptor, second word."""

    R = Bit(0)
    W = Bit(1)
    LPIG = Bit(2)
    PRGI = Bits(3, 11)
    ADDR = Bits(12, 63)


#: (source-id, PASID or None, page request group index).
Key = tuple[int, int | None, int]


@dataclass
class Waiting:
    """An access that waits for the response to its page request."""

    device: PciDevice
    response: PageResponse = PageResponse.INVALID
    answered: threading.Event = field(default_factory=threading.Event)

    def answer(self, response: PageResponse) -> None:
        """Sets the response, and the access continues.  Any thread."""
        self.response = response
        self.answered.set()
        self.device.post(_nothing)  # wakes its thread


def _nothing() -> None:
    pass


class PageRequests:
    """The page request queue of a unit; `defer` runs a call on the unit's thread."""

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
        """Puts a device's request into the queue and waits up to PATIENCE for its response, on the device's thread.

        The device's client is served meanwhile.  Without one the thread only waits: what answers is the unit's client.
        """
        key = source, request.pasid, request.group_index % _INDICES
        waiting = Waiting(device)
        with self._lock:
            if key in self._waiting:  # all 512 indexes are in use
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
        """Delivers a page group response (7.7.1); it is dropped if its request has timed out."""
        with self._lock:
            for (rid, asked, group), waiting in self._waiting.items():
                if (rid & 0xFFFF, asked, group) == (source, pasid, index):
                    waiting.answer(response)

    def cancel(self) -> None:
        """Ends all waits with INVALID, as the unit is reset."""
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
            # 7.4.1: the unit answers with Success, so that the device tries again.
            self._raise(PageStatus.PRO.mask, waiting)
            waiting.answer(PageResponse.SUCCESS)
            return
        try:
            # A queue that passes the last address continues at 0: there are no more address bits.
            self._dma.write(
                (regs.PQA & PageAddress.PQA.mask) + tail & _ALL, _DESCRIPTOR.pack(*_descriptor(key, request))
            )
        except DmaFault as fault:
            log.warning("%s: the page request queue cannot be written: %s", waiting.device.name, fault)
            waiting.answer(PageResponse.FAILURE)
            return
        regs.PQT = following
        self._raise(PageStatus.PPR.mask, waiting)

    def _raise(self, mask: int, waiting: Waiting) -> None:
        """Sets a status bit; raises an interrupt only if none was set before (7.6)."""
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
