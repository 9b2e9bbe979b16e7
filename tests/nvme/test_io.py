"""The NVM command set: what each command does, and each status that it can end with."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nvme.driver import Driver, Pair, name, prps
from vmodel._shim.store import Store
from vmodel.devices.nvme.backend import BlockBackend, FileBackend
from vmodel.devices.nvme.command import BROADCAST, Completion, NvmeCommand
from vmodel.devices.nvme.io import MAX_COPY, MAX_COPY_RANGE, MAX_COPY_RANGES
from vmodel.devices.nvme.status import NvmeStatus

FLUSH, WRITE, READ, WRITE_UNCORRECTABLE, COMPARE, ZEROES, DSM, VERIFY, COPY = 0, 1, 2, 4, 5, 8, 9, 0x0C, 0x19
FIRST, SECOND = 1, 2
DNR = 1 << 14
BLOCKS = 2048
KINDS = ["memory", "general", "file"]


class Disk:
    """A controller with a namespace of 1 MiB in 512 byte blocks, and a queue."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.pair = driver.create(1, 64)
        self.data = driver.memory.take(64 * 4096)
        self.other = driver.memory.take(64 * 4096)

    def send(self, opcode: int, slba: int = 0, blocks: int = 1, *, nsid: int = 1, at: int = 0, **f: Any) -> Completion:
        """A command whose data is up to two pages at `at`, or where `dptr` says."""
        bits = f.pop("bits", 0)
        at = at or self.data
        fields = {"dptr": prps(at, at + 4096), **f}
        low, high = slba & 0xFFFF_FFFF, slba >> 32
        return self.pair.send(opcode, nsid=nsid, cdw10=low, cdw11=high, cdw12=blocks - 1 | bits, **fields)

    def do(self, opcode: int, slba: int = 0, blocks: int = 1, **fields: Any) -> int:
        """A command that succeeds; its result."""
        done = self.send(opcode, slba, blocks, **fields)
        assert done.status == 0, name(done)
        return done.result

    def fails(self, status: NvmeStatus, *args: Any, dnr: bool = True, **fields: Any) -> Completion:
        done = self.send(*args, **fields)
        assert name(done) == status.name
        assert bool(done.status & DNR) == dnr
        return done

    def put(self, slba: int, data: bytes) -> None:
        for n in range(0, len(data), 8192):
            piece = data[n : n + 8192]
            self.driver.memory.write(self.data, piece)
            self.do(WRITE, slba + n // 512, len(piece) // 512)

    def get(self, slba: int, blocks: int) -> bytes:
        found = b""
        for n in range(0, blocks, 16):
            count = min(16, blocks - n)
            self.do(READ, slba + n, count)
            found += self.driver.memory.read(self.data, count * 512)
        return found


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, started: Callable[..., Driver], tmp_path: Path) -> Disk:
    spaces: list[dict[str, Any]] = [{"memory": "1M"}]
    if request.param == "file":
        spaces = [{"path": tmp_path / "disk.img", "size": "1M"}]
    driver = started(namespaces=spaces, fast_path=request.param != "general", max_transfer="64K")
    return Disk(driver)


def pattern(blocks: int, seed: int = 1) -> bytes:
    return b"".join(bytes([n + seed & 0xFF]) * 512 for n in range(blocks))


def test_reading_what_was_written(disk: Disk) -> None:
    assert disk.get(0, 16) == bytes(8192)
    disk.put(5, pattern(40))
    assert disk.get(0, 50) == bytes(5 * 512) + pattern(40) + bytes(5 * 512)
    health = disk.driver.device.health
    assert health.writes == 3 and health.bytes_written == 40 * 512
    assert health.bytes_read == 66 * 512


def test_the_last_block_and_beyond(disk: Disk) -> None:
    disk.put(BLOCKS - 1, pattern(1))
    assert disk.get(BLOCKS - 1, 1) == pattern(1)
    for opcode in (READ, WRITE, COMPARE, ZEROES, VERIFY, WRITE_UNCORRECTABLE):
        for slba, blocks in ((BLOCKS, 1), (BLOCKS - 1, 2), (2**64 - 1, 1), (2**64 - 1, 2), (1 << 32, 1)):
            disk.fails(NvmeStatus.LBA_OUT_OF_RANGE, opcode, slba, blocks)
    assert disk.get(BLOCKS - 1, 1) == pattern(1)


def test_namespaces_that_are_not_there(disk: Disk) -> None:
    for opcode in (READ, WRITE, COMPARE, ZEROES, VERIFY, WRITE_UNCORRECTABLE, DSM, COPY, FLUSH):
        disk.fails(NvmeStatus.INVALID_NAMESPACE, opcode, nsid=0)
        disk.fails(NvmeStatus.INVALID_NAMESPACE, opcode, nsid=0xFFFF_FFFE)
        disk.fails(NvmeStatus.INVALID_FIELD, opcode, nsid=2)
    for opcode in (READ, WRITE, COMPARE, ZEROES, VERIFY, WRITE_UNCORRECTABLE, DSM, COPY):
        disk.fails(NvmeStatus.INVALID_NAMESPACE, opcode, nsid=BROADCAST)


def test_more_than_may_be_transferred(disk: Disk) -> None:
    for opcode in (READ, WRITE, COMPARE):
        disk.fails(NvmeStatus.INVALID_FIELD, opcode, 0, 129)
    # What moves no data has no such limit.
    for opcode in (VERIFY, ZEROES):
        disk.do(opcode, 0, 2048)


def test_protection_information_is_not_there(disk: Disk) -> None:
    for opcode in (READ, WRITE, COMPARE, ZEROES, VERIFY):
        disk.fails(NvmeStatus.INVALID_PROTECTION_INFORMATION, opcode, bits=1 << 29)


def test_opcodes_that_are_not_there(disk: Disk) -> None:
    for opcode in (0x03, 0x0D, 0x11, 0x7F, 0x80, 0xFF):
        disk.fails(NvmeStatus.INVALID_OPCODE, opcode)


def test_pointers_that_are_wrong(disk: Disk) -> None:
    for opcode in (READ, WRITE, COMPARE):
        disk.fails(NvmeStatus.PRP_OFFSET_INVALID, opcode, dptr=prps(disk.data + 2))
        disk.fails(NvmeStatus.PRP_OFFSET_INVALID, opcode, blocks=16, dptr=prps(disk.data, disk.data + 4))
        disk.fails(NvmeStatus.INVALID_FIELD, opcode, flags=3 << 6)
        disk.fails(NvmeStatus.SGL_TYPE_INVALID, opcode, flags=1 << 6, dptr=struct.pack("<QI3xB", disk.data, 512, 0x40))
        disk.fails(
            NvmeStatus.DATA_SGL_LENGTH_INVALID, opcode, flags=1 << 6, dptr=struct.pack("<QI3xB", disk.data, 511, 0)
        )


def test_memory_that_is_not_there(disk: Disk) -> None:
    disk.put(0, pattern(1))
    for opcode in (READ, WRITE, COMPARE):
        disk.fails(NvmeStatus.DATA_TRANSFER_ERROR, opcode, dptr=prps(1 << 40), dnr=False)
        disk.fails(NvmeStatus.DATA_TRANSFER_ERROR, opcode, blocks=32, dptr=prps(disk.data, 1 << 40), dnr=False)
    assert disk.get(0, 1) == pattern(1)
    faults = disk.driver.device.dma.stats.faults
    disk.fails(NvmeStatus.DATA_TRANSFER_ERROR, READ, dptr=prps(1 << 40), dnr=False)
    assert disk.driver.device.dma.stats.faults == faults + 1


def test_guest_memory_that_was_cut_off(disk: Disk) -> None:
    """The client has truncated its file: an error, and the server lives."""
    disk.put(0, pattern(16))
    os.ftruncate(disk.driver.memory.fd, disk.other)
    for opcode in (READ, WRITE, COMPARE):
        disk.fails(NvmeStatus.DATA_TRANSFER_ERROR, opcode, blocks=16, at=disk.other - 4096, dnr=False)
    assert disk.get(1, 8) == pattern(8, 2)


def test_compare(disk: Disk) -> None:
    disk.put(3, pattern(4))
    disk.driver.memory.write(disk.data, pattern(4))
    disk.do(COMPARE, 3, 4)
    disk.driver.memory.write(disk.data + 4 * 512 - 1, b"\xff")
    disk.fails(NvmeStatus.COMPARE_FAILURE, COMPARE, 3, 4)
    assert disk.get(3, 4) == pattern(4)


def test_verify(disk: Disk) -> None:
    disk.put(3, pattern(4))
    disk.do(VERIFY, 0, 2048)


@pytest.mark.parametrize("bits", [0, 1 << 25, 1 << 30, 1 << 25 | 1 << 30])
def test_write_zeroes(disk: Disk, bits: int) -> None:
    disk.put(0, pattern(64))
    disk.do(ZEROES, 3, 50, bits=bits)
    assert disk.get(0, 64) == pattern(3) + bytes(50 * 512) + pattern(11, 54)


def test_flush(disk: Disk) -> None:
    disk.do(FLUSH)
    disk.do(FLUSH, nsid=BROADCAST)


def test_forced_unit_access(disk: Disk) -> None:
    disk.driver.memory.write(disk.data, pattern(2))
    disk.do(WRITE, 7, 2, bits=1 << 30)
    disk.driver.memory.write(disk.data, bytes(1024))
    disk.do(READ, 7, 2, bits=1 << 30)
    assert disk.driver.memory.read(disk.data, 1024) == pattern(2)


# ---- Dataset Management -----------------------------------------------------------------------------------


def ranges(*spans: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<IIQ", 0, blocks, slba) for slba, blocks in spans)


def test_deallocating(disk: Disk) -> None:
    disk.put(0, pattern(64))
    spans = [(3, 2), (20, 9), (40, 0)]
    disk.driver.memory.write(disk.other, ranges(*spans))
    done = disk.pair.send(DSM, nsid=1, dptr=prps(disk.other), cdw10=2, cdw11=4)
    assert done.status == 0
    want = bytearray(pattern(64))
    for slba, blocks in spans:
        want[slba * 512 : (slba + blocks) * 512] = bytes(blocks * 512)
    assert disk.get(0, 64) == want


def test_256_ranges(disk: Disk) -> None:
    disk.put(0, pattern(600))
    disk.driver.memory.write(disk.other, ranges(*((2 * n, 1) for n in range(256))))
    assert disk.pair.send(DSM, nsid=1, dptr=prps(disk.other), cdw10=0xFF, cdw11=4).status == 0
    for n in (0, 2, 510):
        assert disk.get(n, 2) == bytes(512) + pattern(1, 2 + n)


def test_hints_alone_change_nothing(disk: Disk) -> None:
    disk.put(0, pattern(4))
    disk.driver.memory.write(disk.other, ranges((0, 4)))
    assert disk.pair.send(DSM, nsid=1, dptr=prps(disk.other), cdw10=0, cdw11=3).status == 0
    assert disk.get(0, 4) == pattern(4)


def test_a_range_that_is_too_long(disk: Disk) -> None:
    disk.put(0, pattern(4))
    disk.driver.memory.write(disk.other, ranges((0, 4), (BLOCKS - 1, 2)))
    done = disk.pair.send(DSM, nsid=1, dptr=prps(disk.other), cdw10=1, cdw11=4)
    assert name(done) == "LBA_OUT_OF_RANGE"
    assert disk.get(0, 4) == pattern(4)  # all ranges are looked at first


# ---- Write Uncorrectable ----------------------------------------------------------------------------------


def test_blocks_that_cannot_be_read(disk: Disk) -> None:
    disk.put(0, pattern(32))
    disk.do(WRITE_UNCORRECTABLE, 10, 4)
    for opcode in (READ, COMPARE, VERIFY):
        disk.fails(NvmeStatus.UNRECOVERED_READ, opcode, 8, 4)
        disk.fails(NvmeStatus.UNRECOVERED_READ, opcode, 13, 2)
    assert disk.get(0, 10) == pattern(10)
    assert disk.get(14, 4) == pattern(4, 15)
    # Writing makes them good again, one by one.
    disk.put(11, pattern(1, 99))
    disk.fails(NvmeStatus.UNRECOVERED_READ, READ, 10, 1)
    assert disk.get(11, 1) == pattern(1, 99)
    disk.do(ZEROES, 10, 1)
    disk.driver.memory.write(disk.other, ranges((12, 2)))
    assert disk.pair.send(DSM, nsid=1, dptr=prps(disk.other), cdw10=0, cdw11=4).status == 0
    assert disk.get(10, 5) == bytes(512) + pattern(1, 99) + bytes(1024) + pattern(1, 15)


# ---- Compare and Write ------------------------------------------------------------------------------------


def fused(disk: Disk, *commands: NvmeCommand) -> list[Completion]:
    for command in commands:
        disk.pair.write(command)
    disk.pair.ring()
    return disk.pair.wait(len(commands))


def half(disk: Disk, opcode: int, part: int, at: int, **fields: Any) -> NvmeCommand:
    fields = {"nsid": 1, "cdw10": 5, "cdw12": 1, "dptr": prps(at), **fields}
    return NvmeCommand.make(opcode, flags=part, **fields)


def test_compare_and_write(disk: Disk) -> None:
    disk.put(5, pattern(2))
    disk.driver.memory.write(disk.data, pattern(2))
    disk.driver.memory.write(disk.other, pattern(2, 50))
    both = half(disk, COMPARE, FIRST, disk.data), half(disk, WRITE, SECOND, disk.other)
    done = fused(disk, *both)
    assert [name(c) for c in done] == ["SUCCESS", "SUCCESS"]
    assert done[0].cid + 1 == done[1].cid
    assert disk.get(5, 2) == pattern(2, 50)
    disk.driver.memory.write(disk.data, pattern(2))
    done = fused(disk, *both)
    assert [name(c) for c in done] == ["COMPARE_FAILURE", "ABORTED_FAILED_FUSED"]
    assert disk.get(5, 2) == pattern(2, 50)


def test_halves_that_do_not_fit(disk: Disk) -> None:
    disk.put(5, pattern(2))
    compare, write = half(disk, COMPARE, FIRST, disk.data), half(disk, WRITE, SECOND, disk.data)
    for first, second in (
        (compare, half(disk, WRITE, SECOND, disk.data, cdw10=6)),
        (compare, half(disk, WRITE, SECOND, disk.data, cdw12=0)),
        (half(disk, WRITE, FIRST, disk.data), write),
        (compare, half(disk, READ, SECOND, disk.data)),
    ):
        assert [name(c) for c in fused(disk, first, second)] == ["INVALID_FIELD", "ABORTED_FAILED_FUSED"]
    plain = NvmeCommand.make(READ, nsid=1, dptr=prps(disk.data))
    assert [name(c) for c in fused(disk, compare, plain)] == ["ABORTED_MISSING_FUSED", "SUCCESS"]
    assert [name(c) for c in fused(disk, compare)] == ["ABORTED_MISSING_FUSED"]
    assert [name(c) for c in fused(disk, write)] == ["ABORTED_MISSING_FUSED"]
    disk.driver.memory.write(disk.data, pattern(2))
    done = fused(disk, compare, compare, write)
    assert [name(c) for c in done] == ["ABORTED_MISSING_FUSED", "SUCCESS", "SUCCESS"]
    disk.fails(NvmeStatus.INVALID_FIELD, READ, flags=3)
    out = {"cdw10": BLOCKS - 1}
    done = fused(disk, half(disk, COMPARE, FIRST, disk.data, **out), half(disk, WRITE, SECOND, disk.data, **out))
    assert [name(c) for c in done] == ["LBA_OUT_OF_RANGE", "ABORTED_FAILED_FUSED"]


# ---- Copy --------------------------------------------------------------------------------------------------


def sources(*spans: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<8xQH6xIHH", slba, blocks - 1, 0, 0, 0) for slba, blocks in spans)


def copy(disk: Disk, target: int, *spans: tuple[int, int], bits: int = 0) -> Completion:
    disk.driver.memory.write(disk.other, sources(*spans))
    size = 32 * len(spans)
    return disk.pair.send(
        COPY,
        nsid=1,
        dptr=prps(disk.other, disk.other + 4096 if size > 4096 else 0),
        cdw10=target,
        cdw12=len(spans) - 1 | bits,
    )


def test_copy(disk: Disk) -> None:
    disk.put(0, pattern(64))
    assert copy(disk, 100, (10, 4), (0, 1), (30, 20)).status == 0
    assert disk.get(100, 26) == pattern(4, 11) + pattern(1) + pattern(20, 31) + bytes(512)
    assert copy(disk, 200, *((n, 1) for n in range(MAX_COPY_RANGES))).status == 0
    assert disk.get(200, 64) == pattern(64)


def test_copies_that_cannot_be(disk: Disk) -> None:
    disk.put(0, pattern(8))
    limit = "COMMAND_SIZE_LIMIT_EXCEEDED"
    assert name(copy(disk, 100, *((n, 1) for n in range(MAX_COPY_RANGES + 1)))) == limit
    assert name(copy(disk, 100, (0, MAX_COPY_RANGE + 1))) == limit
    many = [(0, MAX_COPY_RANGE)] * (MAX_COPY // MAX_COPY_RANGE + 1)
    assert name(copy(disk, 0, *many)) == limit
    assert name(copy(disk, BLOCKS - 1, (0, 2))) == "LBA_OUT_OF_RANGE"
    assert name(copy(disk, 100, (0, 1), bits=1 << 8)) == "INVALID_FIELD"
    assert name(copy(disk, 100, (0, 1), bits=1 << 26)) == "INVALID_PROTECTION_INFORMATION"
    assert disk.get(100, 2) == bytes(1024)
    # The result says which range was the first that was not copied.
    done = copy(disk, 100, (0, 1), (1, 1), (BLOCKS, 1), (2, 1))
    assert name(done) == "LBA_OUT_OF_RANGE" and done.result == 2
    assert disk.get(100, 3) == pattern(2) + bytes(512)
    disk.do(WRITE_UNCORRECTABLE, 6, 1)
    done = copy(disk, 300, (0, 1), (5, 2))
    assert name(done) == "UNRECOVERED_READ" and done.result == 1


# ---- namespaces that are only read, disks that fail ---------------------------------------------------------


def test_an_image_that_is_only_read(started: Callable[..., Driver], tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(128))
    disk = Disk(started(namespaces=[{"path": path, "read_only": True}]))
    assert disk.get(0, 128) == pattern(128)
    for opcode in (WRITE, ZEROES, WRITE_UNCORRECTABLE):
        disk.fails(NvmeStatus.NAMESPACE_WRITE_PROTECTED, opcode)
    assert name(copy(disk, 3, (0, 1))) == "NAMESPACE_WRITE_PROTECTED"
    disk.driver.memory.write(disk.other, ranges((0, 4)))
    assert name(disk.pair.send(DSM, nsid=1, dptr=prps(disk.other), cdw11=4)) == "NAMESPACE_WRITE_PROTECTED"
    both = half(disk, COMPARE, FIRST, disk.data), half(disk, WRITE, SECOND, disk.data)
    assert [name(c) for c in fused(disk, *both)] == ["NAMESPACE_WRITE_PROTECTED", "ABORTED_FAILED_FUSED"]
    assert path.read_bytes() == pattern(128)


@pytest.fixture(params=[True, False])
def failing(
    request: pytest.FixtureRequest, started: Callable[..., Driver], tmp_path: Path
) -> Iterator[tuple[Disk, Path]]:
    """A disk of which somebody has cut off all but 64 KiB; with and without the fast path."""
    path = tmp_path / "disk.img"
    disk = Disk(started(namespaces=[{"path": path, "size": "1M"}], fast_path=request.param))
    disk.put(0, pattern(128))
    os.truncate(path, 65536)
    return disk, path


def test_a_disk_that_cannot_be_read(failing: tuple[Disk, Path], caplog: pytest.LogCaptureFixture) -> None:
    disk, _ = failing
    errors = disk.driver.device.health.media_errors
    with caplog.at_level(logging.WARNING):
        for n, opcode in enumerate((READ, COMPARE, VERIFY)):
            disk.fails(NvmeStatus.UNRECOVERED_READ, opcode, 256, 8)
            assert disk.driver.device.health.media_errors == errors + n + 1
    (first, *_) = [record.getMessage() for record in caplog.records]
    assert first == "namespace 1: READ at block 256: Input/output error"
    assert disk.get(0, 128) == pattern(128)
    log = disk.driver.log(0x01, 64)
    assert struct.unpack_from("<H", log, 8)[0] == 1  # of queue 1
    assert struct.unpack_from("<QI", log, 16) == (256, 1)  # the block, the namespace


@pytest.mark.parametrize("fast", [True, False])
def test_a_full_disk(started: Callable[..., Driver], caplog: pytest.LogCaptureFixture, fast: bool) -> None:
    disk = Disk(started(namespaces=[{"memory": "1M"}], fast_path=fast))
    fd = os.open("/dev/full", os.O_RDWR)
    device = disk.driver.device
    (namespace,) = device.namespaces()
    namespace.backend = BlockBackend(1 << 20, Store.file(fd, 1 << 20), read_only=False, workers=device.fast.workers)
    os.close(fd)
    device.fast.changed()
    with caplog.at_level(logging.WARNING):
        disk.fails(NvmeStatus.CAPACITY_EXCEEDED, WRITE, 5)
    assert "namespace 1: WRITE at block 5: No space left on device" in caplog.text
    disk.fails(NvmeStatus.CAPACITY_EXCEEDED, WRITE, 5, bits=1 << 30)
    disk.do(READ, 5)


# ---- workers, resets ------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False])
def slow(request: pytest.FixtureRequest, started: Callable[..., Driver], tmp_path: Path) -> Disk:
    """A file, all whose writes have to be on disk: workers do them."""
    return Disk(started(namespaces=[{"path": tmp_path / "disk.img", "size": "64M"}], fast_path=request.param))


def begin(disk: Disk, count: int) -> list[int]:
    """So many writes that are under way; their identifiers."""
    cids = []
    for n in range(count):
        command = NvmeCommand.make(
            WRITE, nsid=1, cdw10=n * 16, cdw12=15 | 1 << 30, dptr=prps(disk.data, disk.data + 4096)
        )
        cids.append(disk.pair.write(command))
    disk.driver.doorbell(1, disk.pair.tail)
    disk.driver.device.backend.run_due(0)
    return cids


def test_commands_complete_in_any_order(slow: Disk) -> None:
    slow.driver.memory.write(slow.data, pattern(16))
    for _ in range(4):
        cids = begin(slow, 40)
        assert sorted(c.cid for c in slow.pair.wait(40)) == cids
    assert slow.get(39 * 16, 16) == pattern(16)


def test_a_small_completion_queue(started: Callable[..., Driver], tmp_path: Path) -> None:
    """What workers have in hand always has room to be posted."""
    driver = started(namespaces=[{"path": tmp_path / "disk.img", "size": "1M"}])
    pair = Pair(driver, 1, 64, 4)
    assert driver.admin.send(0x05, dptr=prps(pair.cq), cdw10=3 << 16 | 1, cdw11=1).status == 0
    assert driver.admin.send(0x01, dptr=prps(pair.sq), cdw10=63 << 16 | 1, cdw11=1 << 16 | 1).status == 0
    disk = Disk.__new__(Disk)
    disk.driver, disk.pair, disk.data = driver, pair, driver.memory.take(8192)
    cids = begin(disk, 60)
    done = pair.wait(60)
    assert sorted(c.cid for c in done) == cids and not any(c.status for c in done)


def test_deleting_a_queue_with_commands_under_way(slow: Disk) -> None:
    cids = begin(slow, 40)
    assert slow.driver.admin.send(0x00, cdw10=1).status == 0
    done = slow.pair.wait(40)
    assert sorted(c.cid for c in done) == cids
    assert {name(c) for c in done} <= {"SUCCESS", "ABORTED_SQ_DELETION"}
    device = slow.driver.device
    assert not len(device.fast.workers)


def test_abort_of_what_waits_for_a_worker(slow: Disk) -> None:
    cids = begin(slow, 60)
    aborted = [cid for cid in reversed(cids) if slow.driver.admin.send(0x08, cdw10=cid << 16 | 1).result & 1 == 0]
    done = {c.cid: name(c) for c in slow.pair.wait(60)}
    assert sorted(done) == cids
    assert {cid for cid, status in done.items() if status == "ABORT_REQUESTED"} == set(aborted)
    assert {status for cid, status in done.items() if cid not in aborted} <= {"SUCCESS"}


def test_a_reset_leaves_nothing_under_way(slow: Disk, tmp_path: Path) -> None:
    """Neither guest memory nor the disk is touched after it."""
    driver = slow.driver
    for _ in range(5):
        begin(slow, 60)
        driver.disable()
        file = tmp_path / "disk.img"
        memory, disk = driver.memory.read(0, 1 << 20), file.read_bytes()
        driver.run()
        driver.device.fast.settle()
        assert driver.memory.read(0, 1 << 20) == memory and file.read_bytes() == disk
        driver.enable()
        slow.pair = driver.create(1, 64)
    slow.put(0, pattern(16, 77))
    assert slow.get(0, 16) == pattern(16, 77)


@pytest.mark.parametrize("opcode", [0x80, 0x84], ids=["format", "sanitize"])
def test_erasing_comes_after_what_is_under_way(slow: Disk, tmp_path: Path, opcode: int) -> None:
    slow.driver.memory.write(slow.data, pattern(16))
    begin(slow, 60)
    done = slow.driver.admin.send(opcode, nsid=1 if opcode == 0x80 else 0, cdw10=0 if opcode == 0x80 else 2)
    assert done.status == 0, name(done)
    assert len(slow.pair.wait(60)) == 60
    slow.driver.device.fast.settle()
    for _ in range(1000):
        slow.driver.run()
        slow.driver.device.fast.settle()
        if not slow.driver.device.backend.has_work():
            break
    assert slow.get(0, 16) == bytes(8192)
    assert (tmp_path / "disk.img").read_bytes().count(0) == 64 << 20


def test_deleting_a_namespace_comes_after_what_is_under_way(slow: Disk, tmp_path: Path) -> None:
    slow.driver.memory.write(slow.data, pattern(16))
    cids = begin(slow, 60)
    assert slow.driver.admin.send(0x0D, nsid=1, cdw10=1).status == 0
    done = {completion.cid: name(completion) for completion in slow.pair.wait(60)}
    # A turn ends after some time: what it has not taken from the queue then comes after the deletion.
    assert set(done.values()) <= {"SUCCESS", "INVALID_NAMESPACE"}
    assert done[cids[0]] == "SUCCESS"
    image = (tmp_path / "disk.img").read_bytes()
    for n, cid in enumerate(cids):
        assert image[n * 8192 : (n + 1) * 8192] == (pattern(16) if done[cid] == "SUCCESS" else bytes(8192))
    FileBackend(tmp_path / "disk.img").close()  # nobody has it any more


def test_the_write_cache_can_be_off(slow: Disk) -> None:
    assert slow.driver.admin.send(0x09, cdw10=6, cdw11=0).status == 0
    slow.put(0, pattern(16))
    assert slow.get(0, 16) == pattern(16)
    assert slow.driver.admin.send(0x09, cdw10=6, cdw11=1).status == 0
