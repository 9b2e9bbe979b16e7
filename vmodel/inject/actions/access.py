"""Actions on accesses and their data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from vmodel._shim import NO_PASID
from vmodel.errors import DmaFault, Reason
from vmodel.inject.action import Action, Injection, milliseconds
from vmodel.inject.predicate import OnePoint
from vmodel.inject.quantity import Number
from vmodel.pci.extcaps import Aer, Uncorrectable
from vmodel.points import AccessEvent, DmaEvent, Event, MappingEvent, Point, Proceed, Transfer

DMA = frozenset((Point.DMA_READ, Point.DMA_WRITE))
REGION_READS = frozenset((Point.MMIO_READ, Point.CONFIG_READ))
REGION_WRITES = frozenset((Point.MMIO_WRITE, Point.CONFIG_WRITE))
DATA = DMA | REGION_READS | REGION_WRITES

#: Milliseconds.
Ms = Annotated[float, BeforeValidator(milliseconds), Field(ge=0, le=3_600_000)]


class Abort(Action, name="abort"):
    """The request fails after `done` bytes: "unsupported" (Unsupported Request) or "completer" (Completer Abort)."""

    kind: Literal["unsupported", "completer"] = "unsupported"
    done: Number = 0
    points: ClassVar[frozenset[Point]] = DATA

    def run(self, at: Injection) -> bytes:
        reason = Reason.UNSUPPORTED_REQUEST if self.kind == "unsupported" else Reason.COMPLETER_ABORT
        event = at.transfer
        if event.point in REGION_WRITES:
            at.result = reason.name
            return b""
        if event.point in REGION_READS:
            at.result = reason.name
            return at.ones()
        done = min(self.done, event.size)
        if done:
            at.proceed(_cut(event, 0, done))
        raise at.fault(reason, done)


class Observe(Action, name="watch"):
    """Carries the event out unchanged; its record has the data that is written or that a read returns."""

    points: ClassVar[frozenset[Point]] = frozenset(Point)

    def run(self, at: Injection) -> bytes:
        found = at.proceed()
        at.before = at.after = found if at.event.point.is_read else at.data
        return found


class IommuFault(Action, name="fault"):
    """The IOMMU blocks the access and records a fault: "translation" (not mapped) or "permission"."""

    kind: Literal["translation", "permission"] = "translation"
    points: ClassVar[frozenset[Point]] = DMA | {Point.TRANSLATE}

    def run(self, at: Injection) -> bytes:
        fault = at.fault(Reason.NOT_MAPPED if self.kind == "translation" else Reason.PERMISSION, level=1)
        dma = at.device.dma
        if dma.endpoint is not None:
            try:
                # As hardware does, the IOMMU first reads its table entries for the device.
                pasid = NO_PASID if fault.pasid is None else fault.pasid
                dma.requester.translate([fault.iova], fault.access, pasid)
            except DmaFault as other:
                if not dma.endpoint.faulted(other):
                    raise
            dma.endpoint.faulted(fault, ask=False)
        raise fault


class Flip(Action, name="flip"):
    """Inverts `bits` bits of the data, selected by the rule's random generator."""

    bits: Number = Field(default=1, ge=1)
    points: ClassVar[frozenset[Point]] = DATA

    def run(self, at: Injection) -> bytes:
        return at.change(lambda data: flipped(data, self.bits, at.random))


def flipped(data: bytes, bits: int, generator: random.Random) -> bytes:
    """A copy of `data` with `bits` different bits inverted, or all if it has fewer."""
    new = bytearray(data)
    for bit in generator.sample(range(8 * len(data)), min(bits, 8 * len(data))):
        new[bit // 8] ^= 1 << bit % 8
    return bytes(new)


class Corrupt(Action, name="corrupt"):
    """Replaces the data by a repeated pattern (bytes in hexadecimal)."""

    pattern: Annotated[str, Field(pattern=r"^(0x)?([0-9a-fA-F]{2})+$")] = "deadbeef"
    points: ClassVar[frozenset[Point]] = DATA

    def run(self, at: Injection) -> bytes:
        return at.change(lambda data: repeated(self.pattern, len(data)))


def repeated(pattern: str, size: int) -> bytes:
    """`size` bytes of the repeated pattern."""
    unit = bytes.fromhex(pattern.removeprefix("0x"))
    return (unit * (size // len(unit) + 1))[:size]


#: The number of accesses whose data `stale` keeps.
_REMEMBERED = 4096


class Stale(Action, name="stale"):
    """Uses the data of the previous access to the same place (of those that the rule matches); zeros the first time."""

    points: ClassVar[frozenset[Point]] = DATA

    def run(self, at: Injection) -> bytes:
        event = at.transfer
        old = at.memory.get(_place(event))
        if not event.point.is_read:
            self._remember(event, event.data or b"", at.memory)
            return at.change(lambda data: (old or b"").ljust(len(data), b"\0")[: len(data)])
        fresh = at.proceed()
        self._remember(event, fresh, at.memory)
        at.before, at.after = fresh, old or bytes(len(fresh))
        return at.after

    def observe(self, event: Event, memory: dict[Any, bytes], proceed: Proceed) -> bytes:
        data = proceed(event)
        assert isinstance(event, DmaEvent | AccessEvent)
        self._remember(event, data if event.point.is_read else event.data or b"", memory)
        return data

    def _remember(self, event: Transfer, data: bytes, memory: dict[Any, bytes]) -> None:
        memory.pop(_place(event), None)
        memory[_place(event)] = data
        if len(memory) > _REMEMBERED:
            del memory[next(iter(memory))]


def _place(event: Transfer) -> tuple[object, ...]:
    within = event.pasid if isinstance(event, DmaEvent) else event.region
    return event.point, event.device, within, event.address, event.size


class Partial(Action, name="partial"):
    """Moves only the first `size` bytes, without an error: the rest stays unchanged (write) or is zeros (read)."""

    size: Number
    points: ClassVar[frozenset[Point]] = DMA

    def run(self, at: Injection) -> bytes:
        size = at.transfer.size
        moved = min(self.size, size)
        at.before, at.after = size, moved
        data = at.proceed(_cut(at.transfer, 0, moved)) if moved else b""
        return data.ljust(size, b"\0") if at.event.point.is_read else b""


class Torn(Action, name="torn"):
    """Moves the first `size` bytes now, and the rest `ms` later; a device that reads waits for the rest."""

    size: Number
    ms: Ms = 1.0
    points: ClassVar[frozenset[Point]] = DMA

    def run(self, at: Injection) -> bytes:
        event, size = at.transfer, at.transfer.size
        cut = min(self.size, size)
        at.before, at.after = size, cut
        head = at.proceed(_cut(event, 0, cut)) if cut else b""
        rest = _cut(event, cut, size)
        if cut == size:
            return head
        if event.point.is_read:
            at.wait(self.ms)
            return head + at.proceed(rest)
        at.later(lambda: at.proceed(rest), ms=self.ms)
        return b""


def _cut(event: Transfer, start: int, stop: int) -> Transfer:
    """The part of an access from byte `start` to before byte `stop`."""
    data = None if event.data is None else event.data[start:stop]
    return replace(event, address=event.address + start, size=stop - start, data=data)


class Overrun(Action, name="overrun"):
    """Writes `size` additional bytes after the data, or before it if `size` is negative."""

    size: int = Field(default=4, ge=-(1 << 24), le=1 << 24)
    pattern: Annotated[str, Field(pattern=r"^(0x)?([0-9a-fA-F]{2})+$")] = "ee"
    points: ClassVar[frozenset[Point]] = frozenset((Point.DMA_WRITE,))

    def run(self, at: Injection) -> bytes:
        event, data = at.transfer, at.transfer.data or b""
        more = repeated(self.pattern, abs(self.size))
        at.after = more
        at.proceed()
        address = event.address + (len(data) if self.size > 0 else -len(more))
        if address >= 0 and more:
            at.proceed(replace(event, address=address, size=len(more), data=more))
        return b""


class Toctou(Action, name="toctou"):
    """Writes the correct data, and changes it in memory `ms` later, or after an event: time of check, time of use."""

    ms: Ms = 1.0
    after: OnePoint | None = None
    bits: Number = Field(default=1, ge=1)
    points: ClassVar[frozenset[Point]] = frozenset((Point.DMA_WRITE,))

    def run(self, at: Injection) -> bytes:
        at.proceed()
        data = at.transfer.data or b""
        changed = flipped(data, self.bits, at.random)
        at.before, at.after = data, changed
        at.later(lambda: at.proceed(replace(at.transfer, data=changed)), ms=self.ms, after=self.after)
        return b""

    def also_armed(self) -> Sequence[Point]:
        return () if self.after is None else (self.after,)


class UseAfterUnmap(Action, name="use-after-unmap"):
    """Repeats the access `ms` later; at iommu.unmap, the device writes to the range that was just unmapped."""

    ms: Ms = 10.0
    points: ClassVar[frozenset[Point]] = DMA | {Point.IOMMU_UNMAP}

    def run(self, at: Injection) -> bytes:
        data = at.proceed()
        event = at.event
        if not isinstance(event, MappingEvent):
            at.later(at.proceed, ms=self.ms)
            return data
        size = min(event.size, 64)
        for name in event.others:
            if (device := at.engine.devices.get(name)) is not None:
                try:
                    device.dma.untapped.write(event.address, repeated("ee", size))
                except DmaFault as fault:
                    at.result = fault.reason.name
        return data


class Poison(Action, name="poison"):
    """Poisons the data of a read: a device gets a fault, the guest all ones; AER records it."""

    points: ClassVar[frozenset[Point]] = frozenset((Point.DMA_READ, Point.MMIO_READ))

    def run(self, at: Injection) -> bytes:
        report(at, uncorrectable=Uncorrectable.POISONED_TLP.mask)
        if at.event.point is Point.MMIO_READ:
            at.result = Reason.POISONED.name
            return at.ones()
        raise at.fault(Reason.POISONED)


def report(at: Injection, *, uncorrectable: int = 0, correctable: int = 0) -> None:
    """Records errors in the device's AER capability, if it has one."""
    for capability in at.device.config.capabilities:
        if isinstance(capability, Aer):
            capability.report(uncorrectable=uncorrectable, correctable=correctable)
