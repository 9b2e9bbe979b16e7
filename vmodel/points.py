"""Fault points: every place where an experiment may interfere, as a typed object.

What happens at a point is an `Event`.  Whoever announces one says how it is carried out, and gets back what came of it:

    self.points.completion(lambda e: self._post(e.id, e.status), queue=1, id=cid, status=0)

At first nobody listens, and the event is carried out as it is.  Paths that must be fast do not even announce: the
intercepting ones are put in their place when somebody wants to hear (`vmodel.device.taps`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any


class Point(enum.Enum):
    """The points; the values are what plans call them."""

    DMA_READ = "dma.read"
    DMA_WRITE = "dma.write"
    TRANSLATE = "translate"
    IOMMU_MAP = "iommu.map"
    IOMMU_UNMAP = "iommu.unmap"
    INVALIDATE = "invalidate"
    MMIO_READ = "mmio.read"
    MMIO_WRITE = "mmio.write"
    CONFIG_READ = "config.read"
    CONFIG_WRITE = "config.write"
    IRQ = "irq"
    RESET = "reset"
    COMPLETION = "completion"
    DOORBELL = "doorbell"
    CONNECTION = "connection"
    UNPLUG = "unplug"

    @property
    def is_read(self) -> bool:
        """Whether carrying it out gives data."""
        return self in _READS

    @property
    def doc(self) -> str:
        """What happens there."""
        return _DOCS[self]


#: What a device may do many times without Python, if nobody asks.
_DETAILS = frozenset((Point.DMA_READ, Point.DMA_WRITE, Point.TRANSLATE, Point.COMPLETION))
_READS = frozenset((Point.DMA_READ, Point.MMIO_READ, Point.CONFIG_READ))
_DOCS = {
    Point.DMA_READ: "a device reads guest memory (or makes an atomic access)",
    Point.DMA_WRITE: "a device writes guest memory",
    Point.TRANSLATE: "the IOMMU translates such an access",
    Point.IOMMU_MAP: "a guest maps memory through virtio-iommu",
    Point.IOMMU_UNMAP: "a guest unmaps memory through virtio-iommu",
    Point.INVALIDATE: "IOTLBs or context entries are invalidated, by a guest's VT-d or virtio-iommu",
    Point.MMIO_READ: "the guest reads a BAR",
    Point.MMIO_WRITE: "the guest writes a BAR",
    Point.CONFIG_READ: "the guest, or QEMU, reads config space",
    Point.CONFIG_WRITE: "the guest, or QEMU, writes config space",
    Point.IRQ: "a device raises an interrupt",
    Point.RESET: "a function is reset",
    Point.COMPLETION: "a device completes a command",
    Point.DOORBELL: "a driver rings a doorbell for new commands",
    Point.CONNECTION: "a client (QEMU) connects to a device",
    Point.UNPLUG: "a client has released a device: unplugged, or gone",
}


@dataclass(slots=True)
class Event:
    """What happens at a point.  Fields that a point has no use for are None.

    What is carried out is what the event says then: who comes between may change it, or hand on a changed copy.
    """

    point: Point
    #: The device that does it, or to which it is done; at the IOMMU's points the IOMMU's name.
    device: str = ""
    #: At the IOMMU's points: the devices that it concerns.
    others: tuple[str, ...] = ()
    #: Of DMA: the id that the IOMMU sees, the group's number, the domain's name, the PASID.
    requester: int | None = None
    group: int | None = None
    domain: str | None = None
    pasid: int | None = None
    #: The IOVA, or the offset in a region.
    address: int | None = None
    size: int | None = None
    #: What is written, or would be read.
    data: bytes | None = None
    region: int | None = None
    vector: int | None = None
    #: Whether a translation is for a write.
    write: bool | None = None
    #: What a reset is called, or what an invalidation takes away.
    kind: str | None = None
    #: Of a command: its queue, opcode, first block and how many, and what its completion says.  `length` is the bytes
    #: written (virtio) or the command's result (NVMe).
    queue: int | None = None
    opcode: int | None = None
    lba: int | None = None
    blocks: int | None = None
    id: int | None = None
    status: int | None = None
    length: int | None = None
    #: What the driver is at: see `Phase`.
    phase: str = ""
    #: Where a DMA address leads, past all IOTLBs; None: nowhere.
    gpa: Callable[[], int | None] | None = field(default=None, repr=False)


#: Carries an event out; what a read gives, b"" elsewhere.
Proceed = Callable[[Event], bytes]
#: Hears of an event before it is carried out, and has it carried out, or not.
Sink = Callable[[Event, Proceed], bytes]


class Phase(enum.Enum):
    """What a driver is at, as told by what it does to config space."""

    #: From a reset until the driver has bus mastering, and MSI or MSI-X where there are, switched on.
    PROBE = "probe"
    RUNNING = "running"
    #: It has switched bus mastering off again; until a reset, or until it is on again.
    REMOVE = "remove"


class Points:
    """What one device announces."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.phase = Phase.PROBE
        #: Whether somebody wants to hear of each access or command: ways that do not tell of them are closed.
        self.detailed = False
        self._wanted: Collection[Point] = ()
        self._sink: Sink | None = None

    def arm(self, wanted: Collection[Point], sink: Sink | None) -> None:
        """`sink` hears of the points `wanted` from now on; nobody of the others."""
        self._sink = None
        self._wanted = frozenset(wanted)
        self.detailed = sink is not None and not _DETAILS.isdisjoint(wanted)
        self._sink = sink

    def wants(self, point: Point) -> bool:
        """Whether somebody listens: a model that has a faster way, or much to tell, asks first."""
        return self._sink is not None and point in self._wanted

    def __call__(self, event: Event, proceed: Proceed) -> bytes:
        """Announces an event and has it carried out; what a read gives."""
        sink = self._sink
        if sink is None or event.point not in self._wanted:
            return proceed(event)
        event.device = self.device
        event.phase = self.phase.value
        return sink(event, proceed)

    def at(self, point: Point, proceed: Callable[[Event], object], **fields: Any) -> None:
        """Announces what gives no data; `fields` are the event's."""

        def carry_out(event: Event) -> bytes:
            proceed(event)
            return b""

        self(Event(point, **fields), carry_out)

    def completion(self, proceed: Callable[[Event], object], **fields: Any) -> None:
        """A command is completed: `proceed` does so with the event's `id`, `status` and `length`."""
        self.at(Point.COMPLETION, proceed, **fields)

    def doorbell(self, proceed: Callable[[Event], object], **fields: Any) -> None:
        """A doorbell has been rung: `proceed` looks at the event's `queue`."""
        self.at(Point.DOORBELL, proceed, **fields)

    def told(self, *, master: bool, interrupts: bool) -> None:
        """Config space has changed: bus mastering, and whether MSI or MSI-X is on (True where there are none)."""
        if master and interrupts:
            self.phase = Phase.RUNNING
        elif master and self.phase is Phase.REMOVE:
            self.phase = Phase.PROBE
        elif not master and self.phase is Phase.RUNNING:
            self.phase = Phase.REMOVE

    def reset(self) -> None:
        """The function was reset: the driver begins anew."""
        self.phase = Phase.PROBE
