"""Page requests as messages with cookies: Linux 7.3, drivers/iommu/iommufd/eventq.c."""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.spaces.world import World, refused
from tests.waiting import until
from vmodel.errors import Access
from vmodel.iommu.domain import AllocFlags
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.iommufd import Context, Device, FaultObject, Ioas, PageFault

R, W = Access.READ, Access.WRITE
PAGE = 4096
IOVA = 1 << 24


class Asker:
    """Requests that wait, each on a thread of its own."""

    def __init__(self, fault: FaultObject) -> None:
        self.fault = fault
        self.answers: dict[int, PageResponse] = {}
        self.threads: list[threading.Thread] = []

    def ask(self, number: int, pasid: int | None = None, access: Access = R) -> None:
        request = PageRequest("dev", pasid, number * PAGE, access, number)

        def run() -> None:
            self.answers[number] = self.fault.handle(request)

        before = len(self.fault._waiting)
        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        until(lambda: len(self.fault._waiting) > before, "the request")


@contextmanager
def asking(timeout: float | None = 60.0) -> Iterator[Asker]:
    asker = Asker(FaultObject(Context(), timeout))
    yield asker
    asker.fault.cancel(["dev"], None)
    for thread in asker.threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_message(world: World) -> None:
    """iommufd_compose_fault_message: the layout of struct iommu_hwpt_pgfault."""
    context = Context()
    fault, ioas = FaultObject(context), Ioas(context)
    device = world.add(world.iommu())
    bound = Device(context, device.endpoint)
    bound.attach(bound.hwpt_alloc(ioas, AllocFlags.PASID, fault=fault))
    bound.attach(bound.hwpt_alloc(ioas, AllocFlags.PASID, fault=fault), 7)
    for pasid, dma, flags in ((0, device.dma, 2), (7, device.dma.with_pasid(7), 3)):
        reader = threading.Thread(target=lambda dma=dma: dma.write(IOVA + 8, b"x"))  # type: ignore[misc]
        reader.start()
        found: list[PageFault] = []
        until(lambda found=found: found.extend(fault.read_faults()) or found, "the message")  # type: ignore[misc]
        (message,) = found
        assert (message.flags, message.dev_id, message.pasid, message.perm) == (flags, bound.id, pasid, 2)
        assert (message.addr, message.length, message.cookie) == (IOVA + 8, 0, 0)
        assert message.pack() == struct.pack("<IIIIIIQII", flags, bound.id, pasid, message.grpid, 2, 0, IOVA + 8, 0, 0)
        if not pasid:
            ioas.map(0, PAGE, R | W, IOVA)
        else:
            ioas.map(PAGE, PAGE, R | W, IOVA)
        assert fault.write_responses([(0, PageResponse.SUCCESS)]) == 1
        reader.join(10)
        assert not reader.is_alive()
        ioas.unmap_all()
    assert (world.ram[8:9], world.ram[PAGE + 8 : PAGE + 9]) == (b"x", b"x")


def test_cookies(world: World) -> None:
    """xa_alloc gives the smallest that is free; requests come in their order, as many as fit."""
    with asking() as asker:
        fault = asker.fault
        for number in range(4):
            asker.ask(number, access=W if number % 2 else R)
        with refused(errno.EINVAL):
            fault.read_faults(0)
        first = fault.read_faults(3)
        assert [(m.cookie, m.addr, m.grpid, m.perm) for m in first] == [
            (n, n * PAGE, n, 2 if n % 2 else 1) for n in range(3)
        ]
        fault.write_responses([(1, PageResponse.SUCCESS)])
        (last,) = fault.read_faults()
        assert (last.cookie, last.grpid) == (1, 3)
        assert fault.read_faults() == fault.read_faults(0) == []
        fault.write_responses([(1, PageResponse.INVALID)])
        until(lambda: set(asker.answers) == {1, 3}, "both answers")
        assert asker.answers == {1: PageResponse.SUCCESS, 3: PageResponse.INVALID}


def test_responses_that_are_wrong(world: World) -> None:
    """iommufd_fault_fops_write: those before the wrong one count, an error is for the first."""
    with asking() as asker:
        fault = asker.fault
        for number in range(3):
            asker.ask(number)
        with refused(errno.EINVAL):
            fault.write_responses([(0, PageResponse.SUCCESS)])  # not read yet
        fault.read_faults()
        for wrong in ((9, PageResponse.SUCCESS), (-1, 0), (0, PageResponse.FAILURE), (0, 2)):
            with refused(errno.EINVAL):
                fault.write_responses([wrong, (1, 0)])
        assert fault.write_responses([]) == 0
        assert fault.write_responses([(2, 0), (2, 0), (1, 0)]) == 1
        until(lambda: asker.answers, "the answer")
        assert asker.answers == {2: PageResponse.SUCCESS}
        with refused(errno.EINVAL):
            fault.write_responses([(2, 0)])


def test_a_detached_device(world: World) -> None:
    """iommufd_auto_response_faults: INVALID, and the cookie is gone."""
    with asking() as asker:
        asker.ask(0)
        asker.fault.read_faults()
        asker.fault.cancel(["dev"], None)
        until(lambda: asker.answers, "the answer")
        with refused(errno.EINVAL):
            asker.fault.write_responses([(0, 0)])
    assert asker.answers == {0: PageResponse.INVALID}


def test_cookies_of_requests_that_time_out(world: World) -> None:
    with asking(0.05) as asker:
        asker.ask(0)
        asker.fault.read_faults()
        until(lambda: asker.answers, "the end of the time")
        with refused(errno.EINVAL):
            asker.fault.write_responses([(0, 0)])
        assert asker.fault._cookies == {}


def test_without_a_timeout(world: World) -> None:
    """As Linux has none."""
    with asking(None) as asker:
        asker.ask(0)
        asker.fault.respond(asker.fault.read()[0], PageResponse.SUCCESS)
        until(lambda: asker.answers == {0: PageResponse.SUCCESS}, "the answer")
