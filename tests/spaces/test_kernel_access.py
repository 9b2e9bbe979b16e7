"""Kernel accesses: what an unmap waits for, and what ends while it does."""

from __future__ import annotations

import errno
import threading
import tracemalloc
from collections.abc import Callable

import pytest

from tests.spaces.world import RAM, RW, World, refused
from tests.waiting import until
from vmodel.errors import Access, IommuError
from vmodel.iommu.iommufd import Context, Device, Ioas, KernelAccess
from vmodel.iommu.iommufd.kernel_access import MOST_READ
from vmodel.span import PAGE, GiB, Span

IOVA = 1 << 24


@pytest.fixture
def context() -> Context:
    return Context()


@pytest.fixture
def ioas(context: Context) -> Ioas:
    return Ioas(context)


class Driver:
    """A kernel driver whose `unmap` calls `answer`."""

    def __init__(self, world: World, ioas: Ioas, answer: Callable[[int, int], None]) -> None:
        self.notified: list[tuple[int, int]] = []
        self.answer = answer
        self.access = KernelAccess(ioas.context, world.memory, self.unmap)
        self.access.attach(ioas)

    def unmap(self, iova: int, size: int) -> None:
        self.notified.append((iova, size))
        self.answer(iova, size)


def keep(iova: int, size: int) -> None:
    """Does not unpin."""


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_what_is_not_unpinned_stays_mapped(world: World, ioas: Ioas) -> None:
    """iopt_unmap_iova_range: notified 101 times, then EDEADLOCK; it is out of use, and goes once it is unpinned."""
    driver, other = Driver(world, ioas, keep), Driver(world, ioas, keep)
    for n in range(3):
        ioas.map(n * PAGE, PAGE, iova=IOVA + n * PAGE)
    driver.access.pin_pages(IOVA + PAGE, PAGE)
    with refused(errno.EDEADLOCK):
        ioas.unmap(IOVA, 3 * PAGE)
    assert driver.notified == other.notified == [(IOVA + PAGE, PAGE)] * 101
    assert [area.span.start for area in ioas.mappings()] == [IOVA + PAGE, IOVA + 2 * PAGE], "what is before has gone"
    with refused(errno.EINVAL):
        other.access.pin_pages(IOVA + PAGE, PAGE)
    with refused(errno.EINVAL):
        other.access.read(IOVA + PAGE, 1)
    with refused(errno.EINVAL):
        other.access.write(IOVA + PAGE, b"x")
    assert len(other.access.read(IOVA + 2 * PAGE, PAGE)) == PAGE
    driver.access.unpin_pages(IOVA + PAGE, PAGE)
    assert ioas.unmap(IOVA, 3 * PAGE) == 2 * PAGE


def test_unpinned_after_a_while(world: World, ioas: Ioas) -> None:
    """The unmap goes on with what comes after."""

    def last_time(iova: int, size: int) -> None:
        if len(driver.notified) == 101:
            driver.access.unpin_pages(iova, size)
        if len(driver.notified) == 50:
            driver.access.unpin_pages(IOVA, PAGE)

    driver = Driver(world, ioas, last_time)
    for n in (0, 4, 8):
        ioas.map(0, PAGE, iova=IOVA + n * PAGE)
    driver.access.pin_pages(IOVA, PAGE)
    driver.access.pin_pages(IOVA + 4 * PAGE, PAGE)
    assert ioas.unmap(IOVA, 9 * PAGE) == 3 * PAGE
    assert driver.notified == [(IOVA, PAGE)] * 50 + [(IOVA + 4 * PAGE, PAGE)] * 51


def test_unmap_that_would_cut_what_is_pinned(world: World, ioas: Ioas) -> None:
    driver = Driver(world, ioas, keep)
    ioas.map(0, 2 * PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    with refused(errno.ENOENT):
        ioas.unmap(IOVA, PAGE)
    assert driver.notified == [] and driver.access.pin_pages(IOVA, PAGE) == [Span(0, PAGE - 1)]


def test_unpinned_by_another_thread(world: World, ioas: Ioas) -> None:
    """The lock is not held while the driver is notified: another thread may call, and DMA goes on."""

    def by_other(iova: int, size: int) -> None:
        thread = in_thread(lambda: driver.access.unpin_pages(iova, size))
        thread.join(10)
        assert not thread.is_alive(), "it waits for the lock"
        assert device.reads(IOVA) == 0, "still mapped"

    device = world.add(world.iommu())
    Device(ioas.context, device.endpoint).attach(ioas)
    driver = Driver(world, ioas, by_other)
    ioas.map(0, PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    assert ioas.unmap(IOVA, PAGE) == PAGE and device.reads(IOVA) is None


def test_an_exception_of_the_driver(world: World, ioas: Ioas) -> None:
    def fail(iova: int, size: int) -> None:
        raise ZeroDivisionError

    driver = Driver(world, ioas, fail)
    ioas.map(0, PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    for call in (lambda: ioas.unmap(IOVA, PAGE), lambda: ioas.unmap_all()):
        with pytest.raises(ZeroDivisionError):
            call()
    assert len(ioas.mappings()) == 1
    with pytest.raises(ZeroDivisionError):
        driver.access.detach()
    assert driver.access.ioas is None and ioas.accesses == [] and ioas.users == 0


def test_destroy_waits_for_unmap(world: World, ioas: Ioas) -> None:
    """iommufd_access_destroy; inside of the call it is EBUSY."""
    inside, go = threading.Event(), threading.Event()

    def wait(iova: int, size: int) -> None:
        if size == PAGE:
            inside.set()
            assert go.wait(10)
            with refused(errno.EBUSY):
                driver.access.destroy()
            driver.access.unpin_pages(iova, size)

    driver = Driver(world, ioas, wait)
    ioas.map(0, PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    unmap = in_thread(lambda: ioas.unmap(IOVA, PAGE))
    assert inside.wait(10)
    destroy = in_thread(driver.access.destroy)
    until(lambda: driver.access.ending, "destroy waits")
    assert destroy.is_alive()
    go.set()
    unmap.join(10)
    destroy.join(10)
    assert ioas.mappings() == [] and ioas.accesses == [] and ioas.users == 0
    for call in (driver.access.destroy, driver.access.detach, lambda: driver.access.attach(ioas)):
        with refused(errno.ENOENT):
            call()


def test_nobody_attaches_what_is_being_destroyed(world: World, ioas: Ioas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last detach and the end there is a moment without the lock."""
    access, second = KernelAccess(ioas.context, world.memory), Ioas(ioas.context)
    access.attach(ioas)
    change = access._change

    def changed(*args: object, **more: object) -> None:
        change(*args, **more)  # type: ignore[arg-type]
        monkeypatch.undo()
        with refused(errno.EBUSY):
            access.attach(second)

    monkeypatch.setattr(access, "_change", changed)
    access.destroy()
    assert (second.users, ioas.users, access.ioas) == (0, 0, None)
    ioas.context.close()


def test_detached_meanwhile(world: World, ioas: Ioas) -> None:
    """While it is notified, only the IOAS that it leaves can be unpinned (iommufd_access_change_ioas)."""
    other = Ioas(ioas.context)

    def look(iova: int, size: int) -> None:
        assert (iova, size) == (0, 2**64 - 1)
        with refused(errno.ENOENT):
            driver.access.pin_pages(IOVA, PAGE)
        with refused(errno.ENOENT):
            driver.access.read(IOVA, 1)
        with refused(errno.EBUSY):
            driver.access.attach(other)
        with refused(errno.ENOENT):
            driver.access.replace(other)
        driver.access.detach()
        driver.access.unpin_pages(IOVA, PAGE)

    driver = Driver(world, ioas, look)
    ioas.map(0, PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    driver.access.replace(other)
    assert driver.access.ioas is other and len(driver.notified) == 1
    ioas.destroy()
    with refused(errno.EBUSY):
        other.destroy()


def test_what_is_pinned_over_a_detach_stays_so(world: World, ioas: Ioas) -> None:
    """As in Linux, where it warns."""
    driver = Driver(world, ioas, keep)
    ioas.map(0, PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    driver.access.detach()
    with refused(errno.EINVAL):
        driver.access.unpin_pages(IOVA, PAGE)
    with refused(errno.EDEADLOCK):
        ioas.unmap_all()


def test_close_with_what_is_pinned(world: World, context: Context, ioas: Ioas) -> None:
    """The driver gives its access back first, and is notified."""
    driver = Driver(world, ioas, lambda iova, size: driver.access.unpin_pages(IOVA, PAGE))
    ioas.map(0, PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    context.close()
    assert driver.notified == [(0, 2**64 - 1)] and not context._objects


def test_alignment(world: World, context: Context, ioas: Ioas) -> None:
    """iopt_calculate_iova_alignment: 4 KiB for pins, one byte else; a mapping that does not fit is EADDRINUSE."""
    reader = KernelAccess(context, world.memory)
    reader.attach(ioas)
    assert ioas.alignment == 1
    ioas.map(5, 3, iova=7)
    assert ioas.mappings()[0].span == Span(7, 9) and len(reader.read(8, 2)) == 2
    access = KernelAccess(context, world.memory, keep)
    with refused(errno.EADDRINUSE):
        access.attach(ioas)
    assert ioas.accesses == [reader] and ioas.users == 1 and access.ioas is None
    bound = Device(context, world.add(world.iommu()).endpoint)
    with refused(errno.EADDRINUSE):
        bound.attach(ioas)
    ioas.unmap_all()
    access.attach(ioas)
    assert ioas.alignment == PAGE
    with refused(errno.EINVAL):
        ioas.map(5, 3, iova=7)
    access.detach()
    assert ioas.alignment == 1


def test_chosen_iovas_of_bytes(ioas: Ioas) -> None:
    """iopt_alloc_iova: as aligned as the memory, with its offset in the page."""
    assert ioas.map(0x1800, PAGE) == 0x1800
    assert ioas.map(0x2345, 3) == 0x1345
    assert ioas.map(0x2345, 3) == 0x134D, "the first free byte is 0x1348: its bits and those of the offset"
    assert ioas.map(0, 5) == PAGE


def test_pins_of_several_mappings(world: World, ioas: Ioas) -> None:
    """iopt_area_contig_is_aligned: mappings in the middle are whole pages; the ends of the range need not be."""
    pins = Driver(world, ioas, keep).access
    ioas.map(8 * PAGE, PAGE, iova=IOVA)
    ioas.map(4 * PAGE, 2 * PAGE, iova=IOVA + PAGE)
    assert pins.pin_pages(IOVA, 2 * PAGE + 1) == [Span.sized(8 * PAGE, PAGE), Span.sized(4 * PAGE, 2 * PAGE)]
    assert pins.pin_pages(IOVA + PAGE, 1, RW) == [Span.sized(4 * PAGE, PAGE)]
    pins.unpin_pages(IOVA, 2 * PAGE + 1)
    with refused(errno.EINVAL):
        pins.unpin_pages(IOVA, PAGE)
    pins.unpin_pages(IOVA + PAGE, 1)
    assert ioas.unmap_all() == 3 * PAGE


def test_pins_of_a_write_only_mapping(world: World, ioas: Ioas) -> None:
    """check_area_prot: what may be written need not be readable."""
    pins = Driver(world, ioas, keep).access
    ioas.map(0, PAGE, Access.WRITE, IOVA)
    pins.pin_pages(IOVA, PAGE, Access.WRITE)
    pins.write(IOVA, b"abc")
    assert world.ram[:3] == b"abc"
    with refused(errno.EPERM):
        pins.pin_pages(IOVA, PAGE)
    with refused(errno.EPERM):
        pins.read(IOVA, 1)


def test_pins_and_unmaps_in_threads(world: World, ioas: Ioas) -> None:
    """A driver that pins, another that attaches, and unmaps: each unmap ends, and nothing is left."""
    context, lock, pins = ioas.context, threading.Lock(), list[tuple[int, int]]()

    def unpin(iova: int, size: int) -> None:
        with lock:
            for pin in [pin for pin in pins if pin[0] < iova + size and iova < sum(pin)]:
                pins.remove(pin)
                access.unpin_pages(*pin)

    access = KernelAccess(context, world.memory, unpin)
    access.attach(ioas)
    device = Device(context, world.add(world.iommu()).endpoint)
    failed: list[BaseException] = []

    def repeat(call: Callable[[int], object], *allowed: int) -> None:
        try:
            for n in range(200):
                try:
                    call(n)
                except IommuError as error:
                    assert error.errno in allowed, error
        except BaseException as error:
            failed.append(error)

    def pin(n: int) -> None:
        with lock:
            access.pin_pages(IOVA + n % 4 * PAGE, PAGE)
            pins.append((IOVA + n % 4 * PAGE, PAGE))

    def attach(n: int) -> None:
        device.attach(ioas)
        device.detach()

    threads = [
        in_thread(lambda: repeat(lambda n: ioas.map(0, PAGE, iova=IOVA + n % 4 * PAGE), errno.EEXIST)),
        in_thread(lambda: repeat(pin, errno.ENOENT, errno.EINVAL)),
        in_thread(lambda: repeat(lambda n: ioas.unmap(IOVA + n % 4 * PAGE, PAGE), errno.ENOENT)),
        in_thread(lambda: repeat(attach)),
    ]
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failed == []
    ioas.unmap_all()
    assert pins == [] and context.process.pinned == 0 and ioas.mappings() == []


@pytest.mark.parametrize("size", [MOST_READ + 1, 8 * GiB, 1 << 62, (1 << 64) - IOVA])
def test_large_reads(size: int, world: World, ioas: Ioas) -> None:
    """The result is new memory: it has a limit.  What comes first in iommufd_access_rw is said first."""
    driver = Driver(world, ioas, keep)
    with refused(errno.ENOENT):
        driver.access.read(IOVA, size)
    ioas.map(0, size & -PAGE or PAGE, iova=IOVA)
    tracemalloc.start()
    try:
        with refused(errno.EFAULT):  # there is no memory behind the first 4 MiB
            driver.access.read(IOVA, size)
        assert tracemalloc.get_traced_memory()[1] < 4 * RAM
    finally:
        tracemalloc.stop()


def test_reads_have_a_limit(world: World, ioas: Ioas) -> None:
    """The result is new memory, in Linux a buffer of the caller's."""
    driver = Driver(world, ioas, keep)
    for n in range(2 * MOST_READ // RAM):
        ioas.map(0, RAM, iova=IOVA + n * RAM)
    world.ram[RAM - 1 :] = b"x"
    got = driver.access.read(IOVA, MOST_READ)
    assert len(got) == MOST_READ and got.count(b"x") == MOST_READ // RAM
    for size in (MOST_READ + 1, 2 * MOST_READ, 8 * GiB, 1 << 62):
        with refused(errno.ENOMEM):
            driver.access.read(IOVA, size)
    assert driver.access.read(IOVA + MOST_READ, PAGE) == got[:PAGE]


# ---- drivers that do what Linux's cannot -----------------------------------------------------------


def test_a_callback_that_unmaps(world: World, ioas: Ioas) -> None:
    """What is pinned is refused, as the callback would be called in itself again; what is not, goes."""
    seen: list[int] = []

    def unmap(iova: int, size: int) -> None:
        for at in (IOVA, IOVA + 4 * PAGE):
            with refused(errno.EDEADLOCK):
                ioas.unmap(at, PAGE)
        assert ioas.unmap(IOVA + 8 * PAGE, PAGE) == PAGE
        seen.append(iova)
        driver.access.unpin_pages(iova, size)

    driver = Driver(world, ioas, unmap)
    for n in (0, 4, 8):
        ioas.map(0, PAGE, iova=IOVA + n * PAGE)
    for n in (0, 4):
        driver.access.pin_pages(IOVA + n * PAGE, PAGE)
    assert ioas.unmap(IOVA, PAGE) == PAGE and seen == [IOVA]
    assert [m.span.start for m in ioas.mappings()] == [IOVA + 4 * PAGE]
    driver.access.pin_pages(IOVA + 4 * PAGE, PAGE)  # what was refused has changed nothing


def test_callbacks_that_unmap_in_turn(world: World, ioas: Ioas) -> None:
    """Each unmaps what the other has pinned, in another address space."""
    other = Ioas(ioas.context)

    def there(iova: int, size: int) -> None:
        first.access.unpin_pages(iova, size)
        assert other.unmap(IOVA, PAGE) == PAGE

    def back(iova: int, size: int) -> None:
        with refused(errno.EDEADLOCK):
            ioas.unmap(IOVA + PAGE, PAGE)
        second.access.unpin_pages(iova, size)

    first, second = Driver(world, ioas, there), Driver(world, other, back)
    for n in range(2):
        ioas.map(0, PAGE, iova=IOVA + n * PAGE)
        first.access.pin_pages(IOVA + n * PAGE, PAGE)
    other.map(0, PAGE, iova=IOVA)
    second.access.pin_pages(IOVA, PAGE)
    assert ioas.unmap(IOVA, PAGE) == PAGE
    assert (len(first.notified), len(second.notified)) == (1, 1)


def test_a_callback_that_unmaps_while_it_is_detached(world: World, ioas: Ioas) -> None:
    def unmap(iova: int, size: int) -> None:
        with refused(errno.EDEADLOCK):
            ioas.unmap_all()
        driver.access.unpin_pages(IOVA, PAGE)
        assert ioas.unmap_all() == PAGE

    driver = Driver(world, ioas, unmap)
    ioas.map(0, PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    driver.access.detach()
    assert len(driver.notified) == 1 and ioas.mappings() == []


@pytest.mark.parametrize("step", [PAGE, 16 * PAGE])
def test_a_callback_that_pins_more_and_more(step: int, world: World, ioas: Ioas) -> None:
    """An end comes: 101 times for each mapping that there was (the tries of iopt_unmap_iova_range begin again)."""

    def further(iova: int, size: int) -> None:
        assert len(driver.notified) < 400
        driver.access.unpin_pages(iova, size)
        ioas.map(0, PAGE, iova=iova + step)
        driver.access.pin_pages(iova + step, PAGE)

    driver = Driver(world, ioas, further)
    ioas.map(0, PAGE, iova=IOVA)
    driver.access.pin_pages(IOVA, PAGE)
    with refused(errno.EDEADLOCK):
        ioas.unmap_all()
    assert len(driver.notified) == 101 and len(ioas.mappings()) == 2
    driver.answer = lambda iova, size: driver.access.unpin_pages(iova, size)
    assert ioas.unmap_all() == 2 * PAGE


def test_all_are_notified_before_an_exception(world: World, ioas: Ioas) -> None:
    def fail(iova: int, size: int) -> None:
        raise ZeroDivisionError

    first = Driver(world, ioas, fail)
    second = Driver(world, ioas, lambda iova, size: second.access.unpin_pages(iova, size))
    ioas.map(0, PAGE, iova=IOVA)
    second.access.pin_pages(IOVA, PAGE)
    with pytest.raises(ZeroDivisionError):
        ioas.unmap(IOVA, PAGE)
    assert first.notified == second.notified == [(IOVA, PAGE)]
    assert ioas.unmap(IOVA, PAGE) == PAGE, "nobody has it any more"


def test_one_close_is_enough(world: World, context: Context, ioas: Ioas) -> None:
    """However many drivers fail, all is given back, and what they raised is raised."""

    def fail(iova: int, size: int) -> None:
        raise ZeroDivisionError

    device = world.add(world.iommu())
    Device(context, device.endpoint).attach(ioas)
    drivers = [Driver(world, ioas, fail) for _ in range(3)]
    ioas.map(0, PAGE, iova=IOVA)
    drivers[1].access.pin_pages(IOVA, PAGE)
    with pytest.raises(ExceptionGroup) as raised:
        context.close()
    assert [type(error) for error in raised.value.exceptions] == [ZeroDivisionError] * 3
    assert [driver.notified for driver in drivers] == [[(0, 2**64 - 1)]] * 3
    assert not context._objects and device.group.owner is None and device.reads(PAGE) == PAGE
    context.close()
