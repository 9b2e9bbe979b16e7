"""Values of a model's or a host's that are out of range: the error that is documented, in bounded memory."""

from __future__ import annotations

import errno
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.iommu.world import RAM, World, group_of, iommu
from vmodel._shim import MOST_BYTES
from vmodel.cpu_cache import CpuCache
from vmodel.device.taps import DmaTap
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu import paging_domain_alloc
from vmodel.memory import GuestMemory
from vmodel.points import Points
from vmodel.span import PAGE, GiB, MiB, Span


@contextmanager
def in_little_memory(most: int = 4 * MiB) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def _plain(world: World, dma: Dma) -> None:
    """Nothing is in front."""


def _tapped(world: World, dma: Dma) -> None:
    dma.tap(DmaTap(Points("dev")))


def _cached(world: World, dma: Dma) -> None:
    CpuCache(world.memory).attach(dma)


@pytest.fixture(params=[_plain, _cached, _tapped], ids=["plain", "cached", "tapped"])
def dma(request: pytest.FixtureRequest) -> Iterator[Dma]:
    """A device without an IOMMU."""
    world = World()
    world.plug(world.function("00:03.0"))
    found = world.dmas["00:03.0"]
    request.param(world, found)
    yield found
    world.close()


def _view(dma: Dma, iova: int, size: int, *, writable: bool = False) -> None:
    with dma.view(iova, size, writable=writable):
        raise AssertionError("it should fault")


def _readinto(dma: Dma, iova: int) -> None:
    dma.readinto(iova, bytearray(4))


NO_ADDRESS = [-1, -(1 << 70), 1 << 64, 1 << 80]
BY_ADDRESS: dict[str, Callable[[Dma, int], object]] = {
    "read": lambda dma, iova: dma.read(iova, 4),
    "read of nothing": lambda dma, iova: dma.read(iova, 0),
    "large read": lambda dma, iova: dma.read(iova, GiB),
    "readinto": _readinto,
    "write": lambda dma, iova: dma.write(iova, b"data"),
    "gather": lambda dma, iova: dma.gather([(0, 4), (iova, 4)]),
    "large gather": lambda dma, iova: dma.gather([(0, 4), (iova, GiB)]),
    "scatter": lambda dma, iova: dma.scatter([(0, 2), (iova, 2)], b"data"),
    "view": lambda dma, iova: _view(dma, iova, 4),
    "swap": lambda dma, iova: dma.swap(iova, 4, 1),
    "translate": lambda dma, iova: dma.translate(iova, Access.READ),
    "snoops": lambda dma, iova: dma.snoops(iova),
}


@pytest.mark.parametrize("iova", NO_ADDRESS)
@pytest.mark.parametrize("name", BY_ADDRESS)
def test_what_is_no_address(name: str, iova: int, dma: Dma) -> None:
    """A fault of the model's, which no IOMMU records: no request can have such an address."""
    with in_little_memory(), pytest.raises(DmaFault) as fault:
        BY_ADDRESS[name](dma, iova)
    assert (fault.value.reason, fault.value.iova, fault.value.done) == (Reason.WRAP, iova, 0)


def test_nothing_moves_before_what_is_no_address(dma: Dma) -> None:
    with pytest.raises(DmaFault):
        dma.scatter([(0, 2), (-1, 2)], b"data")
    assert dma.read(0, 2) == bytes(2)


@pytest.mark.parametrize("size", [-1, -(1 << 70)])
def test_less_than_no_bytes(size: int, dma: Dma) -> None:
    for call in (
        lambda: dma.read(0, size),
        lambda: dma.gather([(0, size)]),
        lambda: dma.gather([(0, size), (0, 1 - size)]),
        lambda: dma.scatter([(0, size), (0, 1 - size)], b"x"),
        lambda: _view(dma, 0, size),
    ):
        with in_little_memory(), pytest.raises(ValueError, match="bytes"):
            call()
    with pytest.raises(OSError) as refused:
        dma.fetch_add(0, size, 1)
    assert refused.value.errno == errno.EINVAL


LARGE = [(GiB, Reason.NO_WINDOW), (1 << 62, Reason.NO_WINDOW), (1 << 64, Reason.WRAP), (1 << 80, Reason.WRAP)]


@pytest.mark.parametrize(("size", "reason"), LARGE)
def test_more_bytes_than_there_are(size: int, reason: Reason, dma: Dma) -> None:
    """Memory is taken for what is there: `done` says how much that is."""
    at, there = PAGE, RAM - PAGE
    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: dma.read(at, size), there),
        (lambda: dma.gather([(0, 4), (at, size)]), 4 + there),
        (lambda: _view(dma, at, size), 0),
        (lambda: _view(dma, at, size, writable=True), 0),
    ]
    for call, done in calls:
        with in_little_memory(64 * MiB), pytest.raises(DmaFault) as fault:
            call()
        assert fault.value.reason is reason
        if reason is Reason.NO_WINDOW:
            assert (fault.value.iova, fault.value.done) == (RAM, done) or call in [c for c, d in calls if not d]
    for atomic in (lambda: dma.swap(0, size, 1), lambda: dma.compare_swap(0, size, 1, 1)):
        with in_little_memory(), pytest.raises(OSError) as refused:
            atomic()
        assert refused.value.errno == errno.EINVAL


def test_a_large_read_has_all(dma: Dma) -> None:
    """Of memory that is there often: 40 MiB in pieces of MOST_BYTES, and a rest."""
    whole = bytes(n % 253 for n in range(PAGE)) * (RAM // PAGE)
    dma.write(0, whole)
    world = World(iommu("vt-d"))
    try:
        endpoint, mapped = world.device("00:04.0")
        mapped.write(0, whole)
        domain = paging_domain_alloc(endpoint)
        for n in range(6):
            domain.map(n * RAM, 0, RAM)
        group_of(endpoint).attach(domain)
        size = 2 * MOST_BYTES + 5 * PAGE + 3
        assert mapped.read(7, size) == (whole * 6)[7 : 7 + size]
        assert mapped.gather([(7, size - 1), (RAM, 1)]) == (whole * 6)[7 : 6 + size] + whole[:1]
        with pytest.raises(DmaFault) as fault:
            mapped.read(1, 6 * RAM)
        assert (fault.value.iova, fault.value.done) == (6 * RAM, 6 * RAM - 1)
        assert [record.iova for record in world.system.iommus[0].faults.drain()] == [6 * RAM]
    finally:
        world.close()


@pytest.mark.parametrize("gpa", NO_ADDRESS)
def test_what_is_no_address_of_a_cpu(gpa: int) -> None:
    world = World()
    cache = CpuCache(world.memory)
    for call in (lambda: cache.read(gpa, 1), lambda: cache.write(gpa, b"x")):
        with pytest.raises(DmaFault) as fault:
            call()
        assert fault.value.reason is Reason.WRAP and len(cache) == 0
    cache.flush(gpa, 1)
    for size in (-1, -(1 << 70)):
        with pytest.raises(ValueError, match="bytes"):
            cache.read(0, size)
    world.close()


BAD = [-1, 1 << 64, 1 << 80, -(1 << 80)]


@pytest.mark.parametrize("value", BAD)
def test_windows_of_memory(value: int) -> None:
    """EINVAL, as for what wraps."""
    memory = GuestMemory()
    for call in (
        lambda: memory.map(value, PAGE),
        lambda: memory.map(0, value),
        lambda: memory.map(0, PAGE, fd=0, offset=value),
        lambda: memory.unmap(value, PAGE),
        lambda: memory.unmap(0, value),
        lambda: memory.dirty_report(Span(0, PAGE - 1), value),
        lambda: memory.dirty_report(Span(0, PAGE - 1), 0),
    ):
        with in_little_memory(), pytest.raises(OSError) as refused:
            call()
        assert refused.value.errno == errno.EINVAL and len(memory) == 0
    with in_little_memory(), pytest.raises(OSError) as refused:
        memory.dirty_report(Span(0, (1 << 64) - PAGE - 1))
    assert refused.value.errno == errno.ENOMEM
