"""Faults: their reports to devices, queues, handlers and the log; and page requests."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.iommu.world import RAM, RW, World, group_of, iommu
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu import Iommu, paging_domain_alloc
from vmodel.iommu.domain import AllocFlags, PagingDomain
from vmodel.iommu.fault import FaultQueue, FaultRecord, PageHandler, PageRequest, PageResponse
from vmodel.logs import RateLimit
from vmodel.server import Server
from vmodel.span import PAGE

IOVA, GPA = 0x1000_0000, 0x20_0000
R, W = Access.READ, Access.WRITE


class Device:
    """One device behind a paging domain that has nothing in it, with or without a PASID."""

    def __init__(self, world: World, pasid: int | None) -> None:
        self.world, self.pasid = world, pasid
        self.endpoint, plain = world.device("00:03.0")
        self.dma = plain if pasid is None else plain.with_pasid(pasid)
        self.domain = paging_domain_alloc(self.endpoint, AllocFlags.PASID)
        if pasid is None:
            group_of(self.endpoint).attach(self.domain)
        else:
            group_of(self.endpoint).attach_pasid(self.domain, pasid)
        assert self.endpoint.iommu is not None
        self.iommu: Iommu = self.endpoint.iommu
        self.requests: list[PageRequest] = []

    def answer(self, response: PageResponse = PageResponse.SUCCESS, access: Access = RW) -> None:
        """Page requests are met: IOVA + n leads to GPA + n; or refused."""

        def handler(request: PageRequest) -> PageResponse:
            self.requests.append(request)
            if response is PageResponse.SUCCESS:
                page = request.iova & -PAGE
                self.domain.map(page, page - IOVA + GPA, PAGE, access)
            return response

        self.domain.page_handler = handler

    @property
    def asked(self) -> list[tuple[int, Access]]:
        return [(request.iova, request.access) for request in self.requests]


@pytest.fixture(params=[None, 6], ids=["plain", "pasid"])
def device(request: pytest.FixtureRequest, world: World) -> Device:
    return Device(world, request.param)


def fails(call: Callable[..., object], *args: object) -> DmaFault:
    with pytest.raises(DmaFault) as caught:
        call(*args)
    return caught.value


def record(n: int = 0) -> FaultRecord:
    return FaultRecord(n, "iommu0", "edu0", 0x18, None, IOVA, R, Reason.NOT_MAPPED, 0, 0, "DMA", 0)


# ---- records ---------------------------------------------------------------------------------------


def test_record(device: Device) -> None:
    began = time.monotonic_ns()
    device.domain.map(IOVA, GPA, PAGE)
    fault = fails(device.dma.write, IOVA + PAGE - 6, b"8 bytes!")
    assert (fault.reason, fault.iova, fault.done, fault.pasid) == (Reason.NOT_MAPPED, IOVA + PAGE, 6, device.pasid)
    assert fails(device.dma.read, 0x5000, 4).reason is Reason.NOT_MAPPED
    first, second = device.iommu.faults.drain()
    assert began <= first.time_ns <= second.time_ns <= time.monotonic_ns()
    assert (first.iommu, first.requester, first.requester_id) == ("iommu0", "00:03.0", 0x18)
    assert (first.pasid, first.iova, first.access, first.reason) == (device.pasid, IOVA + PAGE, W, Reason.NOT_MAPPED)
    assert (first.domain, first.group, first.level, first.stage) == ("unmanaged", 0, 0, 0)
    assert (second.iova, second.access) == (0x5000, R)
    assert len(device.iommu.faults) == 0


def test_each_failed_access_is_recorded_once(device: Device) -> None:
    calls: list[Callable[[], object]] = [
        lambda: device.dma.read(IOVA, 8),
        lambda: device.dma.readinto(IOVA, bytearray(8)),
        lambda: device.dma.write(IOVA, bytes(8)),
        lambda: device.dma.gather([(IOVA, 4), (IOVA + PAGE, 4)]),
        lambda: device.dma.scatter([(IOVA, 4), (IOVA + PAGE, 4)], bytes(8)),
        lambda: device.dma.fetch_add(IOVA, 8, 1),
        lambda: device.dma.swap(IOVA, 4, 1),
        lambda: device.dma.compare_swap(IOVA, 4, 0, 1),
        lambda: device.dma.view(IOVA, 8).__enter__(),
        lambda: device.dma.view(IOVA, 8, writable=True).__enter__(),
    ]
    for call in calls:
        fails(call)
    found = [one.access for one in device.iommu.faults.peek()]
    assert found == [R, R, W, R, W, RW, RW, RW, R, RW][: device.iommu.faults.depth]
    assert device.iommu.faults.total == len(calls)


def test_a_pasid_without_a_domain(world: World) -> None:
    endpoint, dma = world.device("00:03.0")
    assert fails(dma.with_pasid(9).read, 0x1000, 4).reason is Reason.PASID
    (one,) = world.system.iommus[0].faults.drain()
    assert (one.pasid, one.domain, one.reason, one.group) == (9, "no", Reason.PASID, group_of(endpoint).number)


def test_what_never_got_there(world: World) -> None:
    """Without bus mastering or an IOMMU nothing is recorded."""
    faults = world.system.iommus[0].faults
    _, dma = world.device("00:03.0")
    dma.bus_master = False
    assert fails(dma.read, 0, 4).reason is Reason.BUS_MASTER_OFF
    outside = world.plug(world.function("00:04.0"), bypass=True)
    assert fails(world.dmas[outside.name].read, RAM, 4).reason is Reason.NO_WINDOW
    assert faults.total == 0


def test_text() -> None:
    text = "iommu0: edu0 [0x18]: READ at iova 0x10000000: NOT_MAPPED (DMA domain, group 0)"
    assert str(record()) == text
    nested = FaultRecord(0, "i", "d", 1, 2, 3, RW, Reason.PERMISSION, 4, 1, "nested", 5)
    assert str(nested) == (
        "i: d [0x1] pasid 0x2: READ|WRITE at iova 0x3: PERMISSION at level 4 of stage 1 (nested domain, group 5)"
    )


# ---- queue, handlers, log ------------------------------------------------------------------------


def test_queue() -> None:
    queue = FaultQueue(3)
    assert [queue.put(record(n)) for n in range(5)] == [True] * 3 + [False] * 2
    assert (queue.overflow, queue.total, queue.lost, len(queue)) == (True, 5, 2, 3)
    assert [one.time_ns for one in queue.peek()] == [one.time_ns for one in queue.drain()] == [0, 1, 2]
    assert (queue.overflow, len(queue), queue.drain()) == (True, 0, [])  # the flag stays
    queue.clear_overflow()
    assert queue.put(record())
    assert (queue.overflow, queue.lost) == (False, 2)
    with pytest.raises(ValueError):
        FaultQueue(0)


def test_overflow() -> None:
    world = World(iommu(fault_queue_depth=2))
    _, dma = world.device("00:03.0")
    faults, seen = world.system.iommus[0].faults, list[FaultRecord]()
    world.system.iommus[0].on_fault(seen.append)
    for n in range(4):
        fails(dma.read, RAM + n * PAGE, 4)
    assert (faults.overflow, faults.lost, [one.iova for one in faults.peek()]) == (True, 2, [RAM, RAM + PAGE])
    assert len(seen) == 4  # handlers get them all
    world.close()


def test_handlers(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One that raises disturbs neither the device nor the others."""
    one, seen, threads = world.system.iommus[0], list[FaultRecord](), list[int]()

    def broken(_: FaultRecord) -> None:
        raise RuntimeError("a bug in a handler")

    def last(found: FaultRecord) -> None:
        seen.append(found)
        threads.append(threading.get_ident())

    one.on_fault(broken)
    cancel = one.on_fault(last)
    _, dma = world.device("00:03.0")
    assert fails(dma.read, RAM, 4).reason is Reason.NO_WINDOW
    assert [found.iova for found in seen] == [RAM]
    assert threads == [threading.get_ident()]
    assert "a fault handler failed" in caplog.text
    cancel()
    fails(dma.read, RAM, 4)
    assert (len(seen), len(one.faults)) == (1, 2)


def test_rate_limit() -> None:
    now = [100.0]
    limit = RateLimit(2, 5.0, lambda: now[0])
    assert [limit() for _ in range(4)] == [(True, 0), (True, 0), (False, 0), (False, 0)]
    now[0] += 4.9
    assert limit() == (False, 0)
    now[0] += 0.1
    assert [limit() for _ in range(3)] == [(True, 3), (True, 0), (False, 0)]
    now[0] += 60
    assert limit() == (True, 1)


def test_log_is_limited(world: World, caplog: pytest.LogCaptureFixture) -> None:
    one = world.system.iommus[0]
    now = [0.0]
    one._fault_lines.limit = RateLimit(10, 5.0, lambda: now[0])
    _, dma = world.device("00:03.0")
    with caplog.at_level(logging.WARNING):
        for _ in range(25):
            fails(dma.read, RAM, 4)
        assert len(caplog.records) == 10
        assert caplog.records[0].getMessage() == str(one.faults.peek()[0])
        now[0] = 5.0
        caplog.clear()
        fails(dma.read, RAM, 4)
    assert caplog.records[0].getMessage() == "iommu0: 15 more faults were not logged"
    assert len(caplog.records) == 2
    assert one.faults.total == 26


def test_the_end_says_how_many_faults_were_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    world = World(iommu(name="counted"))  # IOMMUs of other tests, also called iommu0, may be there still
    _, dma = world.device("00:03.0")
    with Server():
        for _ in range(25):
            fails(dma.read, RAM, 4)
    own = [line for line in caplog.messages if line.startswith("counted: ")]
    (said,) = [line for line in own if "faults were not logged" in line]
    assert int(said.split()[1]) == 25 - sum(" at iova " in line for line in own)
    world.close()


# ---- page requests -------------------------------------------------------------------------------


def test_page_comes(device: Device) -> None:
    device.answer()
    device.world.ram[GPA + 16 : GPA + 20] = b"page"
    assert device.dma.read(IOVA + 16, 4) == b"page"
    assert device.dma.read(IOVA + 16, 4) == b"page"  # now it is there
    (request,) = device.requests
    assert (request.requester, request.pasid, request.iova, request.access) == ("00:03.0", device.pasid, IOVA + 16, R)
    device.dma.write(IOVA + PAGE, b"x")
    assert device.requests[1].group_index != request.group_index
    assert device.iommu.faults.total == 0


def test_page_comes_with_too_little(device: Device) -> None:
    """Read-only: a write sends a page request again, which cannot resolve it."""
    device.domain.map(IOVA, GPA, PAGE, R)
    device.answer(PageResponse.INVALID)
    assert fails(device.dma.write, IOVA, b"x").reason is Reason.PERMISSION
    assert device.asked == [(IOVA, W)]


@pytest.mark.parametrize("response", [PageResponse.INVALID, PageResponse.FAILURE])
def test_page_does_not_come(device: Device, response: PageResponse) -> None:
    """After a FAILURE the device sends no page requests (PCIe 10.4.1) until they are enabled again."""
    device.answer(response)
    for _ in range(2):
        assert fails(device.dma.read, IOVA, 4).reason is Reason.NOT_MAPPED
    assert len(device.requests) == (2 if response is PageResponse.INVALID else 1)
    assert device.iommu.faults.total == 2
    device.endpoint.enable_page_requests()
    device.answer()
    device.dma.read(IOVA, 4)
    assert device.iommu.faults.total == 2


def test_page_handler_that_raises(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: PageRequest) -> PageResponse:
        raise RuntimeError("a bug in a handler")

    device.domain.page_handler = broken
    assert fails(device.dma.read, IOVA, 4).reason is Reason.NOT_MAPPED
    assert "the page handler failed" in caplog.text
    assert device.iommu.faults.total == 1
    device.answer()
    fails(device.dma.read, IOVA, 4)  # that was a FAILURE
    assert not device.requests


def accesses(dma: Dma) -> dict[str, Callable[[], object]]:
    """Each over the end of the second page, where it can be."""
    at, size = IOVA + PAGE - 8, PAGE + 16

    def view() -> bytes:
        with dma.view(IOVA + 16, 16) as found:
            return bytes(found)

    def writable() -> None:
        with dma.view(IOVA + 16, 4, writable=True) as found:
            found[:] = b"view"

    def readinto() -> bytes:
        into = bytearray(size)
        dma.readinto(at, into)
        return bytes(into)

    return {
        "read": lambda: dma.read(at, size),
        "readinto": readinto,
        "write": lambda: dma.write(at, bytes(range(256)) * (size // 256) + bytes(size % 256)),
        "gather": lambda: dma.gather([(IOVA + 3 * PAGE, 5), (at, size)]),
        "scatter": lambda: dma.scatter([(IOVA + 3 * PAGE, 5), (at, size)], bytes(n % 251 for n in range(5 + size))),
        "view": view,
        "writable view": writable,
        "fetch_add": lambda: dma.fetch_add(IOVA, 8, 5),
        "swap": lambda: dma.swap(IOVA, 4, 5),
        "compare_swap": lambda: dma.compare_swap(IOVA, 4, 0x03020100, 5),
    }


KINDS = ["read", "readinto", "write", "gather", "scatter", "view", "writable view", "fetch_add", "swap", "compare_swap"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_access_goes_on(device: Device, kind: str) -> None:
    """With pages that come one by one it does what it does where all are there."""
    ram = device.world.ram
    start = bytes(n * 7 % 256 for n in range(4 * PAGE))
    ram[GPA : GPA + 4 * PAGE] = start
    device.domain.map(IOVA, GPA, 4 * PAGE)
    result = accesses(device.dma)[kind]()
    after = ram[GPA : GPA + 4 * PAGE]
    ram[GPA : GPA + 4 * PAGE] = start
    device.domain.unmap(IOVA, 4 * PAGE)
    device.answer()
    assert accesses(device.dma)[kind]() == result
    assert ram[GPA : GPA + 4 * PAGE] == after
    pages = {
        "gather": [3, 0, 1, 2],
        "scatter": [3, 0, 1, 2],
        "read": [0, 1, 2],
        "readinto": [0, 1, 2],
        "write": [0, 1, 2],
    }
    assert [(request.iova - IOVA) // PAGE for request in device.requests] == pages.get(kind, [0])
    assert all(request.pasid == device.pasid for request in device.requests)
    assert device.iommu.faults.total == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_that_always_says_success(device: Device, kind: str) -> None:
    """It is retried a bounded number of times; the fault is reported and recorded once."""
    asked: list[PageRequest] = []

    def liar(request: PageRequest) -> PageResponse:
        asked.append(request)
        return PageResponse.SUCCESS

    device.domain.page_handler = liar
    assert fails(accesses(device.dma)[kind]).reason is Reason.NOT_MAPPED
    assert 2 <= len(asked) <= 20
    assert device.iommu.faults.total == 1


@pytest.mark.parametrize("kind", ["read", "readinto", "write", "gather", "scatter"])
def test_how_far_it_came(device: Device, kind: str) -> None:
    """The third page does not come: `done` counts from the beginning, over all pages resolved before."""
    device.answer()
    meet = device.domain.page_handler
    assert meet is not None

    def handler(request: PageRequest) -> PageResponse:
        assert meet is not None
        return PageResponse.INVALID if IOVA + 2 * PAGE <= request.iova < IOVA + 3 * PAGE else meet(request)

    device.domain.page_handler = handler
    fault = fails(accesses(device.dma)[kind])
    before = 5 if kind in ("gather", "scatter") else 0
    assert (fault.iova, fault.done) == (IOVA + 2 * PAGE, before + 8 + PAGE)
    (one,) = device.iommu.faults.drain()
    assert one.iova == IOVA + 2 * PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_faults_that_are_kept(device: Device, kind: str) -> None:
    """A fault in a cycle with the frames that it came through: CPython's collector survives that."""
    for _ in range(3):
        device.domain.page_handler = lambda request: PageResponse.SUCCESS  # again and again, by all code there is
        fault = fails(accesses(device.dma)[kind])
        fault.__cause__ = fault
        del fault
        gc.collect()


def test_a_page_each_time(device: Device) -> None:
    """There is no limit on pages that do come."""
    device.answer()
    device.dma.write(IOVA, b"w" * 50 * PAGE)
    assert device.world.ram[GPA : GPA + 50 * PAGE] == b"w" * 50 * PAGE
    assert len(device.requests) == 50


@pytest.mark.parametrize(
    ("capabilities", "asked"),
    [({"page_requests": False}, 0), ({"page_requests": False, "stall": True}, 1), ({"page_requests": True}, 1)],
)
def test_who_can_wait(capabilities: dict[str, Any], asked: int) -> None:
    world = World(iommu(**capabilities))
    device = Device(world, None)
    device.answer(PageResponse.INVALID)
    fails(device.dma.read, IOVA, 4)
    assert (len(device.requests), device.iommu.faults.total) == (asked, 1)
    world.close()


def test_what_no_page_would_mend(world: World) -> None:
    """A window that is not there, a PASID that is not: nobody is asked."""
    device = Device(world, None)
    device.domain.map(IOVA, RAM, PAGE)
    device.answer()
    assert fails(device.dma.read, IOVA, 4).reason is Reason.NO_WINDOW
    assert fails(device.dma.with_pasid(3).read, IOVA, 4).reason is Reason.PASID
    assert not device.requests
    assert device.iommu.faults.total == 2


def test_two_domains_two_handlers(world: World) -> None:
    """Each request goes to the domain that the access went through."""
    device = Device(world, None)
    other: PagingDomain = paging_domain_alloc(device.endpoint)
    group_of(device.endpoint).attach_pasid(other, 3)
    device.answer()
    seen: list[int | None] = []

    def second(request: PageRequest) -> PageResponse:
        seen.append(request.pasid)
        other.map(request.iova & -PAGE, GPA + PAGE, PAGE)
        return PageResponse.SUCCESS

    handler: PageHandler = second
    other.page_handler = handler
    world.ram[GPA : GPA + 1], world.ram[GPA + PAGE : GPA + PAGE + 1] = b"1", b"2"
    assert (device.dma.read(IOVA, 1), device.dma.with_pasid(3).read(IOVA, 1)) == (b"1", b"2")
    assert ([request.pasid for request in device.requests], seen) == ([None], [3])


def test_the_domain_goes_while_a_page_is_on_its_way(world: World) -> None:
    """The handler may do anything with the group: no lock is held."""
    device = Device(world, None)
    group = group_of(device.endpoint)

    def handler(_: PageRequest) -> PageResponse:
        thread = threading.Thread(target=group.replace, args=(group.iommu.blocked,), daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        return PageResponse.SUCCESS

    device.domain.page_handler = handler
    assert fails(device.dma.read, IOVA, 4).reason is Reason.BLOCKED
    (one,) = device.iommu.faults.drain()
    assert (one.domain, one.reason) == ("blocked", Reason.BLOCKED)
