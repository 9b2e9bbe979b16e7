"""Shadow doorbells (NVMe 1.4, 5.7 and 7.13)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.nvme.driver import Driver, Pair, name, prps
from vmodel.devices.nvme.command import Command

CONFIG, FLUSH = 0x7C, 0x00


class Shadow:
    """The driver's two pages: doorbells, and for each of them up to where nobody has to be told."""

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


def read(driver: Driver, block: int) -> Command:
    return Command.make(0x02, nsid=1, cdw10=block, dptr=prps(driver.page))


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
    found = []
    while len(found) < 5:
        found += [completion.cid for completion in pair.reap()]
    assert found == cids
    assert shadow.index(pair) == 5, "the next command needs a doorbell"


def test_a_late_doorbell(driver: Driver) -> None:
    """One that says less than the shadow has told brings no command back."""
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
    # The driver has taken four, and tells it in memory only.
    shadow.put(pair, 4, completion=True)
    shadow.put(pair, (7 + 4) % 8)
    driver.doorbell(1, (7 + 4) % 8)
    driver.run()
    # An older doorbell arrives: it is no mistake.
    request = driver.admin.write(Command.make(0x0C))
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
    pair = driver.create(1)
    assert driver.admin.send(CONFIG, dptr=prps(1 << 40, 1 << 41)).status == 0
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
