"""Creating and deleting I/O queues, Abort, arbitration and coalescing."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.nvme.driver import CONFIGURATION, PAGE, Driver, Pair, name, prps, raised
from vmodel.devices.nvme import arbiter
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.regs import ControllerRegs
from vmodel.regs import Register
from vmodel.vfio_user.wire import Irq

DELETE_SQ, CREATE_SQ, DELETE_CQ, CREATE_CQ, ABORT = 0x00, 0x01, 0x04, 0x05, 0x08
FLUSH = 0x00


def create_cq(driver: Driver, qid: int, entries: int = 16, *, flags: int = 1, vector: int = 0, at: int = PAGE) -> str:
    cdw10 = (entries - 1 & 0xFFFF) << 16 | qid
    return name(driver.admin.send(CREATE_CQ, dptr=prps(at), cdw10=cdw10, cdw11=vector << 16 | flags))


def create_sq(driver: Driver, qid: int, cqid: int, entries: int = 16, *, flags: int = 1, at: int = PAGE) -> str:
    cdw10 = (entries - 1 & 0xFFFF) << 16 | qid
    return name(driver.admin.send(CREATE_SQ, dptr=prps(at), cdw10=cdw10, cdw11=cqid << 16 | flags))


def delete(driver: Driver, opcode: int, qid: int) -> str:
    return name(driver.admin.send(opcode, cdw10=qid))


def test_completion_queues_that_cannot_be(started: Callable[..., Driver]) -> None:
    driver = started(queues=4, queue_entries=64)
    at = driver.memory.take(PAGE)
    assert create_cq(driver, 0, at=at) == "INVALID_QUEUE_ID"
    assert create_cq(driver, 5, at=at) == "INVALID_QUEUE_ID"
    assert create_cq(driver, 0xFFFF, at=at) == "INVALID_QUEUE_ID"
    assert create_cq(driver, 1, 1, at=at) == "INVALID_QUEUE_SIZE"
    assert create_cq(driver, 1, 65, at=at) == "INVALID_QUEUE_SIZE"
    assert create_cq(driver, 1, 0x10000, at=at) == "INVALID_QUEUE_SIZE"
    assert create_cq(driver, 1, at=at, flags=0) == "INVALID_FIELD"
    assert create_cq(driver, 1, at=at + 64) == "PRP_OFFSET_INVALID"
    assert create_cq(driver, 1, at=at, vector=65) == "INVALID_INTERRUPT_VECTOR"
    assert create_cq(driver, 1, 64, at=at, vector=64) == "SUCCESS"
    assert create_cq(driver, 1, at=at) == "INVALID_QUEUE_ID"
    assert driver.device.health.error_count == 10


def test_submission_queues_that_cannot_be(started: Callable[..., Driver]) -> None:
    driver = started(queues=4, queue_entries=64)
    at = driver.memory.take(PAGE)
    # 5.4: a completion queue that could be and was not created: Completion Queue Invalid; 0h, the admin queue's, and
    # what is beyond the range: Invalid Queue Identifier.
    assert create_sq(driver, 1, 1, at=at) == "CQ_INVALID"
    assert create_sq(driver, 1, 0, at=at) == "INVALID_QUEUE_ID"
    assert create_sq(driver, 1, 5, at=at) == "INVALID_QUEUE_ID"
    assert create_sq(driver, 1, 0xFFFF, at=at) == "INVALID_QUEUE_ID"
    assert create_cq(driver, 1, at=driver.memory.take(PAGE)) == "SUCCESS"
    assert create_sq(driver, 0, 1, at=at) == "INVALID_QUEUE_ID"
    assert create_sq(driver, 5, 1, at=at) == "INVALID_QUEUE_ID"
    assert create_sq(driver, 1, 1, 1, at=at) == "INVALID_QUEUE_SIZE"
    assert create_sq(driver, 1, 1, 65, at=at) == "INVALID_QUEUE_SIZE"
    assert create_sq(driver, 1, 1, flags=0, at=at) == "INVALID_FIELD"
    assert create_sq(driver, 1, 1, at=at + 8) == "PRP_OFFSET_INVALID"
    assert create_sq(driver, 3, 1, at=at) == "SUCCESS"
    assert create_sq(driver, 3, 1, at=at) == "INVALID_QUEUE_ID"


def test_sizes_of_entries(driver: Driver) -> None:
    driver.disable()
    driver.enable(0)  # IOSQES and IOCQES were not set
    assert create_cq(driver, 1) == "INVALID_QUEUE_SIZE"
    driver.put(ControllerRegs.CC, CONFIGURATION | 1)  # before queues are created it may be
    driver.create(1)


def test_deleting(driver: Driver) -> None:
    driver.create(1)
    assert delete(driver, DELETE_SQ, 0) == "INVALID_QUEUE_ID"
    assert delete(driver, DELETE_SQ, 2) == "INVALID_QUEUE_ID"
    assert delete(driver, DELETE_CQ, 0) == "INVALID_QUEUE_ID"
    assert delete(driver, DELETE_CQ, 2) == "INVALID_QUEUE_ID"
    assert delete(driver, DELETE_CQ, 1) == "INVALID_QUEUE_DELETION"
    assert delete(driver, DELETE_SQ, 1) == "SUCCESS"
    assert delete(driver, DELETE_SQ, 1) == "INVALID_QUEUE_ID"
    assert delete(driver, DELETE_CQ, 1) == "SUCCESS"
    driver.create(1)


def test_all_64_pairs(started: Callable[..., Driver]) -> None:
    driver = started(queues=64, namespaces=[{"memory": "1M"}])
    pairs = [driver.create(qid, vector=qid) for qid in range(1, 65)]
    assert all(pair.send(FLUSH, nsid=1).status == 0 for pair in pairs)


def test_the_largest_queue(started: Callable[..., Driver]) -> None:
    driver = started(queue_entries=65536, namespaces=[{"memory": "1M"}])
    pair = driver.create(1, 65536)
    for _ in range(300):
        pair.write(NvmeCommand.make(FLUSH, nsid=1))
    pair.ring()
    assert len(pair.wait(300)) == 300


def test_one_completion_queue_of_several_submission_queues(driver: Driver) -> None:
    first = driver.create(1)
    at = driver.memory.take(PAGE)
    assert create_sq(driver, 2, 1, at=at) == "SUCCESS"
    driver.memory.write(at, NvmeCommand.make(FLUSH, nsid=1, cid=77).build())
    driver.doorbell(2, 1)
    (completion,) = first.wait()
    assert (completion.sqid, completion.cid, completion.sq_head) == (2, 77, 1)
    assert delete(driver, DELETE_SQ, 1) == "SUCCESS"
    assert delete(driver, DELETE_CQ, 1) == "INVALID_QUEUE_DELETION"


@pytest.mark.parametrize("which", ["sq", "cq"])
def test_queues_outside_memory(driver: Driver, which: str) -> None:
    far = 1 << 40
    assert create_cq(driver, 1, at=far if which == "cq" else driver.memory.take(PAGE)) == "SUCCESS"
    at = driver.memory.take(PAGE)
    assert create_sq(driver, 1, 1, at=far if which == "sq" else at) == "SUCCESS"
    driver.memory.write(at, NvmeCommand.make(FLUSH, nsid=1).build())
    driver.doorbell(1, 1)
    driver.run()
    assert driver.status.CFS
    driver.disable()
    driver.enable()
    assert driver.create(1).send(FLUSH, nsid=1).status == 0


def test_a_full_completion_queue_waits(driver: Driver) -> None:
    pair = Pair(driver, 1, 64, completions=4)
    assert create_cq(driver, 1, 4, at=pair.cq) == "SUCCESS"
    assert create_sq(driver, 1, 1, 64, at=pair.sq) == "SUCCESS"
    cids = [pair.write(NvmeCommand.make(FLUSH, nsid=1)) for _ in range(20)]
    pair.ring()
    assert [completion.cid for completion in pair.wait(20)] == cids


def test_abort(driver: Driver) -> None:
    waiting = driver.admin.write(NvmeCommand.make(0x0C))
    driver.admin.ring()
    abort = driver.admin.write(NvmeCommand.make(ABORT, cdw10=waiting << 16))
    driver.admin.ring()
    first, second = driver.admin.wait(2)
    assert (first.cid, name(first)) == (waiting, "ABORT_REQUESTED")
    assert (second.cid, name(second), second.result) == (abort, "SUCCESS", 0)
    assert not driver.device.health.errors


def test_abort_of_what_is_not_there(driver: Driver) -> None:
    done = driver.admin.send(ABORT, cdw10=99 << 16)
    assert (name(done), done.result) == ("SUCCESS", 1)
    done = driver.admin.send(ABORT, cdw10=99 << 16 | 7)
    assert name(done) == "INVALID_FIELD"


def test_unknown_opcodes(driver: Driver) -> None:
    known = driver.device.admin.effects
    for opcode in range(256):
        if opcode not in known:
            assert name(driver.admin.send(opcode)) == "INVALID_OPCODE"


def test_fused_admin_commands(driver: Driver) -> None:
    assert name(driver.admin.send(0x06, flags=2)) == "ABORTED_MISSING_FUSED"
    assert name(driver.admin.send(0x06, flags=3)) == "INVALID_FIELD"


def test_sgl_of_admin_commands(driver: Driver) -> None:
    assert name(driver.admin.send(0x06, flags=1 << 6, cdw10=1, dptr=prps(driver.page))) == "INVALID_FIELD"


def test_coalescing(driver: Driver) -> None:
    fds = driver.vectors(Irq.MSIX, 3)
    first, second = driver.create(1, vector=1), driver.create(2, vector=2)
    # Up to 4 completions or 100 ms; not on vector 2.
    assert driver.admin.send(0x09, cdw10=0x09, cdw11=1 << 16 | 2).status == 0
    assert driver.admin.send(0x09, cdw10=0x08, cdw11=255 << 8 | 3).status == 0
    raised(fds[0])
    for _ in range(3):
        first.write(NvmeCommand.make(FLUSH, nsid=1))
        first.ring()
    assert raised(fds[1]) == 0
    first.write(NvmeCommand.make(FLUSH, nsid=1))
    first.ring()
    assert raised(fds[1]) == 1
    second.send(FLUSH, nsid=1)
    assert raised(fds[2]) == 1
    # The admin queue's vector is never coalesced.
    driver.admin.send(0x18)
    assert raised(fds[0]) == 1
    assert driver.admin.send(0x09, cdw10=0x08, cdw11=1 << 8 | 200).status == 0
    first.write(NvmeCommand.make(FLUSH, nsid=1))
    first.ring()
    driver.until(lambda: raised(fds[1]) > 0)
    for fd in fds:
        os.close(fd)


@pytest.fixture
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of the arbiter ends by commands alone, however slow the machine is."""
    monkeypatch.setattr(arbiter, "TURN_NS", 1 << 60)


@pytest.mark.usefixtures("no_hurry")
def test_weighted_arbitration(driver: Driver) -> None:
    driver.disable()
    driver.enable(CONFIGURATION | 1 << 11)
    # A burst of 1; weights of 1, 1 and 4 (0's based) for low, medium, high.
    assert driver.admin.send(0x09, cdw10=0x01, cdw11=3 << 24).status == 0
    cq = driver.create(1, 64, priority=3)
    rings = {}
    for qid, priority in ((2, 1), (3, 0)):
        rings[qid] = driver.memory.take(PAGE)
        assert create_sq(driver, qid, 1, 64, flags=priority << 1 | 1, at=rings[qid]) == "SUCCESS"
    for n in range(8):
        cq.write(NvmeCommand.make(FLUSH, nsid=1, cid=0x100 + n))
        for qid, at in rings.items():
            driver.memory.write(at + 64 * n, NvmeCommand.make(FLUSH, nsid=1, cid=qid << 8 | n).build())
    # All three doorbells ring before the device looks.
    driver.doorbell(1, 8)
    driver.doorbell(2, 8)
    driver.doorbell(3, 8)
    driver.run()
    order = [completion.sqid for completion in cq.wait(24)]
    assert order[:8] == [3] * 8, "the urgent class comes first"
    assert order[8:13] == [2, 2, 2, 2, 1], "then four of the high class for each of the low one"


@pytest.mark.usefixtures("no_hurry")
def test_round_robin(driver: Driver) -> None:
    assert driver.admin.send(0x09, cdw10=0x01, cdw11=1).status == 0  # a burst of 2
    cq = driver.create(1, 64)
    at = driver.memory.take(PAGE)
    assert create_sq(driver, 2, 1, 64, at=at) == "SUCCESS"
    for n in range(4):
        cq.write(NvmeCommand.make(FLUSH, nsid=1, cid=0x100 + n))
        driver.memory.write(at + 64 * n, NvmeCommand.make(FLUSH, nsid=1, cid=0x200 + n).build())
    driver.doorbell(1, 4)
    driver.doorbell(2, 4)
    driver.run()
    assert [completion.sqid for completion in cq.wait(8)] == [1, 1, 2, 2, 1, 1, 2, 2]


def test_vectors_that_are_enabled(started: Callable[..., Driver]) -> None:
    """5.3: a vector beyond the messages that Multiple Message Enable gives: Invalid Interrupt Vector."""
    driver = started(interrupts="msi", namespaces=[{"memory": "64K"}])
    fds = driver.vectors(Irq.MSI, 4)
    assert create_cq(driver, 1, vector=3, flags=3, at=driver.memory.take(PAGE)) == "SUCCESS"
    assert create_cq(driver, 2, vector=4, flags=3, at=driver.memory.take(PAGE)) == "INVALID_INTERRUPT_VECTOR"
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("kind", [Irq.MSI, Irq.MSIX])
def test_an_interrupt_whose_cause_is_gone(started: Callable[..., Driver], kind: Irq) -> None:
    """PCIe 5.0, 6.1.4.5: a pending vector whose conditions have been satisfied before it is unmasked: its pending bit
    is cleared, and no message is sent."""
    driver = started(interrupts=kind.name.lower(), namespaces=[{"memory": "64K"}])
    fds = driver.vectors(kind, 4)
    first, second = driver.create(1, vector=3), driver.create(2, vector=3)
    messages = driver.device.msix or driver.device.msi
    master, memory = b"\x06\x00", b"\x02\x00"

    def send(*pairs: Pair) -> None:
        """Completions while a message cannot be sent: with bus mastering off when they are to be signalled."""
        driver.device.backend.irqs.types[kind].allowed = False
        for pair in pairs:
            pair.write(NvmeCommand.make(FLUSH, nsid=1))
            pair.ring()
        assert messages.pending(3)

    def allow() -> int:
        driver.device.config.write(4, memory)
        driver.device.config.write(4, master)
        return raised(fds[3])

    send(first, second)
    assert first.reap()
    assert messages.pending(3)  # the other queue's are there still
    assert second.reap()
    assert not messages.pending(3)
    assert allow() == 0
    send(second)
    assert allow() == 1
    for fd in fds:
        os.close(fd)


def test_masked_by_the_controller_and_taken_before_it_is_unmasked(started: Callable[..., Driver]) -> None:
    """7.5.1.1 (INTMS, INTMC): an interrupt is for completions that are there."""
    driver = started(interrupts="msi", namespaces=[{"memory": "64K"}])
    fds = driver.vectors(Irq.MSI, 4)
    pair = driver.create(1, vector=2)
    driver.put(ControllerRegs.INTMS, 1 << 2)
    for taken, signalled in ((True, 0), (False, 1)):
        pair.write(NvmeCommand.make(FLUSH, nsid=1))
        pair.ring()
        assert raised(fds[2]) == 0
        if taken:
            assert pair.reap()
        driver.put(ControllerRegs.INTMC, 1 << 2)
        assert raised(fds[2]) == signalled
        driver.put(ControllerRegs.INTMS, 1 << 2)
    for fd in fds:
        os.close(fd)


def test_more_commands_than_there_is_room_for(driver: Driver) -> None:
    """5.2, invalid doorbell value: a tail that would add more commands than there are free entries."""
    driver.admin.write(NvmeCommand.make(0x0C))
    driver.admin.ring()
    pair = driver.create(1, 16)
    for _ in range(10):
        assert pair.send(FLUSH, nsid=1).status == 0
    pair.write(NvmeCommand.make(FLUSH, nsid=1))
    pair.write(NvmeCommand.make(FLUSH, nsid=1))
    driver.doorbell(1, 12)
    driver.doorbell(1, 11)  # back: 15 more, where 13 entries are free
    assert len(pair.wait(2)) == 2
    (event,) = driver.admin.wait()
    assert event.result == 0x01_01_00
    assert pair.send(FLUSH, nsid=1).status == 0


END = 1 << 64


@pytest.mark.parametrize("fast", [True, False])
def test_queues_at_the_end_of_all_addresses(started: Callable[..., Driver], fast: bool) -> None:
    """A ring that would go on at address 0 cannot be (5.3, 5.4); one that ends before is as one outside memory."""
    driver = started(fast_path=fast, namespaces=[{"memory": "64K"}])
    low = os.urandom(PAGE)
    driver.memory.write(0, low)
    assert create_cq(driver, 1, 257, at=END - PAGE) == "INVALID_FIELD"
    assert create_cq(driver, 1, 256, at=END - PAGE) == "SUCCESS"
    assert create_sq(driver, 1, 1, 65, at=END - PAGE) == "INVALID_FIELD"
    assert create_sq(driver, 1, 1, 64, at=END - PAGE) == "SUCCESS"
    driver.doorbell(1, 63)
    driver.run()
    assert driver.status.CFS
    assert driver.memory.read(0, PAGE) == low


@pytest.mark.parametrize("which", ["iova of the queue", "iova of its completions"])
def test_the_shim_refuses_rings_that_wrap(driver: Driver, which: str) -> None:
    pair = driver.create(1)
    pair.write(NvmeCommand.make(0x02, nsid=1, dptr=prps(driver.page)))
    rings = driver.device.fast._rings
    queue = rings.submission(1) if "queue" in which else rings.completion(1)
    queue.iova = END - 256
    rings.submission(1).tail = 1
    with pytest.raises(OSError, match="Invalid argument"):
        rings.run(1, 8)
    queue.iova = pair.sq if "queue" in which else pair.cq


@pytest.mark.parametrize(("register", "entries"), [(ControllerRegs.ASQ, 65), (ControllerRegs.ACQ, 257)])
def test_admin_queues_at_the_end_of_all_addresses(driver: Driver, register: Register, entries: int) -> None:
    driver.disable()
    driver.set_up()
    driver.put(ControllerRegs.AQA, (entries - 1) << 16 | (entries - 1))
    driver.put(register, END - PAGE)
    driver.put(ControllerRegs.CC, CONFIGURATION | 1)
    assert driver.status.CFS and not driver.status.RDY
