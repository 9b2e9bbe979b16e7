"""The taps of a device: DMA, regions and interrupts that pass each event to the sink before it happens.

`tap` puts them in front of the plain paths, or takes them away.  A device without a tap pays nothing: it looks its
paths up in any case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Required, TypedDict

from vmodel._shim import EXIT_ON_READ, EXIT_ON_WRITE, EXIT_REFUSED, FunctionRegions
from vmodel._shim import key as access_key
from vmodel.device.backend import VfioBackend
from vmodel.device.regions import Regions
from vmodel.dma import Buffer, Dma
from vmodel.errors import DmaFault
from vmodel.points import (
    AccessEvent,
    ConfigEvent,
    DmaEvent,
    InterruptEvent,
    MmioEvent,
    Point,
    Points,
    Sink,
    TapStage,
    TranslationEvent,
)
from vmodel.vfio_user.wire import Region

_DMA = frozenset((Point.DMA_READ, Point.DMA_WRITE, Point.TRANSLATE))
_ACCESS: dict[Point, type[AccessEvent]] = {point: kind for kind in (MmioEvent, ConfigEvent) for point in kind.points}


class _Request(TypedDict, total=False):
    """Fields of a RequestEvent."""

    address: Required[int]
    size: Required[int]
    pasid: Required[int | None]
    gpa: Required[Callable[[], int | None]]
    requester: int | None
    group: int
    domain: str | None


class DmaTap:
    """Passes each access of a device to its points.  An access of several pieces is several events.

    The untapped Dma carries an event out.  So a delayed event still works after disarming.
    """

    def __init__(self, points: Points) -> None:
        self._points = points

    def read(self, dma: Dma, iova: int, size: int) -> bytes:
        """Passes a read of `size` bytes to dma.read, and its translation to translate."""
        if not size:
            return dma.read(iova, size)

        def carry_out(event: DmaEvent) -> bytes:
            self._translate(dma, event, write=False)
            return dma.read(event.address, event.size)

        return self._points(DmaEvent(Point.DMA_READ, **_request(dma, iova, size)), carry_out)

    def readinto(self, dma: Dma, iova: int, buffer: bytearray | memoryview) -> None:
        """As `read`; the data goes to `buffer`."""
        with memoryview(buffer) as whole, whole.cast("B") as flat:
            flat[:] = self.read(dma, iova, len(flat))

    def write(self, dma: Dma, iova: int, data: Buffer) -> None:
        """Passes a write to dma.write, and its translation to translate."""
        # A copy: a delayed write must not see what the model puts into its buffer meanwhile.
        copy = bytes(data)
        if not copy:
            return dma.write(iova, copy)

        def carry_out(event: DmaEvent) -> bytes:
            self._translate(dma, event, write=True)
            dma.write(event.address, event.data or b"")
            return b""

        self._points(DmaEvent(Point.DMA_WRITE, data=copy, **_request(dma, iova, len(copy))), carry_out)
        return None

    def gather_into(self, dma: Dma, pieces: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Passes each (iova, size) piece to the points as a read of its own."""
        self._each(dma, pieces, buffer, write=False)

    def scatter(self, dma: Dma, pieces: Sequence[tuple[int, int]], data: memoryview) -> None:
        """Passes each (iova, size) piece to the points as a write of its own."""
        self._each(dma, pieces, data, write=True)

    @contextmanager
    def view(self, dma: Dma, iova: int, size: int, *, writable: bool) -> Iterator[memoryview]:
        """A copy, written back at the end: accesses to memory itself could not be intercepted."""

        def carry_out(event: DmaEvent) -> bytes:
            self._translate(dma, event, write=writable)
            with dma.view(event.address, event.size, writable=writable) as there:
                return bytes(there)

        copy = bytearray(self._points(DmaEvent(Point.DMA_READ, **_request(dma, iova, size)), carry_out))
        with memoryview(copy) as shown:
            yield shown if writable else shown.toreadonly()
        if writable:
            self.write(dma, iova, copy)

    def atomic(self, dma: Dma, iova: int, op: int, size: int, operand: int, compare: int) -> int:
        """Passes an atomic operation to dma.read, as it returns the value before."""

        def carry_out(event: DmaEvent) -> bytes:
            self._translate(dma, event, write=True)
            return dma.atomic(event.address, op, size, operand, compare).to_bytes(size, "little")

        return int.from_bytes(self._points(DmaEvent(Point.DMA_READ, **_request(dma, iova, size)), carry_out), "little")

    def _translate(self, dma: Dma, event: DmaEvent, *, write: bool) -> None:
        """Passes the translation of an access to the points, where an IOMMU translates it."""
        if event.group is not None and self._points.armed(Point.TRANSLATE):
            about = _request(dma, event.address, event.size)
            self._points(TranslationEvent(Point.TRANSLATE, write=write, **about), lambda _: b"")

    def _each(self, dma: Dma, pieces: Sequence[tuple[int, int]], flat: memoryview, *, write: bool) -> None:
        at = 0
        for iova, size in pieces:
            try:
                if write:
                    self.write(dma, iova, bytes(flat[at : at + size]))
                else:
                    flat[at : at + size] = self.read(dma, iova, size)
            except DmaFault as fault:
                fault.done += at
                raise
            at += size


def _request(dma: Dma, iova: int, size: int) -> _Request:
    """The fields of an event for an access by `dma`."""
    about: _Request = {"address": iova, "size": size, "pasid": dma.pasid, "gpa": lambda: iova}
    endpoint = dma.endpoint
    if endpoint is not None:
        about["requester"] = endpoint.requester_id
        if (group := endpoint.group) is not None:
            domain = group.domain_of(dma.pasid)
            about["group"] = group.number
            about["domain"] = None if domain is None else domain.name
            about["gpa"] = lambda: None if domain is None else domain.iova_to_phys(iova)
    return about


class TappedRegions:
    """Passes accesses by the guest to the points; the shim carries out none of them by itself.

    Refused accesses exit as well while the stage LOG wants the region's, with the key 0.
    """

    def __init__(self, regions: Regions, function: FunctionRegions, points: Points, wanted: Collection[Point]) -> None:
        self._regions = regions
        self._function = function
        self._points = points
        self._wanted = wanted

    def read(self, key: int, region: int, offset: int, count: int) -> int | bytes:
        """Passes a read of `count` bytes to mmio.read or config.read, if that is armed.  See Regions.read."""
        point = Point.CONFIG_READ if region == Region.CONFIG else Point.MMIO_READ
        if not key and (answer := self._refused(point, region, offset, count, None)):
            return int.from_bytes(answer, "little") if count <= 8 else answer
        if point not in self._wanted:
            return self._regions.read(key, region, offset, count)
        data = self._points(_ACCESS[point](point, region=region, address=offset, size=count), self._read)
        return int.from_bytes(data, "little") if count <= 8 else data

    def write(self, key: int, region: int, offset: int, count: int, value: int | bytes) -> None:
        """Passes a write to mmio.write or config.write, if that is armed.  See Regions.write."""
        point = Point.CONFIG_WRITE if region == Region.CONFIG else Point.MMIO_WRITE
        data = value.to_bytes(count, "little") if isinstance(value, int) else value
        if not key and self._refused(point, region, offset, count, data):
            return
        if point not in self._wanted:
            self._regions.write(key, region, offset, count, value)
            return
        self._points(_ACCESS[point](point, region=region, address=offset, size=count, data=data), self._write)

    def _refused(self, point: Point, region: int, offset: int, count: int, data: bytes | None) -> bytes:
        """If an access is refused, shows it to the points and returns what it reads; else empty."""
        refusal = self._function.refusal(region, offset, count)
        if refusal is None:
            return b""
        why, answer = refusal
        event = _ACCESS[point](point, region=region, address=offset, size=count, data=data, refused=why)
        self._points.refused(event, answer)
        return answer

    def _read(self, event: AccessEvent) -> bytes:
        key = access_key(event.region, event.address, event.size)
        value = self._regions.read(key, event.region, event.address, event.size)
        return value.to_bytes(event.size, "little") if isinstance(value, int) else value

    def _write(self, event: AccessEvent) -> bytes:
        data = event.data or b""
        key = access_key(event.region, event.address, len(data))
        value = int.from_bytes(data, "little") if len(data) <= 8 else data
        self._regions.write(key, event.region, event.address, len(data), value)
        return b""


def tap(backend: VfioBackend, wanted: Collection[Point], sink: Sink | None, stage: TapStage = TapStage.FAULTS) -> None:
    """Arms the points `wanted` of a device: `sink` gets their events.  Without a sink it disarms them.  Any thread.

    Each stage has a sink of its own: what another stage has armed stays armed.
    """
    points = backend.points
    with points.lock:
        points.arm(wanted, sink, stage)
        armed = points.wanted
        backend.dma.tap(DmaTap(points) if armed & _DMA else None)
        backend.irqs.tap = functools.partial(_interrupt, points) if Point.IRQ in armed else None
        _tap_regions(backend, armed)


def _interrupt(points: Points, carry_out: Callable[[int], None], kind: str, vector: int) -> None:
    points.at(InterruptEvent(Point.IRQ, kind=kind, vector=vector), lambda event: carry_out(event.vector))


def _tap_regions(backend: VfioBackend, wanted: frozenset[Point]) -> None:
    plain, function, points = backend.plain_regions, backend.function, backend.points
    armed = wanted & _ACCESS.keys()
    backend.regions = TappedRegions(plain, function, points, armed) if armed else plain
    declared, logged = backend.declaration, points.of(TapStage.LOG)
    for index in (*(bar.index for bar in declared.bars), *((Region.ROM,) if declared.rom else ()), Region.CONFIG):
        config = index == Region.CONFIG
        read, write = (Point.CONFIG_READ, Point.CONFIG_WRITE) if config else (Point.MMIO_READ, Point.MMIO_WRITE)
        exits = (EXIT_ON_READ if read in wanted else 0) | (EXIT_ON_WRITE if write in wanted else 0)
        function.tap_region(index, exits | (EXIT_REFUSED if logged & {read, write} else 0))
