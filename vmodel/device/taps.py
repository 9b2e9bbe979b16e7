"""The intercepting paths of a device: DMA, regions and interrupts that announce what happens before it does.

`tap` puts them in the place of the plain ones, or those back.  So whoever does no experiment pays nothing: a path is
looked up as ever, and is another one while somebody listens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from vmodel._shim import EXIT_ON_READ, EXIT_ON_WRITE
from vmodel._shim import key as access_key
from vmodel.device.backend import VfioBackend
from vmodel.device.regions import Regions
from vmodel.dma import Buffer, Dma
from vmodel.errors import DmaFault
from vmodel.points import Event, Point, Points, Sink
from vmodel.vfio_user.wire import Region

_DMA = frozenset((Point.DMA_READ, Point.DMA_WRITE, Point.TRANSLATE))
_ACCESSES = frozenset((Point.MMIO_READ, Point.MMIO_WRITE, Point.CONFIG_READ, Point.CONFIG_WRITE))


class TappedDma(Dma):
    """DMA that announces each access.  One over several pieces is several accesses."""

    __slots__ = ()

    def read(self, iova: int, size: int) -> bytes:
        if not size:
            return super().read(iova, size)
        return self._points(self._event(Point.DMA_READ, iova, size), self._read)

    def readinto(self, iova: int, buffer: bytearray | memoryview) -> None:
        with memoryview(buffer) as whole, whole.cast("B") as flat:
            flat[:] = self.read(iova, len(flat))

    def write(self, iova: int, data: Buffer) -> None:
        # A copy: what happens later must not see what the model puts into its buffer meanwhile.
        copy = bytes(data)
        if not copy:
            return super().write(iova, copy)
        self._points(self._event(Point.DMA_WRITE, iova, len(copy), copy), self._write)
        return None

    def gather_into(self, pieces: Sequence[tuple[int, int]], buffer: bytearray | memoryview) -> None:
        with memoryview(buffer) as whole, whole.cast("B") as flat:
            if sum(size for _, size in pieces) != len(flat):
                raise ValueError("the pieces and the buffer differ in size")
            self._each(pieces, flat, write=False)

    def scatter(self, pieces: Sequence[tuple[int, int]], data: Buffer) -> None:
        with memoryview(data) as whole, whole.cast("B") as flat:
            if sum(size for _, size in pieces) != len(flat):
                raise ValueError("the pieces and the data differ in size")
            self._each(pieces, flat, write=True)

    @contextmanager
    def view(self, iova: int, size: int, *, writable: bool = False) -> Iterator[memoryview]:
        """A copy, written back at the end: nobody can come between memory and who looks at it."""
        with super().view(iova, size, writable=writable):
            copy = bytearray(self.read(iova, size))
        with memoryview(copy) as shown:
            yield shown if writable else shown.toreadonly()
        if writable:
            self.write(iova, copy)

    def _atomic(self, iova: int, op: int, size: int, operand: int, compare: int) -> int:
        atomic = super()._atomic

        def carry_out(event: Event) -> bytes:
            TappedDma._translate(self, event, write=True)
            return atomic(_address(event), op, size, operand, compare).to_bytes(size, "little")

        return int.from_bytes(self._points(self._event(Point.DMA_READ, iova, size), carry_out), "little")

    # ---- events ----------------------------------------------------------------------------

    @property
    def _points(self) -> Points:
        points = self._line.points
        assert points is not None  # there are none only where the class is Dma
        return points

    def _event(self, point: Point, iova: int, size: int, data: bytes | None = None) -> Event:
        event = Event(point, address=iova, size=size, data=data, pasid=self._pasid_or_none)
        endpoint = self._line.endpoint
        if endpoint is not None:
            event.requester = endpoint.requester_id
            if (group := endpoint.group) is not None:
                domain = group.domain_of(event.pasid)
                event.group = group.number
                event.domain = None if domain is None else domain.name
                event.gpa = lambda: None if domain is None else domain.iova_to_phys(iova)
                return event
        event.gpa = lambda: iova
        return event

    # What a rule has put off may happen when nobody listens any more, and the class is Dma again: so not by `self`.

    def _read(self, event: Event) -> bytes:
        TappedDma._translate(self, event, write=False)
        return Dma.read(self, _address(event), event.size or 0)

    def _write(self, event: Event) -> bytes:
        TappedDma._translate(self, event, write=True)
        Dma.write(self, _address(event), event.data or b"")
        return b""

    def _translate(self, event: Event, *, write: bool) -> None:
        """Where there is nothing that translates, nothing can go wrong with that."""
        points = self._line.points
        if event.group is not None and points is not None and points.wants(Point.TRANSLATE):
            translation = TappedDma._event(self, Point.TRANSLATE, _address(event), event.size or 0)
            translation.write = write
            points(translation, lambda _: b"")

    def _each(self, pieces: Sequence[tuple[int, int]], flat: memoryview, *, write: bool) -> None:
        at = 0
        for iova, size in pieces:
            try:
                if write:
                    self.write(iova, bytes(flat[at : at + size]))
                else:
                    flat[at : at + size] = self.read(iova, size)
            except DmaFault as fault:
                fault.done += at
                raise
            at += size


def _address(event: Event) -> int:
    assert event.address is not None
    return event.address


class TappedRegions:
    """Accesses by the guest, announced; none of them is left to the shim."""

    def __init__(self, regions: Regions, points: Points, wanted: Collection[Point]) -> None:
        self._regions = regions
        self._points = points
        self._wanted = wanted

    def read(self, key: int, region: int, offset: int, count: int) -> int | bytes:
        point = Point.CONFIG_READ if region == Region.CONFIG else Point.MMIO_READ
        if point not in self._wanted:
            return self._regions.read(key, region, offset, count)
        data = self._points(Event(point, region=region, address=offset, size=count), self._read)
        return int.from_bytes(data, "little") if count <= 8 else data

    def write(self, key: int, region: int, offset: int, count: int, value: int | bytes) -> None:
        point = Point.CONFIG_WRITE if region == Region.CONFIG else Point.MMIO_WRITE
        if point not in self._wanted:
            self._regions.write(key, region, offset, count, value)
            return
        data = value.to_bytes(count, "little") if isinstance(value, int) else value
        self._points(Event(point, region=region, address=offset, size=count, data=data), self._write)

    def _read(self, event: Event) -> bytes:
        assert event.region is not None and event.size is not None
        key = access_key(event.region, _address(event), event.size)
        value = self._regions.read(key, event.region, _address(event), event.size)
        return value.to_bytes(event.size, "little") if isinstance(value, int) else value

    def _write(self, event: Event) -> bytes:
        assert event.region is not None and event.data is not None
        data = event.data
        key = access_key(event.region, _address(event), len(data))
        value = int.from_bytes(data, "little") if len(data) <= 8 else data
        self._regions.write(key, event.region, _address(event), len(data), value)
        return b""


def tap(backend: VfioBackend, wanted: Collection[Point], sink: Sink | None) -> None:
    """`sink` gets the points `wanted` of a device from now on; any thread.  Without a sink: nobody does."""
    wanted = frozenset(wanted) if sink is not None else frozenset()
    points = backend.points
    points.arm(wanted, sink)
    backend.dma.become(TappedDma if wanted & _DMA else Dma, points)
    backend.irqs.tap = functools.partial(_interrupt, points) if Point.IRQ in wanted else None
    _tap_regions(backend, wanted)


def _interrupt(points: Points, carry_out: Callable[[int], None], vector: int) -> None:
    points.at(Point.IRQ, lambda event: carry_out(event.vector or 0), vector=vector)


def _tap_regions(backend: VfioBackend, wanted: frozenset[Point]) -> None:
    plain = backend.plain_regions
    backend.regions = TappedRegions(plain, backend.points, wanted) if wanted & _ACCESSES else plain
    declared = backend.declaration
    for index in (*(bar.index for bar in declared.bars), *((Region.ROM,) if declared.rom else ()), Region.CONFIG):
        config = index == Region.CONFIG
        read, write = (Point.CONFIG_READ, Point.CONFIG_WRITE) if config else (Point.MMIO_READ, Point.MMIO_WRITE)
        exits = (EXIT_ON_READ if read in wanted else 0) | (EXIT_ON_WRITE if write in wanted else 0)
        backend.function.tap_region(index, exits)
