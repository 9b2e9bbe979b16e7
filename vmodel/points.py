"""Fault points: every place where an experiment may interfere, as a typed object.

What happens at a point is an `Event`, of the class that the point has.  Its source says how it is carried out:

    self.points.completion(lambda e: self._post(e.id, e.status), queue=1, id=cid, status=0)

Where a point is armed, a sink intercepts the event and has it carried out, changed or not, or drops it.  Otherwise it
is carried out as it is.  Paths that must be fast have no points of their own: taps are put in front of them while they
are armed (`vmodel.device.taps`).
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import ClassVar, TypeVar, cast


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
        """Whether an event there returns data."""
        return self in _READS

    @property
    def doc(self) -> str:
        """What happens there, in a few words."""
        return _DOCS[self]


#: What a device may do many times without Python while it is not armed.
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


def _by(*keys: str) -> dict[str, tuple[str, ...]]:
    """Metadata of a field: the keys of plans that select by it, perhaps none.  Else the key is the field's name."""
    return {"keys": keys}


@dataclass(slots=True)
class Event:
    """What happens at a point: the base of the classes of events, one for each family of points.

    It is carried out with the values that its fields have then: a sink may change them, or pass on a changed copy.
    """

    #: Where events of this class happen.
    points: ClassVar[frozenset[Point]] = frozenset()

    point: Point = field(metadata=_by())
    #: The device that does it, or to which it is done; at the IOMMU's points the IOMMU's name.
    device: str = field(default="", metadata=_by())
    #: At the IOMMU's points: the devices that it concerns.
    others: tuple[str, ...] = field(default=(), metadata=_by())
    #: What the driver is at: see `Phase`.
    phase: str = field(default="", metadata=_by())


@dataclass(slots=True, kw_only=True)
class RequestEvent(Event):
    """A device asks for `size` bytes at an IOVA."""

    #: The IOVA.
    address: int = field(metadata=_by("iova"))
    size: int
    #: The id that the IOMMU sees, the group's number, the domain's name, the PASID; None: there is none.
    requester: int | None = None
    group: int | None = None
    domain: str | None = None
    pasid: int | None = None
    #: Where the IOVA leads, past all IOTLBs; it gives None where it leads nowhere.
    gpa: Callable[[], int | None] = field(repr=False)


@dataclass(slots=True, kw_only=True)
class DmaEvent(RequestEvent):
    """A device reads or writes guest memory."""

    points = frozenset((Point.DMA_READ, Point.DMA_WRITE))
    #: What is written; None: it is a read.
    data: bytes | None = field(default=None, metadata=_by())


@dataclass(slots=True, kw_only=True)
class TranslationEvent(RequestEvent):
    """The IOMMU translates an access."""

    points = frozenset((Point.TRANSLATE,))
    #: Whether the access is a write.
    write: bool = field(metadata=_by("direction"))


@dataclass(slots=True, kw_only=True)
class AccessEvent(Event):
    """The guest, or its client, reads or writes a region."""

    #: Its VFIO index.
    region: int = field(metadata=_by())
    #: The offset in the region.
    address: int = field(metadata=_by("offset", "register"))
    size: int
    #: What is written; None: it is a read.
    data: bytes | None = field(default=None, metadata=_by())
    #: Why it has no effect; empty: it is not refused.  Only the stage LOG gets events of refused accesses.
    refused: str = field(default="", metadata=_by())


@dataclass(slots=True, kw_only=True)
class MmioEvent(AccessEvent):
    """The guest accesses a BAR."""

    points = frozenset((Point.MMIO_READ, Point.MMIO_WRITE))
    #: The number of the BAR.
    region: int = field(metadata=_by("bar"))


@dataclass(slots=True, kw_only=True)
class ConfigEvent(AccessEvent):
    """The guest, or its client, accesses config space."""

    points = frozenset((Point.CONFIG_READ, Point.CONFIG_WRITE))


@dataclass(slots=True, kw_only=True)
class InterruptEvent(Event):
    """A device raises an interrupt."""

    points = frozenset((Point.IRQ,))
    vector: int
    #: "intx", "msi" or "msix".
    kind: str


@dataclass(slots=True, kw_only=True)
class ResetEvent(Event):
    """A function is reset."""

    points = frozenset((Point.RESET,))
    #: The kind of reset, as in `ResetKind`.
    kind: str


@dataclass(slots=True, kw_only=True)
class CompletionEvent(Event):
    """A device completes a command."""

    points = frozenset((Point.COMPLETION,))
    queue: int
    #: What the completion says; `length`: the bytes written (virtio) or the command's result (NVMe).
    id: int = field(metadata=_by())
    status: int | None = None
    length: int = field(default=0, metadata=_by())
    #: The command's opcode, its first block and how many; None where commands have none.
    opcode: int | None = None
    lba: int | None = None
    blocks: int | None = field(default=None, metadata=_by())


@dataclass(slots=True, kw_only=True)
class DoorbellEvent(Event):
    """A driver rings a doorbell for new commands."""

    points = frozenset((Point.DOORBELL,))
    queue: int
    #: Which of the two rings it belongs to, where there are two.
    kind: str | None = None


@dataclass(slots=True, kw_only=True)
class MappingEvent(Event):
    """A guest maps or unmaps `size` bytes at an IOVA."""

    points = frozenset((Point.IOMMU_MAP, Point.IOMMU_UNMAP))
    domain: str
    #: The IOVA.
    address: int = field(metadata=_by("iova"))
    size: int


@dataclass(slots=True, kw_only=True)
class InvalidationEvent(Event):
    """IOTLBs or context entries are invalidated."""

    points = frozenset((Point.INVALIDATE,))
    #: What is invalidated.
    kind: str
    #: The domain and the range of IOVAs that it is limited to; None: no limit.
    domain: str | None = None
    address: int | None = field(default=None, metadata=_by("iova"))
    size: int | None = None


@dataclass(slots=True, kw_only=True)
class ConnectionEvent(Event):
    """A client connects to the device, or has released it."""

    points = frozenset((Point.CONNECTION, Point.UNPLUG))


#: The class that each point's events have.
EVENTS: dict[Point, type[Event]] = {
    point: kind
    for kind in (
        DmaEvent,
        TranslationEvent,
        MmioEvent,
        ConfigEvent,
        InterruptEvent,
        ResetEvent,
        CompletionEvent,
        DoorbellEvent,
        MappingEvent,
        InvalidationEvent,
        ConnectionEvent,
    )
    for point in kind.points
}


def keys_of(kind: type[Event]) -> dict[str, str]:
    """The keys of plans that select by a class's fields, with the name of the field."""
    return {key: f.name for f in fields(kind) for key in f.metadata.get("keys", (f.name,))}


#: What has data or a size to change.
Transfer = DmaEvent | AccessEvent

#: Carries an event out; returns the data of a read, else b"".
Proceed = Callable[[Event], bytes]
#: Intercepts an event before it is carried out, and carries it out or not; returns the data of a read, else b"".
Sink = Callable[[Event, Proceed], bytes]
_E = TypeVar("_E", bound=Event)


class TapStage(enum.IntEnum):
    """Who intercepts events, in the order in which an event passes them."""

    #: Logs them, and changes nothing: sees what the guest or the device asked for, and what came of it.
    LOG = 0
    #: Injects faults.
    FAULTS = 1


class Phase(enum.Enum):
    """The driver's phase, derived from its writes to config space; SUSPEND: from what the guest says."""

    #: From a reset until the driver has bus mastering, and MSI or MSI-X where there are, switched on.
    PROBE = "probe"
    RUNNING = "running"
    #: It has switched bus mastering off again; until a reset, or until it is on again.
    REMOVE = "remove"
    #: The guest suspends and resumes its devices.  Nothing on the bus says so: see `Points.suspended`.
    SUSPEND = "suspend"


def _in_turn(outer: tuple[frozenset[Point], Sink], inner: tuple[frozenset[Point], Sink]) -> Sink:
    """A sink that passes an event to the outer one, which carries it out through the inner one."""
    first, then = outer[1], inner[1]

    def through(event: Event, proceed: Proceed) -> bytes:
        return then(event, proceed) if event.point in inner[0] else proceed(event)

    def sink(event: Event, proceed: Proceed) -> bytes:
        if event.point not in outer[0]:
            return through(event, proceed)
        return first(event, lambda passed: through(passed, proceed))

    return sink


class Points:
    """The fault points of one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        #: Never SUSPEND: this goes on meanwhile.
        self.phase = Phase.PROBE
        #: Whether the guest suspends or resumes its devices, as one of its scripts has said (`vmodel-host suspend`).
        self.suspended = False
        #: Whether each access or command must be an event: then fast paths that have no points are not taken.
        self.detailed = False
        #: The points at which a sink intercepts events.
        self.wanted: frozenset[Point] = frozenset()
        #: Held by whoever arms points and taps the device accordingly.
        self.lock = threading.Lock()
        self._sink: Sink | None = None
        self._stages: dict[TapStage, tuple[frozenset[Point], Sink]] = {}

    def arm(self, wanted: Collection[Point], sink: Sink | None, stage: TapStage = TapStage.FAULTS) -> None:
        """`sink` intercepts events at the points `wanted` from now on, in place of the sink that `stage` had before.

        Hold `lock`.  No event passes a sink of another stage meanwhile.
        """
        self._stages.pop(stage, None)
        if sink is not None and wanted:
            self._stages[stage] = frozenset(wanted), sink
        stages = [self._stages[stage] for stage in sorted(self._stages)]
        # First the sink, which carries out an event that it does not want.
        self._sink = stages[0][1] if len(stages) == 1 else _in_turn(*stages) if stages else None
        self.wanted = frozenset().union(*(points for points, _ in stages))
        self.detailed = not _DETAILS.isdisjoint(self.wanted)

    def of(self, stage: TapStage) -> frozenset[Point]:
        """The points at which the sink of a stage intercepts events; none: it has no sink."""
        return self._stages[stage][0] if stage in self._stages else frozenset()

    def armed(self, point: Point) -> bool:
        """Whether a sink intercepts events there.  A model with a faster path for unarmed points asks first."""
        return self._sink is not None and point in self.wanted

    def __call__(self, event: _E, proceed: Callable[[_E], bytes]) -> bytes:
        """Carries out an event by `proceed`, through the sink if its point is armed; returns a read's data."""
        sink = self._sink
        if sink is None or event.point not in self.wanted:
            return proceed(event)
        event.device = self.device
        event.phase = self._now.value
        # A sink hands on copies of the event's own class (dataclasses.replace).
        return sink(event, cast(Proceed, proceed))

    def at(self, event: _E, proceed: Callable[[_E], object]) -> None:
        """The same for an event that returns no data."""

        def carry_out(event: _E) -> bytes:
            proceed(event)
            return b""

        self(event, carry_out)

    @property
    def _now(self) -> Phase:
        return Phase.SUSPEND if self.suspended else self.phase

    def refused(self, event: AccessEvent, answer: bytes) -> None:
        """Shows an access that has no effect, and reads as `answer`, to the stage LOG: no rule counts or changes it."""
        points, sink = self._stages.get(TapStage.LOG, (frozenset[Point](), None))
        if sink is not None and event.point in points:
            event.device, event.phase = self.device, self._now.value
            sink(event, lambda _: answer)

    def completion(
        self,
        proceed: Callable[[CompletionEvent], object],
        *,
        queue: int,
        id: int,
        status: int | None = None,
        length: int = 0,
        opcode: int | None = None,
        lba: int | None = None,
        blocks: int | None = None,
    ) -> None:
        """Completes a command: `proceed` writes the completion, with the event's `id`, `status` and `length`."""
        said = CompletionEvent(
            Point.COMPLETION,
            queue=queue,
            id=id,
            status=status,
            length=length,
            opcode=opcode,
            lba=lba,
            blocks=blocks,
        )
        self.at(said, proceed)

    def doorbell(self, proceed: Callable[[DoorbellEvent], object], *, queue: int, kind: str | None = None) -> None:
        """Handles a doorbell: `proceed` looks at the event's `queue`."""
        self.at(DoorbellEvent(Point.DOORBELL, queue=queue, kind=kind), proceed)

    def config_changed(self, *, master: bool, interrupts: bool) -> None:
        """Derives the driver's phase from bus mastering and from whether MSI or MSI-X is on (True: it has neither)."""
        if master and interrupts:
            self.phase = Phase.RUNNING
        elif master and self.phase is Phase.REMOVE:
            self.phase = Phase.PROBE
        elif not master and self.phase is Phase.RUNNING:
            self.phase = Phase.REMOVE

    def reset(self) -> None:
        """Records a reset of the function: the driver's phase is PROBE again."""
        self.phase = Phase.PROBE

    def begin(self) -> None:
        """A driver is expected from now on: if one has been removed, the next accesses are those of a probe.

        Nothing on the bus says so: the first accesses of a probe look like the last ones of a removal.
        """
        self.suspended = False
        if self.phase is Phase.REMOVE:
            self.phase = Phase.PROBE
