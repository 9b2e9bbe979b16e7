"""Shadow doorbells.  Section numbers are those of NVMe 1.4."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from tests.nvme.driver import SIZE, Driver, Pair, name, prps
from vmodel.devices.nvme import arbiter
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.queue import SubmissionQueue

CONFIG, FLUSH = 0x7C, 0x00


class Shadow:
    """The driver's two pages: shadow doorbells, and their EventIdx values, up to which no doorbell is needed."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.doorbells, self.indexes = driver.memory.take(4096), driver.memory.take(4096)
        done = driver.admin.send(CONFIG, dptr=prps(self.doorbells, self.indexes))
        assert done.status == 0, name(done)

    def _at(self, pair: Pair, completion: bool) -> int:
        return (2 * pair.qid + completion) * self.driver.stride

    def put(self, pair: Pair, value: int, *, completion: bool = False) -> None:
        self.driver.memory.write(self.doorbells + self._at(pair, completion), struct.pack("<I", value))

    def index(self, pair: Pair, *, completion: bool = False) -> int:
        return int(struct.unpack("<I", self.driver.memory.read(self.indexes + self._at(pair, completion), 4))[0])


@pytest.fixture(params=[True, False], ids=["fast", "general"])
def driver(request: pytest.FixtureRequest, started: Callable[..., Driver]) -> Driver:
    """A controller that offers it."""
    return started(fast_path=request.param, namespaces=[{"memory": "1M"}])


def read(driver: Driver, block: int) -> NvmeCommand:
    return NvmeCommand.make(0x02, nsid=1, cdw10=block, dptr=prps(driver.page))


def test_is_offered_unless_a_parameter_says_no(driver: Driver, started: Callable[..., Driver]) -> None:
    assert driver.identify(1)[257] & 1
    other = started(shadow_doorbells=False)
    assert not other.identify(1)[257] & 1
    assert name(other.admin.send(CONFIG, dptr=prps(4096, 8192))) == "INVALID_OPCODE"


@pytest.mark.parametrize("pointer", [prps(4096 + 4, 8192), prps(4096, 8192 + 64)])
def test_pages_that_are_none(driver: Driver, pointer: bytes) -> None:
    assert name(driver.admin.send(CONFIG, dptr=pointer)) == "INVALID_FIELD"


@pytest.mark.parametrize("before", [True, False])
def test_one_doorbell_for_what_is_there(driver: Driver, before: bool) -> None:
    """Queues made before and after it was set up have it."""
    if before:
        pair = driver.create(1)
    shadow = Shadow(driver)
    if not before:
        pair = driver.create(1)
    cids = [pair.write(read(driver, n)) for n in range(5)]
    shadow.put(pair, 5)
    driver.doorbell(1, 1)  # rung for the first of them
    driver.run()
    assert [completion.cid for completion in pair.wait(5)] == cids
    driver.until(lambda: shadow.index(pair) == 5)  # the next command needs a doorbell


def test_a_late_doorbell(driver: Driver) -> None:
    """A doorbell with an older value than the shadow's does not repeat commands."""
    pair = driver.create(1)
    shadow = Shadow(driver)
    for n in range(8):
        pair.write(read(driver, n))
    shadow.put(pair, 8)
    driver.doorbell(1, 1)
    driver.run()
    driver.doorbell(1, 3)
    driver.run()
    found = pair.wait(8)
    assert [completion.sq_head for completion in found] == list(range(1, 9))
    assert not pair.reap()


def test_completion_queues(driver: Driver) -> None:
    """A full one looks at the shadow before it waits."""
    pair = driver.create(1, 8)
    shadow = Shadow(driver)
    for n in range(7):
        pair.write(read(driver, n))
    shadow.put(pair, 7)
    driver.doorbell(1, 7)
    driver.run()
    assert pair.head == 0 and len(peek(pair)) == 7
    for n in range(4):
        pair.write(read(driver, n))
    # The driver has taken four, and reports it in memory only.
    shadow.put(pair, 4, completion=True)
    shadow.put(pair, (7 + 4) % 8)
    driver.doorbell(1, (7 + 4) % 8)
    driver.run()
    # An older doorbell arrives: it is no mistake.
    request = driver.admin.write(NvmeCommand.make(0x0C))
    driver.admin.ring()
    driver.doorbell(1, 2, completion=True)
    driver.run()
    assert not driver.admin.reap(), request
    pair.head = 4
    assert len(pair.reap()) == 7


def peek(pair: Pair) -> list[int]:
    """Identifiers in the completion queue's memory in its first round."""
    raw = pair.driver.memory.read(pair.cq, 16 * pair.completions)
    return [cid for cid, status in (struct.unpack_from("<HH", raw, 16 * n + 12) for n in range(8)) if status & 1]


def test_memory_that_is_not_there(driver: Driver) -> None:
    """4.6.1.2.1: an error while data of a command was moved is Data Transfer Error; nothing else has changed."""
    pair = driver.create(1)
    for where in (prps(1 << 40, driver.page), prps(driver.page, 1 << 40), prps(1 << 63, (1 << 64) - 4096)):
        assert name(driver.admin.send(CONFIG, dptr=where)) == "DATA_TRANSFER_ERROR"
    assert pair.send(FLUSH, nsid=1).status == 0


def test_memory_that_goes(driver: Driver) -> None:
    """A shadow that cannot be reached any more is as a queue that cannot: fatal."""
    pair = driver.create(1)
    shadow = Shadow(driver)
    driver.device.memory.unmap(0, SIZE)
    for at, size in ((0, shadow.doorbells), (shadow.indexes, SIZE - shadow.indexes)):
        driver.device.memory.map(at, size, fd=os.dup(driver.memory.fd), offset=at)
    pair.write(read(driver, 0))
    driver.doorbell(1, 1)
    driver.run()
    assert driver.status.CFS
    driver.disable()
    driver.enable()
    assert driver.create(1).send(FLUSH, nsid=1).status == 0


def test_shadows_that_say_what_cannot_be(driver: Driver) -> None:
    pair = driver.create(1, 8)
    shadow = Shadow(driver)
    for value in (8, 0xFFFF_FFFF):
        shadow.put(pair, value)
        shadow.put(pair, value, completion=True)
        driver.doorbell(1, 0)
        driver.doorbell(1, 0, completion=True)
        driver.run()
        assert not driver.status.CFS
    pair.write(read(driver, 0))
    shadow.put(pair, 1)
    driver.doorbell(1, 1)
    driver.run()
    assert len(peek(pair)) == 1


def test_a_reset_ends_it(driver: Driver) -> None:
    Shadow(driver)
    driver.disable()
    driver.enable()
    assert driver.create(1).send(FLUSH, nsid=1).status == 0


# ---- drivers that go by the specification, and those that always ring --------------------------------


class ByTheBook:
    """A driver that writes a queue's doorbells to memory, and rings only where EventIdx says so (7.13)."""

    def __init__(self, shadow: Shadow, pair: Pair) -> None:
        self.shadow, self.pair = shadow, pair
        self.tail, self.head = pair.tail, pair.head
        self.rung = 0

    def _update(self, old: int, new: int, *, completion: bool = False) -> None:
        self.shadow.put(self.pair, new, completion=completion)
        index = self.shadow.index(self.pair, completion=completion)
        # Whether EventIdx is among the values that were passed.
        if (new - index - 1) & 0xFFFF < (new - old) & 0xFFFF:
            self.rung += 1
            self.shadow.driver.doorbell(self.pair.qid, new, completion=completion)

    def submit(self, *commands: NvmeCommand) -> list[int]:
        cids = []
        for command in commands:
            cids.append(self.pair.write(command))
            self._update(self.tail, self.pair.tail)
            self.tail = self.pair.tail
        return cids

    def reap(self) -> list[int]:
        """Identifiers of what has been completed since."""
        pair, found = self.pair, []
        while True:
            raw = pair.driver.memory.read(pair.cq + 16 * pair.head, 16)
            if raw[14] & 1 != pair.phase:
                return found
            found.append(int.from_bytes(raw[12:14], "little"))
            pair.head += 1
            if pair.head == pair.completions:
                pair.head, pair.phase = 0, pair.phase ^ 1
            self._update(self.head, pair.head, completion=True)
            self.head = pair.head


def finish(book: ByTheBook, count: int) -> list[int]:
    """The next completions; nothing but what the driver has rung wakes the device."""
    found: list[int] = []
    for _ in range(10 * count):
        book.shadow.driver.run()
        found += book.reap()
        if len(found) >= count:
            return found
    raise AssertionError(f"{len(found)} of {count} completions have come")


KEEP_ALIVE = 0x18


def test_the_admin_queue_by_the_book(driver: Driver) -> None:
    """5.7: entries 0 and 1 are the admin queue's; a host that rings only when EventIdx is passed is served."""
    for _ in range(5):
        driver.admin.send(KEEP_ALIVE)
    shadow = Shadow(driver)
    book = ByTheBook(shadow, driver.admin)
    for n in range(100):
        count = n % 4 + 1
        cids = book.submit(*[NvmeCommand.make(KEEP_ALIVE)] * count)
        assert finish(book, count) == cids
    assert book.rung < 2 * 250, "not every command and completion needs a doorbell"


def test_the_admin_queue_of_drivers_that_always_ring(driver: Driver) -> None:
    """Linux and SPDK leave the admin queue's entries as they are."""
    for _ in range(5):
        driver.admin.send(KEEP_ALIVE)
    shadow = Shadow(driver)
    pair = driver.create(1)
    book = ByTheBook(shadow, pair)
    for n in range(100):
        assert driver.admin.send(KEEP_ALIVE).status == 0
        if n % 10 == 0:
            cids = book.submit(read(driver, 0))
            assert finish(book, 1) == cids
    assert shadow.index(driver.admin) == driver.admin.tail


@pytest.mark.parametrize("entries", [2, 4, 64])
def test_io_queues_by_the_book(driver: Driver, entries: int) -> None:
    """A completion queue that is full over and over: each entry that the driver takes is noticed."""
    pair = Pair(driver, 1, 64, completions=entries)
    shadow = Shadow(driver)
    for opcode, at, size, more in ((0x05, pair.cq, entries, 0), (0x01, pair.sq, 64, 1 << 16)):
        done = driver.admin.send(opcode, dptr=prps(at), cdw10=(size - 1) << 16 | 1, cdw11=more | 1)
        assert done.status == 0, name(done)
    book = ByTheBook(shadow, pair)
    for n in range(20):
        cids = book.submit(*[read(driver, k) for k in range(n % 20 + 1)])
        assert finish(book, len(cids)) == cids


def test_queues_that_were_in_use_before(driver: Driver) -> None:
    """What memory holds at first is no doorbell: commands that were taken are not taken again."""
    pair = driver.create(1, 16)
    for n in range(5):
        assert pair.send(0x02, nsid=1, cdw10=n, dptr=prps(driver.page)).status == 0
    shadow = Shadow(driver)
    assert shadow.index(pair) == 5
    driver.doorbell(1, 5)
    driver.run()
    assert not pair.reap()
    book = ByTheBook(shadow, pair)
    for _ in range(30):
        cids = book.submit(read(driver, 0))
        assert finish(book, 1) == cids


@pytest.mark.parametrize(("queues", "stride", "offered"), [(64, 0, True), (64, 2, True), (64, 3, False), (7, 6, True)])
def test_entries_that_do_not_fit_a_page(
    started: Callable[..., Driver], queues: int, stride: int, offered: bool
) -> None:
    """5.7: each buffer is one page, and the controller sees to it that all doorbells have room there."""
    driver = started(queues=queues, doorbell_stride=stride)
    assert driver.identify(1)[257] & 1 == offered
    done = driver.admin.send(CONFIG, dptr=prps(driver.memory.take(4096), driver.memory.take(4096)))
    assert name(done) == ("SUCCESS" if offered else "INVALID_OPCODE")


def test_commands_that_come_while_a_turn_ends(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """7.13: until EventIdx says otherwise, a driver writes the shadow doorbell and rings none.  Whatever ends the
    controller's turn meanwhile, it looks again."""
    monkeypatch.setattr(arbiter, "TURN_NS", 0)
    pair = driver.create(1)
    shadow = Shadow(driver)
    plain = SubmissionQueue.carry_out

    def carry_out(queue: SubmissionQueue, command: NvmeCommand) -> None:
        plain(queue, command)
        if queue.qid and pair.tail < 10:
            assert shadow.index(pair) != pair.tail  # so nobody rings
            pair.write(NvmeCommand.make(FLUSH, nsid=1))
            shadow.put(pair, pair.tail)

    monkeypatch.setattr(SubmissionQueue, "carry_out", carry_out)
    pair.write(NvmeCommand.make(FLUSH, nsid=1))
    shadow.put(pair, 1)
    driver.doorbell(1, 1)
    assert len(pair.wait(10)) == 10
