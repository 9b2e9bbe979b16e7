"""What a guest can make long or large: each step ends soon, and memory has a bound."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nvme.driver import Driver, Pair, name, prps
from vmodel.devices.nvme import arbiter, fast, io
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.span import MiB

WRITE, READ, WRITE_UNCORRECTABLE, COMPARE, WRITE_ZEROES = 0x01, 0x02, 0x04, 0x05, 0x08
FIRST = 1
FUA = 1 << 30


def sgl(address: int, length: int, kind: int = 0) -> bytes:
    return struct.pack("<QI3xB", address, length, kind << 4)


def posted(pair: Pair) -> int:
    """Completions in a queue's first round that nobody has taken."""
    raw = pair.driver.memory.read(pair.cq, 16 * pair.completions)
    return sum(raw[16 * n + 14] & 1 for n in range(pair.completions))


def step(driver: Driver) -> None:
    """One step: between two of them the client's messages are served."""
    driver.device.backend.run_due(time.monotonic_ns())


def test_time_of_a_turn(started: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time is over, no further command is begun, whichever queue has more."""
    monkeypatch.setattr(arbiter, "TURN_NS", 0)
    driver = started(fast_path=False, namespaces=[{"memory": "1M"}])
    pairs = [driver.create(qid) for qid in (1, 2)]
    for pair in pairs:
        for n in range(10):
            pair.write(NvmeCommand.make(WRITE_ZEROES, nsid=1, cdw10=n))
        driver.doorbell(pair.qid, 10)
    for n in range(1, 21):
        step(driver)
        assert sum(posted(pair) for pair in pairs) == n
    assert driver.identify(1)[77] == 9


def test_data_of_a_turn(started: Callable[..., Driver]) -> None:
    """The fast path moves a bounded number of bytes before the device looks at its client again."""
    driver = started(max_transfer="16M", namespaces=[{"memory": "16M", "lba": 4096}])
    pair = driver.create(1)
    for _ in range(30):
        pair.write(NvmeCommand.make(READ, flags=1 << 6, nsid=1, dptr=sgl(32 * MiB, 16 * MiB), cdw12=4095))
    driver.doorbell(1, 30)
    step(driver)
    assert 1 <= posted(pair) <= 5
    assert len(pair.wait(30)) == 30


def test_a_turn_ends_while_workers_have_enough(
    started: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue whose time is over goes on once workers are done, without any doorbell more."""
    monkeypatch.setattr(arbiter, "TURN_NS", 0)
    driver = started(max_transfer="2M", namespaces=[{"path": tmp_path / "disk.img", "size": "4M"}])
    pair = driver.create(1)
    for _ in range(60):  # 120 MiB; workers take 64
        block = sgl(32 * MiB, 2 * MiB)
        pair.write(NvmeCommand.make(WRITE, flags=1 << 6, nsid=1, dptr=block, cdw12=4095 | FUA))
    driver.doorbell(1, 60)
    driver.until(lambda: posted(pair) == 60)


@pytest.mark.parametrize("general", [True, False])
def test_data_that_workers_have(started: Callable[..., Driver], tmp_path: Path, general: bool) -> None:
    """Buffers for commands that wait for a file: so many bytes, then queues wait; all of them go on."""
    driver = started(
        fast_path=not general, queue_entries=2048, namespaces=[{"path": tmp_path / "disk.img", "size": "8M"}]
    )
    pairs = [driver.create(qid, 1024) for qid in (1, 2)]
    for pair in pairs:
        for n in range(1000):
            pair.write(NvmeCommand.make(WRITE, nsid=1, cdw10=n, cdw12=FUA, dptr=prps(driver.page)))
        driver.doorbell(pair.qid, 1000)
    device = driver.device
    for _ in range(20):
        device.arbiter.run()  # nothing is collected in between
    assert device.fast.busy
    held = device.fast._held if general else device.fast._rings.held()
    assert fast.HELD <= held <= fast.HELD + device.max_transfer
    # The admin queue is served meanwhile.
    assert driver.admin.send(0x18).status == 0
    for pair in pairs:
        found: list[int] = []
        while len(found) < 1000:
            found += [completion.cid for completion in pair.wait()]
        assert sorted(found) == list(range(1, 1001))
    assert not device.fast.busy and device.fast._held == device.fast._rings.held() == 0


@pytest.mark.parametrize("how", ["abort", "reset"])
@pytest.mark.parametrize("general", [True, False])
def test_what_is_taken_back_is_not_held(
    started: Callable[..., Driver], tmp_path: Path, general: bool, how: str
) -> None:
    driver = started(fast_path=not general, namespaces=[{"path": tmp_path / "disk.img", "size": "8M"}])
    pair = driver.create(1, 512)
    cids = [pair.write(NvmeCommand.make(WRITE, nsid=1, cdw12=FUA, dptr=prps(driver.page))) for _ in range(100)]
    driver.doorbell(1, 100)
    driver.device.arbiter.run()
    if how == "abort":
        for cid in reversed(cids):
            driver.admin.send(0x08, cdw10=cid << 16 | 1)
        assert len(pair.wait(100)) == 100
    else:
        driver.disable()
        driver.enable()
    driver.until(lambda: driver.device.fast._held == driver.device.fast._rings.held() == 0)


@pytest.mark.parametrize("quick", [True, False])
def test_a_queue_of_first_fused_commands(started: Callable[..., Driver], quick: bool) -> None:
    """4.12: the first of two fused commands without a second one is aborted; a thousand of them are no recursion."""
    driver = started(fast_path=quick, namespaces=[{"memory": "64K"}])
    pair = driver.create(1, 1024)
    for _ in range(1023):
        pair.write(NvmeCommand.make(COMPARE, flags=FIRST, nsid=1, dptr=prps(driver.page)))
    driver.doorbell(1, 1023)
    step(driver)
    assert 1 <= posted(pair) <= arbiter.TURN
    found = pair.wait(1023)
    assert {name(completion) for completion in found} == {"ABORTED_MISSING_FUSED"}
    assert [completion.sq_head for completion in found[:3]] == [1, 2, 3]


def test_uncorrectable_blocks_have_a_limit(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are kept as spans; a command that would make one too many fails, as on a medium that is worn out."""
    monkeypatch.setattr(io, "MAX_UNCORRECTABLE", 4)
    pair = driver.create(1)

    def mark(block: int, count: int = 1) -> str:
        return name(pair.send(WRITE_UNCORRECTABLE, nsid=1, cdw10=block, cdw12=count - 1))

    def write(block: int, count: int = 1) -> str:
        return name(pair.send(WRITE, nsid=1, cdw10=block, cdw12=count - 1, dptr=prps(driver.page)))

    assert [mark(block, 3) for block in (0, 10, 20, 30)] == ["SUCCESS"] * 4
    assert mark(40) == "WRITE_FAULT"
    assert mark(33) == mark(11) == "SUCCESS", "no span more"
    assert write(11) == "WRITE_FAULT", "it would part one"
    assert name(pair.send(READ, nsid=1, cdw10=11, dptr=prps(driver.page))) == "UNRECOVERED_READ"
    assert write(10) == write(50) == "SUCCESS"
    zeroes = pair.send(WRITE_ZEROES, nsid=1, cdw10=31)
    assert name(zeroes) == "WRITE_FAULT"
    assert write(20, 3) == "SUCCESS"
    assert write(31) == "SUCCESS", "there is room for one span again"
    assert mark(60) == "WRITE_FAULT"
    assert len(driver.device.inventory.attached(1).uncorrectable) == 4


@pytest.mark.parametrize(
    ("opcode", "fields"),
    [
        (0x02, {"cdw10": 2, "cdw11": 8}),
        (0x11, {"cdw10": 0x8_0000}),
        (0x1A, {"cdw10": 0x8_0000, "cdw11": 1, "nsid": 0xFFFF_FFFF}),
    ],
)
def test_transfers_of_admin_commands(driver: Driver, opcode: int, fields: dict[str, int]) -> None:
    """5.15.2.2, MDTS: a command that transfers more than that is aborted with Invalid Field in NvmeCommand."""
    assert name(driver.admin.send(opcode, dptr=prps(driver.page), **fields)) == "INVALID_FIELD"


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("opcode", [READ, WRITE])
@pytest.mark.parametrize(
    ("address", "length", "kind"),
    [((1 << 64) - 4096, 8192, 3), ((1 << 64) - 16, 32, 3), ((1 << 64) - 4096, 4096 + 16, 2), ((1 << 64) - 256, 512, 0)],
)
def test_sgls_at_the_end_of_all_addresses(
    started: Callable[..., Driver], fast_path: bool, opcode: int, address: int, length: int, kind: int
) -> None:
    """4.6.1.2.1: data or lists that cannot be transferred: Data Transfer Error.  Address 0 is not what follows."""
    driver = started(fast_path=fast_path, namespaces=[{"memory": "1M"}])
    pair = driver.create(1)
    done = pair.send(opcode, flags=1 << 6, nsid=1, dptr=sgl(address, length, kind))
    assert name(done) == "DATA_TRANSFER_ERROR"
    driver.memory.write(driver.page, sgl(address, length, kind))
    done = pair.send(opcode, flags=1 << 6, nsid=1, dptr=sgl(driver.page, 16, 2 if kind else 3))
    assert name(done) == "DATA_TRANSFER_ERROR"
    assert not driver.status.CFS
