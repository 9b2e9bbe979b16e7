"""Faults of an NVMe controller, as its driver sees them; with commands that the shim would carry out by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.inject.lab import elapse, fired
from tests.nvme.conftest import driver, started  # noqa: F401  fixtures
from tests.nvme.driver import Driver, Pair, prps, raised
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.status import NvmeStatus
from vmodel.inject import Engine, FaultPlan, parse_rule
from vmodel.vfio_user.wire import Irq

WRITE, READ = 1, 2
BLOCK = 512


class Disk:
    """A queue pair with a buffer of eight blocks."""

    def __init__(self, made: Driver) -> None:
        self.driver = made
        other, self.fd = made.vectors(Irq.MSIX, 2)
        os.close(other)
        self.pair: Pair = made.create(1, vector=1)

    def write(self, data: bytes, lba: int = 0) -> int:
        """The status."""
        self.driver.memory.write(self.driver.page, data)
        return self.pair.send(
            WRITE, nsid=1, dptr=prps(self.driver.page), cdw10=lba, cdw12=len(data) // BLOCK - 1
        ).status

    def read(self, blocks: int = 1, lba: int = 0) -> bytes:
        self.driver.memory.write(self.driver.page, bytes(blocks * BLOCK))
        done = self.pair.send(READ, nsid=1, dptr=prps(self.driver.page), cdw10=lba, cdw12=blocks - 1)
        assert done.status == 0
        return self.driver.memory.read(self.driver.page, blocks * BLOCK)

    def post(self, lba: int = 0) -> int:
        """A read that nobody waits for; its identifier."""
        cid = self.pair.write(NvmeCommand.make(READ, nsid=1, dptr=prps(self.driver.page), cdw10=lba))
        self.pair.ring()
        return cid


@pytest.fixture
def disk(driver: Driver) -> Iterator[Disk]:  # noqa: F811
    made = Disk(driver)
    yield made
    os.close(made.fd)


@contextmanager
def armed(disk: Disk, *rules: str) -> Iterator[Engine]:
    with Engine(FaultPlan(rule=tuple(map(parse_rule, rules))), [disk.driver.device]) as engine:
        yield engine


def test_rules_that_do_not_fire_change_nothing(started: Callable[..., Driver]) -> None:  # noqa: F811
    """The general way, which commands go then, has the same results as the shim's."""

    def run(disk: Disk) -> list[object]:
        found: list[object] = [disk.write(bytes([n]) * BLOCK * (n + 1), lba=n) for n in range(4)]
        found += [disk.read(n + 1, lba=n) for n in range(4)]
        found.append(disk.pair.send(READ, nsid=1, dptr=prps(disk.driver.page), cdw10=1 << 20).status)
        health = disk.driver.device.health
        return [*found, health.reads, health.writes, health.bytes_read]

    plain = run(Disk(started()))
    disk = Disk(started())
    with armed(disk, "completion nth=9999 do=drop", "dma.read nth=9999 do=drop"):
        assert disk.driver.device.points.detailed
        assert run(disk) == plain
    assert not disk.driver.device.points.detailed


def test_a_dropped_completion(disk: Disk) -> None:
    with armed(disk, "completion queue=1 opcode=2 lba=4-7 do=drop") as engine:
        disk.read(4, lba=0)
        disk.write(bytes(BLOCK), lba=4)
        cid = disk.post(lba=4)
        assert disk.pair.reap() == []
        (record,) = fired(engine)
        assert (record["id"], record["opcode"], record["lba"], record["queue"]) == (cid, 2, 4, 1)


def test_wrong_status_and_id(disk: Disk) -> None:
    with armed(
        disk, "completion queue=1 nth=1 do=complete(status=0x281)", "completion queue=1 nth=2 do=complete(id=99)"
    ):
        disk.post()
        (done,) = disk.pair.reap()
        assert done.status == NvmeStatus.UNRECOVERED_READ
        disk.post()
        (done,) = disk.pair.reap()
        assert (done.cid, done.status) == (99, 0)


def test_a_late_completion_comes_with_its_interrupt(disk: Disk) -> None:
    with armed(disk, "completion queue=1 do=late(10min)"):
        cid = disk.post()
        assert disk.pair.reap() == [] and not raised(disk.fd)
        elapse(disk.driver.device, 600)
        (done,) = disk.pair.wait()
        assert done.cid == cid and raised(disk.fd) == 1


def test_completions_twice_and_in_another_order(disk: Disk) -> None:
    with armed(disk, "completion queue=1 nth=1 do=duplicate", "completion queue=1 nth=2 do=reorder"):
        first = disk.post()
        assert [done.cid for done in disk.pair.reap()] == [first, first]
        second = disk.post()
        assert disk.pair.reap() == []
        third = disk.post()
        assert [done.cid for done in disk.pair.reap()] == [third, second]


def test_a_late_completion_of_a_queue_that_is_gone(disk: Disk) -> None:
    with armed(disk, "completion queue=1 do=late(10min)"):
        disk.post()
        disk.driver.disable()
        disk.driver.enable()
        elapse(disk.driver.device, 600)
        disk.driver.run()
        assert disk.driver.identify(1)[:2] == b"\x34\x12"


def test_an_aborted_read_is_an_io_error(disk: Disk) -> None:
    disk.write(b"old!" * 128)
    page = disk.driver.page
    with armed(disk, f"dma.read iova={page:#x}+4K nth=1 do=abort"):
        assert disk.write(b"new!" * 128) & 0x7FF == NvmeStatus.DATA_TRANSFER_ERROR
    assert disk.read() == b"old!" * 128


def test_a_flipped_bit_is_silent_corruption(disk: Disk) -> None:
    disk.write(b"data" * 128)
    with armed(disk, f"dma.write iova={disk.driver.page:#x}+4K nth=1 do=flip"):
        found = int.from_bytes(disk.read(), "little")
    assert (found ^ int.from_bytes(b"data" * 128, "little")).bit_count() == 1
    assert disk.read() == b"data" * 128


def test_doorbells(disk: Disk) -> None:
    with armed(disk, "doorbell queue=1 kind=submission nth=1 do=drop", "doorbell queue=1 nth=3 do=late(1)"):
        disk.post()
        assert disk.pair.reap() == []
        disk.post()  # its doorbell covers both
        assert len(disk.pair.wait(2)) == 2


def test_a_lost_interrupt(disk: Disk) -> None:
    with armed(disk, "irq vector=1 nth=1 do=drop"):
        assert not disk.driver.device.points.detailed  # the shim goes on
        disk.post()
        assert len(disk.pair.reap()) == 1 and not raised(disk.fd)
        disk.post()
        assert raised(disk.fd) == 1


def test_the_queues_memory(disk: Disk) -> None:
    """What cannot be read of a queue itself is fatal to the controller."""
    with armed(disk, f"dma.read iova={disk.pair.sq:#x}+4K do=abort"):
        disk.post()
    assert disk.driver.status.CFS
