"""Devices in two threads, and a driver in a third that maps, unmaps and attaches: nothing gets through afterwards."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.iommu.tables import TO_PAGE, TO_TABLE, index
from vmodel import _shim
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.pgtable import TableFormat
from vmodel.patience import patience
from vmodel.span import PAGE, MiB

RW = Access.READ | Access.WRITE
SECONDS = 0.5
RAM = 4 * MiB
IOVA = 0x1234_5678_9000
#: Where the device's page is; what is before it holds tables.
PLACE = 2 * MiB


class World:
    """A memfd of guest memory, and two requesters."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest-ram")
        os.ftruncate(self.fd, RAM)
        self.ram = mmap.mmap(self.fd, RAM)
        self.memory = _shim.Memory(_shim.Files(), 8)
        self.memory.map(0, RAM, RW, self.fd, 0)
        self.requesters = [_shim.Requester(self.memory) for _ in range(2)]
        for requester in self.requesters:
            requester.enable(True)

    def put(self, gpa: int, value: int) -> None:
        self.ram[gpa : gpa + 8] = value.to_bytes(8, "little")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.ram.close()
    os.close(world.fd)


@contextmanager
def devices(world: World, iova: int, size: int, pasid: int = _shim.NO_PASID) -> Iterator[list[int]]:
    """Both requesters write and translate all the time; how often it succeeded.  What they raise is raised here."""
    stop = threading.Event()
    done, errors = [0, 0], list[BaseException]()

    def run(n: int) -> None:
        requester, data = world.requesters[n], b"\xff" * size
        try:
            while not stop.is_set():
                try:
                    requester.write(iova, data, pasid)
                    requester.translate([iova], Access.READ, pasid)
                    done[n] += 1
                except DmaFault as fault:
                    assert fault.reason in (Reason.NOT_MAPPED, Reason.BLOCKED, Reason.PASID), fault
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def drive(world: World, done: list[int], size: int, on: Callable[[], object], off: Callable[[], object]) -> None:
    """Lets the devices in and shuts them out, over and over; the page stays as it is while they are out."""
    begin, rounds, zeros = time.monotonic(), 0, bytes(size)
    view = memoryview(world.ram)[PLACE : PLACE + size]
    try:
        # However slow the machine is: some rounds.
        while time.monotonic() < begin + SECONDS or rounds < 5:
            before = list(done)
            on()
            # Until both have been at it, so that both have the translation.
            while any(now == was for now, was in zip(done, before, strict=True)):
                assert time.monotonic() < begin + patience(30), "a device does not get through"
                time.sleep(0)
            off()
            view[:] = zeros
            for _ in range(3):
                time.sleep(0.0002)
                assert view == zeros, f"a write got through after round {rounds}"
            rounds += 1
    finally:
        view.release()


@pytest.mark.parametrize("size", [8, 3 * PAGE], ids=["page", "range"])
def test_unmap(world: World, size: int) -> None:
    domain = _shim.Domain.paging(PAGE, 0, 2**48 - 1, RAM - 1, 100)
    whole = -(-size // PAGE) * PAGE
    for requester in world.requesters:
        requester.attach(domain)
    with devices(world, IOVA, size) as done:
        drive(world, done, size, lambda: domain.map(IOVA, PLACE, whole, RW), lambda: domain.unmap(IOVA, whole))
    for requester in world.requesters:
        with pytest.raises(DmaFault) as caught:
            requester.write(IOVA, b"x")
        assert caught.value.reason == Reason.NOT_MAPPED


def test_unmap_with_a_flush_of_its_own(world: World) -> None:
    domain = _shim.Domain.paging(PAGE, 0, 2**48 - 1, RAM - 1, 100)
    for requester in world.requesters:
        requester.attach(domain, 5)

    def off() -> None:
        domain.unmap(IOVA, PAGE, _shim.UNMAP_DEFER)
        domain.flush(IOVA, IOVA)

    with devices(world, IOVA, 8, 5) as done:
        drive(world, done, 8, lambda: domain.map(IOVA, PLACE, PAGE, RW), off)


def test_a_ledger_of_what_is_mapped_and_used(world: World) -> None:
    """It is read, and left and followed again, while two devices use what two threads map and attach."""
    domain = _shim.Domain.paging(PAGE, 0, 2**48 - 1, RAM - 1, 100)
    ledger = _shim.Ledger()
    for n, requester in enumerate(world.requesters):
        ledger.follow(requester, n, notified=False)
        requester.attach(domain)
    turn = iter(range(10**9))

    def off() -> None:
        domain.unmap(IOVA, PAGE)
        ledger.released()
        _shim.Ledger.incident(world.requesters[0], _shim.IncidentKind.OFF, IOVA, RW)
        assert not any(use.start == IOVA for use in ledger.live())
        if next(turn) % 4 == 0:
            ledger.follow(world.requesters[1], 1, notified=False)

    with devices(world, IOVA, 8) as done:
        drive(world, done, 8, lambda: domain.map(IOVA, PLACE, PAGE, RW), off)
    totals = ledger.totals()
    assert totals.mapped == totals.ended + totals.live and totals.ended
    assert all(not use.written % 8 and use.touched == 8 for _, use in ledger.ended() if use.written)


def test_attach(world: World) -> None:
    """Once attach has returned, nothing goes by the old domain."""
    domain = _shim.Domain.paging(PAGE, 0, 2**48 - 1, RAM - 1, 100)
    domain.map(IOVA, PLACE, PAGE, RW)
    blocked = _shim.Domain.plain(_shim.DOMAIN_BLOCKED)
    others = [blocked, _shim.Domain.paging(PAGE, 0, 2**48 - 1, RAM - 1, 100), None]
    turn = iter(range(10**9))

    def to(which: _shim.Domain | None) -> None:
        for requester in world.requesters:
            requester.attach(which, 9)

    with devices(world, IOVA, 8, 9) as done:
        drive(world, done, 8, lambda: to(domain), lambda: to(others[next(turn) % 3]))


def nest(world: World, parent: _shim.Domain, format: TableFormat = TableFormat.X86) -> _shim.Domain:
    """Stage 1 at GPA 0x1000 to 0x4000 of the parent's world; its page is at 0x5000."""
    for level, at in ((4, 0x1000), (3, 0x2000), (2, 0x3000)):
        world.put(at + 8 * index(IOVA, level), TO_TABLE[format](level - 1) | at + 0x1000)
    world.put(0x4000 + 8 * index(IOVA, 1), TO_PAGE[format](1) | 0x5000)
    return _shim.Domain.table(world.memory, format, 4, 0x1000, 48, 40, 0, parent)


def test_a_parent_flushes_what_is_nested_in_it(world: World) -> None:
    parent = _shim.Domain.paging(PAGE, 0, 2**48 - 1, RAM - 1, 100)
    parent.map(0x1000, 0x1000, 4 * PAGE, RW)
    nested = [nest(world, parent), nest(world, parent)]
    for requester, domain in zip(world.requesters, nested, strict=True):
        requester.attach(domain)
    with devices(world, IOVA, 8) as done:
        drive(world, done, 8, lambda: parent.map(0x5000, PLACE, PAGE, RW), lambda: parent.unmap(0x5000, PAGE))
        with pytest.raises(DmaFault) as caught:
            world.requesters[0].write(IOVA + 8, b"x")
        assert (caught.value.reason, caught.value.stage, caught.value.gpa) == (Reason.NOT_MAPPED, 2, 0x5008)


def test_a_guest_changes_its_tables(world: World) -> None:
    """Entry written, then the flush that the guest asks for: the same promise as an unmap's."""
    parent = _shim.Domain.paging(PAGE, 0, 2**48 - 1, RAM - 1, 100)
    parent.map(0x1000, 0x1000, 4 * PAGE, RW)
    parent.map(0x5000, PLACE, PAGE, RW)
    domain = nest(world, parent)
    for requester in world.requesters:
        requester.attach(domain)
    slot = 0x4000 + 8 * index(IOVA, 1)

    def off() -> None:
        # Not a plain store: the walk sets flags in the entry meanwhile, by compare-and-swap.
        world.put(slot, 0)
        domain.flush(IOVA, IOVA + PAGE - 1)

    with devices(world, IOVA, 8) as done:
        drive(world, done, 8, lambda: world.put(slot, TO_PAGE[TableFormat.X86](1) | 0x5000), off)


def test_all_at_once(world: World) -> None:
    """Attachments come and go, domains are made and thrown away, all while both devices and two drivers are at work."""
    shared = _shim.Domain.paging(PAGE, 0, 2**48 - 1, RAM - 1, 1000)
    shared.map(0x1000, 0x1000, 4 * PAGE, RW)
    shared.map(0x5000, PLACE, PAGE, RW)
    for requester in world.requesters:
        requester.attach(shared)
    end, errors = time.monotonic() + SECONDS, list[BaseException]()
    counts: list[list[int]] = []

    def going() -> bool:
        """For SECONDS, and on a busy machine until both devices have done something."""
        now = time.monotonic()
        return now < end or (now < end + patience(20) and not all(sum(count) for count in counts))

    def mapper() -> None:
        n = 0
        while going():
            shared.map(IOVA, PLACE, PAGE, RW)
            for i in range(50):
                shared.map((i + 64) * PAGE, PLACE, PAGE, RW)
            assert shared.unmap(64 * PAGE, 50 * PAGE, n % 2) == 50 * PAGE
            assert shared.unmap(IOVA, PAGE) == PAGE
            n += 1

    def attacher() -> None:
        n = 0
        while going():
            for requester in world.requesters:
                for pasid in (_shim.NO_PASID, 3):
                    which: list[_shim.Domain | None] = [shared, nest(world, shared), None]
                    requester.attach(which[n % 3] if pasid == 3 else shared, pasid)
                    n += 1
            shared.flush(0, 2**64 - 1)

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in (mapper, attacher)]
    with devices(world, IOVA, 8) as one, devices(world, IOVA, 8, 3) as two:
        counts += [one, two]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS + patience(20) + 20)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors, errors
    assert sum(one) and sum(two)
