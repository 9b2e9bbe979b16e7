"""Actions that drop, repeat, delay or reorder events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from vmodel.errors import Reason
from vmodel.inject.action import Action, Injection, milliseconds
from vmodel.inject.actions.access import REGION_READS, Ms
from vmodel.inject.predicate import OnePoint
from vmodel.points import Point

#: The longest delay of a client, in ms: QEMU gives up a device that does not answer for 5 s.
LONGEST_WAIT = 4000.0

Wait = Annotated[float, BeforeValidator(milliseconds), Field(ge=0, le=LONGEST_WAIT)]

#: Posted events: nothing waits for their completion, so they may be lost, repeated or late.
POSTED = frozenset(
    (
        Point.DMA_WRITE,
        Point.MMIO_WRITE,
        Point.CONFIG_WRITE,
        Point.IRQ,
        Point.RESET,
        Point.COMPLETION,
        Point.DOORBELL,
        Point.INVALIDATE,
    )
)
_MAPS = frozenset((Point.IOMMU_MAP, Point.IOMMU_UNMAP))


class Drop(Action, name="drop"):
    """Drops the event without an error.  A read gets no answer: a device has a timeout, the guest reads all ones."""

    points: ClassVar[frozenset[Point]] = POSTED | _MAPS | REGION_READS | {Point.DMA_READ}

    def run(self, at: Injection) -> bytes:
        at.before = at.data
        if at.event.point is Point.DMA_READ:
            raise at.fault(Reason.COMPLETION_TIMEOUT)
        at.result = "dropped"
        return at.ones() if at.event.point in REGION_READS else b""


class Duplicate(Action, name="duplicate"):
    """Repeats the event, at once or `ms` later; a read returns the data of the second time."""

    ms: Ms = 0.0
    points: ClassVar[frozenset[Point]] = POSTED | REGION_READS | {Point.DMA_READ}

    def run(self, at: Injection) -> bytes:
        at.before = at.proceed()
        if at.event.point.is_read:
            at.after = at.proceed()
            return at.after
        at.before = at.after = at.data
        if self.ms:
            at.later(at.proceed, ms=self.ms)
        else:
            at.proceed()
        return b""


class Delay(Action, name="delay"):
    """Blocks the device, and a guest that waits for it, before the event; the order of events stays the same."""

    ms: Wait
    points: ClassVar[frozenset[Point]] = frozenset(Point)

    def run(self, at: Injection) -> bytes:
        at.wait(self.ms)
        return at.proceed()


class Late(Action, name="late"):
    """Delays the event by `ms` while the device continues, so that later events overtake it."""

    ms: Ms
    points: ClassVar[frozenset[Point]] = POSTED | {Point.IOMMU_UNMAP}

    def run(self, at: Injection) -> bytes:
        at.before = at.data
        at.result = "later"
        at.later(at.proceed, ms=self.ms)
        return b""


class Reorder(Action, name="reorder"):
    """Holds the event until after the next event at the point `after`, by default its own point."""

    after: OnePoint | None = None
    points: ClassVar[frozenset[Point]] = POSTED - {Point.RESET}

    def run(self, at: Injection) -> bytes:
        at.before = at.data
        at.result = "later"
        at.later(at.proceed, after=self.after or at.event.point)
        return b""

    def also_armed(self) -> Sequence[Point]:
        return () if self.after is None else (self.after,)
