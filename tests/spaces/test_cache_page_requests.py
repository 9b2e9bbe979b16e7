"""A CPU's cache, and accesses of a device that wait for a page request: whoever answers it may use the cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.spaces.world import Device, World
from tests.waiting import until
from vmodel.cpu_cache import CpuCache
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu import Table, TableFormat, walked_domain_alloc
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.iommufd import Context, FaultObject, Hwpt, Ioas
from vmodel.iommu.iommufd import Device as Bound
from vmodel.patience import patience
from vmodel.span import PAGE, MiB

IOVA, GPA = 16 * MiB, 0x8000
#: Seconds that a page request waits: as long as a test that hangs.
LONG = 20.0


def _view(dma: Dma, data: bytes = b"") -> bytes:
    with dma.view(IOVA, 4, writable=bool(data)) as there:
        if data:
            there[:] = data
        return bytes(there)


def _into(dma: Dma) -> bytes:
    buffer = bytearray(4)
    dma.readinto(IOVA, buffer)
    return bytes(buffer)


READS: dict[str, Callable[[Dma], object]] = {
    "read": lambda dma: dma.read(IOVA, 4),
    "readinto": _into,
    "gather": lambda dma: dma.gather([(IOVA, 2), (IOVA + 2, 2)]),
    "view": _view,
    "fetch_add": lambda dma: dma.fetch_add(IOVA, 4, 0).to_bytes(4, "little"),
}
WRITES: dict[str, Callable[[Dma], object]] = {
    "write": lambda dma: dma.write(IOVA, b"dev."),
    "scatter": lambda dma: dma.scatter([(IOVA, 2), (IOVA + 2, 2)], b"dev."),
    "writable view": lambda dma: _view(dma, b"dev."),
    "swap": lambda dma: dma.swap(IOVA, 4, int.from_bytes(b"dev.", "little")),
}


class Bench:
    """A device whose HWPT has a fault object, and a cache beside its DMA."""

    def __init__(self, world: World) -> None:
        self.device: Device = world.add(world.iommu())
        context = Context()
        self.fault, self.ioas = FaultObject(context, LONG), Ioas(context)
        bound = Bound(context, self.device.endpoint)
        self.hwpt: Hwpt = bound.hwpt_alloc(self.ioas, fault=self.fault)
        bound.attach(self.hwpt)
        self.cache = CpuCache(world.memory)
        self.cache.attach(self.device.dma)
        self.errors: list[BaseException] = []

    def answer(self, before: Callable[[], object]) -> None:
        """Answers one page request, after `before`."""
        (request,) = until(self.fault.read, "a page request", LONG)
        try:
            before()
            self.ioas.map(GPA, PAGE, iova=IOVA)
            self.fault.respond(request, PageResponse.SUCCESS)
        except BaseException as error:
            self.errors.append(error)

    def access(self, call: Callable[[Dma], object], before: Callable[[], object]) -> object:
        """An access, which must not wait until a time-out."""
        thread = threading.Thread(target=self.answer, args=(before,), daemon=True)
        thread.start()
        start = time.monotonic()
        found = call(self.device.dma)
        assert time.monotonic() - start < LONG / 2
        thread.join(patience(10))
        assert not thread.is_alive() and not self.errors, self.errors
        return found


def _gone_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping is there when the access is translated for the cache, and has gone when it is made."""
    snoop = bench.cache.snoop
    bench.ioas.map(GPA, PAGE, iova=IOVA)

    def first(*args: Any) -> None:
        monkeypatch.setattr(bench.cache, "snoop", snoop)
        bench.ioas.unmap(IOVA, PAGE)
        snoop(*args)

    monkeypatch.setattr(bench.cache, "snoop", first)


@pytest.mark.parametrize("gone", [False, True], ids=["never mapped", "unmapped meanwhile"])
@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_the_answer_may_use_the_cache(name: str, gone: bool, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device sees what the CPU writes before it answers; what the device writes is seen by the CPU."""
    bench = Bench(world)
    if gone and "view" not in name:  # a view is a piece of memory: no access is made again
        _gone_at_once(bench, monkeypatch)
    got = bench.access({**READS, **WRITES}[name], lambda: bench.cache.write(GPA, b"cpu."))
    if name in READS:
        assert got == b"cpu."
    else:
        assert bench.cache.read(GPA, 4) == b"dev." == world.ram[GPA : GPA + 4]
    assert bench.cache.dirty == 0


def test_the_rest_of_an_access_is_done_after_the_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(world)
    bench.ioas.map(GPA + PAGE, PAGE, iova=IOVA + PAGE)
    bench.ioas.map(GPA - PAGE, PAGE, iova=IOVA - PAGE)
    data = bytes(n % 251 for n in range(3 * PAGE))
    bench.access(lambda dma: dma.write(IOVA - PAGE, data), lambda: bench.cache.write(GPA, b"old"))
    assert bench.cache.read(GPA - PAGE, 3 * PAGE) == data
    assert bench.device.dma.read(IOVA - PAGE, 3 * PAGE) == data


def test_a_refused_page_is_one_fault(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """`done` counts what came before it, and the IOMMU has one record."""
    bench = Bench(world)
    bench.ioas.map(GPA - PAGE, PAGE, iova=IOVA - PAGE)
    asked: list[PageRequest] = []

    def refuse() -> None:
        asked.extend(until(bench.fault.read, "a page request", LONG))
        bench.cache.write(GPA, b"cpu.")
        bench.fault.respond(asked[0], PageResponse.INVALID)

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    with pytest.raises(DmaFault) as fault:
        bench.device.dma.read(IOVA - 8, 16)
    thread.join(patience(10))
    assert (fault.value.done, fault.value.reason, fault.value.iova) == (8, Reason.NOT_MAPPED, IOVA)
    assert [r.iova for r in asked] == [IOVA]
    unit = bench.device.endpoint.iommu
    assert unit is not None and [r.iova for r in unit.faults.drain()] == [IOVA]
    assert bench.device.dma.stats.faults == 1


def test_tables_that_the_answer_writes_into_the_cache(world: World) -> None:
    """A coherent IOMMU walks again after the answer, and sees what only the cache has (VT-d 11.4.3, ECAP.C)."""
    device = world.add(world.iommu())
    cache = CpuCache(world.memory)
    cache.attach(device.dma)
    for n in range(2):
        world.ram[0x1000 * (n + 1) : 0x1000 * (n + 1) + 8] = (0x1000 * (n + 2) | 3).to_bytes(8, "little")
    domain = walked_domain_alloc(device.endpoint, world.memory, Table(TableFormat.VTD_SECOND, 3, 0x1000, 39, 48))
    device.group.replace(domain)
    world.ram[GPA : GPA + 1] = b"x"

    def handler(request: PageRequest) -> PageResponse:
        cache.write(0x3000, (GPA | 3).to_bytes(8, "little"))
        return PageResponse.SUCCESS

    domain.page_handler = handler
    assert device.dma.read(0, 1) == b"x" and cache.dirty == 0


def test_the_device_asks_about_snooping_without_the_cache(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the locks of the IOMMUs may use the cache, as a subscriber of their changes does."""
    bench = Bench(world)
    bench.ioas.map(GPA, PAGE, iova=IOVA)
    held: list[bool] = []
    plain = Dma.snoops

    def use() -> None:
        free = bench.cache.lock.acquire(timeout=1)
        held.append(not free)
        if free:
            bench.cache.lock.release()

    def snoops(dma: Dma, iova: int) -> bool:
        other = threading.Thread(target=use, daemon=True)
        other.start()
        other.join(patience(5))
        return plain(dma, iova)

    monkeypatch.setattr(Dma, "snoops", snoops)
    assert bench.device.dma.read(IOVA, 1) == world.ram[GPA : GPA + 1] and held == [False]


def test_memory_that_only_messages_reach(world: World) -> None:
    """The client is asked without the cache's lock: what it has is never cached."""
    bench = Bench(world)
    world.memory.map(1 << 32, PAGE, Access.READ | Access.WRITE)
    bench.ioas.map(1 << 32, PAGE, iova=IOVA)
    seen: list[object] = []

    class Client:
        def read(self, gpa: int, size: int) -> bytes:
            self._other()
            return b"c" * size

        def write(self, gpa: int, data: bytes) -> None:
            self._other()
            seen.append((gpa, bytes(data)))

        def _other(self) -> None:
            other = threading.Thread(target=bench.cache.wbinvd, daemon=True)
            other.start()
            other.join(patience(5))
            seen.append(other.is_alive())

        def wait(self, event: threading.Event, seconds: float) -> bool:
            return False

    bench.device.dma.courier = Client()  # type: ignore[assignment]
    assert bench.device.dma.read(IOVA + 4, 4) == b"cccc"
    bench.device.dma.write(IOVA + 8, b"wxyz")
    assert seen == [False, False, ((1 << 32) + 8, b"wxyz")]
