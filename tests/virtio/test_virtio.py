"""The transport and the queues, by a device that gives back what it is sent."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.virtio.driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    INDIRECT,
    NEEDS_RESET,
    NEXT,
    WRITE,
    Driver,
    Queue,
)
from vmodel.device import Msix, ResetKind
from vmodel.dma import Dma
from vmodel.virtio.pci import EVENT_IDX, INDIRECT_DESC, VENDOR, VERSION_1, VirtioDevice
from vmodel.virtio.queue import QueueError, Virtqueue


class Echo(VirtioDevice):
    """Gives back what it is sent."""

    vendor_id, device_id, class_code = VENDOR, 0x107F, 0xFF0000
    queue_sizes = (16, 8)
    offered = 1
    msix = Msix(vectors=2, own_bar=2)

    def on_queue(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            queue.answer(chain, queue.read(chain, 4096))


@pytest.fixture
def driver() -> Iterator[Driver]:
    device = Echo("echo")
    made = Driver(device)
    yield made
    made.close()
    device.close()


def test_capabilities_lead_to_the_parts(driver: Driver) -> None:
    config = bytes(driver.device.config.view)
    at, parts = config[0x34], {}
    while at:
        if config[at] == 9:
            _, _, size, kind, bar = config[at : at + 5]
            offset, length = struct.unpack_from("<II", config, at + 8)
            parts[kind] = (size, bar, offset, length)
        at = config[at + 1]
    assert parts == {
        1: (16, 0, 0, 0x40),
        2: (20, 0, 0x3000, 0x100),
        3: (16, 0, 0x1000, 4),
        4: (16, 0, 0x2000, 0x1000),
        5: (20, 0, 0, 0),
    }


def test_features(driver: Driver) -> None:
    assert driver.offered() == 1 | INDIRECT_DESC | EVENT_IDX | VERSION_1
    driver.put(0x00, 4, 7)
    assert driver.get(0x04, 4) == 0
    for features, accepted in ((1, False), (VERSION_1 | 2, False), (VERSION_1 | 1, True)):
        driver.put(0x14, 1, 0)
        driver.put(0x14, 1, ACKNOWLEDGE | DRIVER)
        driver.accept(features)
        driver.put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert bool(driver.status & FEATURES_OK) is accepted
    driver.accept(VERSION_1)  # too late
    assert driver.device.features == VERSION_1 | 1


def test_features_as_the_driver_has_accepted_them(driver: Driver) -> None:
    """4.1.4.3.1: driver_feature shows what was written; not what came too late (3.1.1), nor other words."""
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER)
    driver.accept(VERSION_1 | 1)
    driver.put(0x08, 4, 2)
    driver.put(0x0C, 4, 7)
    assert driver.get(0x0C, 4) == 0
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    driver.put(0x08, 4, 0)
    assert driver.get(0x0C, 4) == 1
    driver.put(0x0C, 4, 0)
    assert driver.get(0x0C, 4) == 1
    driver.put(0x08, 4, 1)
    assert driver.get(0x0C, 4) == 1


def test_features_may_be_negotiated_again(driver: Driver) -> None:
    """2.2.2: what was accepted once is accepted after a reset."""
    for _ in range(3):
        driver.start([0], 1)
        driver.device.reset(ResetKind.DEVICE)


def test_driver_ok_needs_features_ok(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    """3.1.1: DRIVER_OK comes after FEATURES_OK; what a driver that skips it asks for is not done (2.1.2)."""
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER)
    driver.accept(VERSION_1)
    queue = driver.set_up(0)
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert driver.status == ACKNOWLEDGE | DRIVER
    assert "no DRIVER_OK: FEATURES_OK is not set" in caplog.text
    queue.send(b"x", 4)
    queue.notify()
    assert queue.used_now() == []
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    queue.notify()
    assert len(queue.used_now()) == 1


def test_the_driver_clears_no_status_bit(driver: Driver) -> None:
    """2.1.1: the driver must not; the device goes by what was set."""
    driver.start([])
    driver.put(0x14, 1, FAILED)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED


def test_a_reset_needed_is_said(driver: Driver) -> None:
    """2.1.2: a configuration change notification, with MSI-X too (4.1.4.5.1); none before DRIVER_OK."""
    device = driver.device
    for msix in (False, True):
        driver.start([])
        device.isr.STATUS = 0
        if msix:
            at = device.config.view[0x34]
            while device.config.view[at] != 0x11:
                at = device.config.view[at + 1]
            device.config.write(at + 2, b"\x00\x80")
            assert device.msix.enabled
        driver.put(0x10, 2, 1)
        driver.put(0x16, 2, 0)
        driver.put(0x20, 4, 0x1001)
        driver.put(0x1C, 2, 1)
        assert driver.status & NEEDS_RESET
        assert device.isr.STATUS & 2
        assert bool(device.config.view[6] & 8) is not msix
        driver.put(0x14, 1, 0)
    driver.put(0x16, 2, 0)
    driver.put(0x20, 4, 0x1001)
    driver.put(0x1C, 2, 1)
    assert driver.status & NEEDS_RESET and device.isr.STATUS == 0


def test_the_generation_of_the_configuration(driver: Driver) -> None:
    """4.1.4.3.1: another after a change, and after 256 changes, too."""
    device = driver.device
    driver.start([])
    before = device.backend.region_read(0, 0x15, 1)
    assert device.backend.region_read(0, 0x15, 1) == before
    for changes in (1, 256, 300):
        for _ in range(changes):
            device.config_changed()
        after = device.backend.region_read(0, 0x15, 1)
        assert after != before and device.backend.region_read(0, 0x15, 1) == after
        before = after
    assert device.isr.STATUS & 2
    driver.put(0x14, 1, 0)
    device.isr.STATUS = 0
    device.config_changed()
    assert device.isr.STATUS == 0  # no driver


def test_identity(driver: Driver) -> None:
    """4.1.2.1."""
    config = driver.device.config.view
    vendor, device = struct.unpack_from("<HH", config, 0)
    subsystem_vendor, subsystem = struct.unpack_from("<HH", config, 0x2C)
    assert vendor == 0x1AF4 and 0x1040 <= device <= 0x107F
    assert config[8] >= 1 and subsystem_vendor == 0x1AF4 and subsystem >= 0x40


def test_a_request_and_its_interrupt(driver: Driver) -> None:
    (queue,) = driver.start([0])
    assert queue.ask(b"hello", 16) == b"hello"
    assert driver.device.isr.STATUS == 1
    assert driver.device.backend.region_read(0, 0x1000, 1) == 1  # a read clears it
    assert driver.device.isr.STATUS == 0
    assert queue.ask(b"hello", 3) == b"hel"
    assert queue.ask(b"", 3) == b""


def test_nothing_happens_before_driver_ok(driver: Driver) -> None:
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER)
    driver.accept(VERSION_1)
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    queue = driver.set_up(0)
    queue.send(b"x", 4)
    queue.notify()
    assert queue.used_now() == []


def test_registers_of_the_queue_that_is_selected(driver: Driver) -> None:
    driver.start([0])
    seen = []
    for n in (0, 1, 2, 0xFFFF):
        driver.put(0x16, 2, n)
        seen.append((driver.get(0x18, 2), driver.get(0x1C, 2), driver.get(0x20, 4)))
    assert seen == [(16, 1, 0x10000), (8, 0, 0), (0, 0, 0), (0, 0, 0)]
    driver.put(0x16, 2, 0)
    driver.put(0x20, 4, 0x5000)  # it is enabled: its addresses stay
    driver.put(0x18, 2, 8)
    assert (driver.get(0x20, 4), driver.get(0x18, 2)) == (0x10000, 16)
    driver.put(0x16, 2, 1)
    for size, stored in ((4, 4), (3, 4), (16, 4), (0, 4), (8, 8)):
        driver.put(0x18, 2, size)
        assert driver.get(0x18, 2) == stored


def test_vectors(driver: Driver) -> None:
    driver.put(0x10, 2, 1)
    assert driver.get(0x10, 2) == 1
    driver.put(0x10, 2, 2)  # there are two
    assert driver.get(0x10, 2) == 0xFFFF
    driver.put(0x16, 2, 5)
    driver.put(0x1A, 2, 0)
    assert driver.get(0x1A, 2) == 0xFFFF  # no such queue


def test_reset_by_status_and_by_the_bus(driver: Driver) -> None:
    for reset in (lambda: driver.put(0x14, 1, 0), lambda: driver.device.reset(ResetKind.DEVICE)):
        driver.start([0, 1])
        reset()
        assert (driver.status, driver.device.features) == (0, 0)
        assert not any(queue.enabled for queue in driver.device.queues)
        driver.device.config.write(4, b"\x06\x00")


def test_indirect_and_event_index(driver: Driver) -> None:
    (queue,) = driver.start([0], INDIRECT_DESC | EVENT_IDX)
    table, memory = queue.data + 0x2000, driver.memory
    memory.write(queue.data, b"indirect")
    memory.write(table, struct.pack("<QIHH", queue.data, 8, NEXT, 1))
    memory.write(table + 16, struct.pack("<QIHH", queue.data + 0x1000, 8, WRITE, 0))
    queue.describe(3, table, 32, INDIRECT)
    queue.offer(3)
    queue.notify()
    assert queue.used_now() == [(3, 8)]
    assert memory.read(queue.data + 0x1000, 8) == b"indirect"
    # The device asks for a notification of the next one.
    assert memory.u16(queue.used + 4 + 8 * queue.size) == 1
    assert driver.device.isr.STATUS == 1
    driver.device.isr.STATUS = 0
    # The driver wants an interrupt for the fourth answer only.
    memory.write(queue.available + 4 + 2 * queue.size, struct.pack("<H", 3))
    for n in range(2, 6):
        queue.offer(3)
        queue.notify()
        assert bool(driver.device.isr.STATUS) is (n >= 4), n


def test_no_interrupt_when_the_driver_does_not_want_one(driver: Driver) -> None:
    (queue,) = driver.start([0])
    driver.memory.write(queue.available, b"\x01\0")
    assert queue.ask(b"x") == b"x"
    assert driver.device.isr.STATUS == 0


def test_used_event_without_its_feature(driver: Driver) -> None:
    """2.7.7.2: ignored unless EVENT_IDX was negotiated."""
    (queue,) = driver.start([0])
    driver.memory.write(queue.available + 4 + 2 * queue.size, struct.pack("<H", 100))
    assert queue.ask(b"x") == b"x" and driver.device.isr.STATUS == 1


def test_spurious_notifications(driver: Driver) -> None:
    """2.7.10.2: also of queues that are not set up, or not there."""
    (queue,) = driver.start([0])
    for n in (0, 0, 1, 2, 63):
        driver.put(0x3000 + 4 * n, 2, n)
    assert driver.device.errors == 0 and driver.device.isr.STATUS == 0 and not driver.status & NEEDS_RESET
    assert queue.ask(b"x") == b"x"


def test_the_order_of_an_answer(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.7.8.2: the answer and the used entry are there before the index."""
    (queue,) = driver.start([0])
    writes: list[tuple[int, int]] = []
    real = Dma.write

    def write(self: Dma, iova: int, data: bytes) -> None:
        writes.append((iova, len(data)))
        real(self, iova, data)

    monkeypatch.setattr(Dma, "write", write)
    queue.ask(b"hello", 5)
    assert writes == [(queue.data + 0x1000, 5), (queue.used + 4, 8), (queue.used + 2, 2)]


def test_the_indexes_wrap(driver: Driver) -> None:
    """2.7.6, 2.7.8: at 65536."""
    (queue,) = driver.start([0])
    queue.send(b"x", 4)
    queue.notify()
    for _ in range(65536 // 16 + 1):
        for _ in range(15):
            queue.offer(0)
        queue.notify()
        for _ in range(16):  # at most one turn for each request
            if driver.device.backend.has_work():
                driver.device.backend.run_due(0)
    for _ in range(5000):
        queue.offer(0)
        queue.notify()
    assert driver.memory.u16(queue.used + 2) == (1 + 15 * 4097 + 5000) % 65536 == driver.memory.u16(queue.available + 2)
    assert not driver.status & NEEDS_RESET


def test_the_pin_follows_isr_status(driver: Driver) -> None:
    """4.1.4.5.1: without MSI-X PCI Status' Interrupt Status is whether ISR status has a bit."""
    (queue,) = driver.start([0])
    config = driver.device.config.view
    assert not config[6] & 8
    queue.ask(b"x")
    assert config[6] & 8 and driver.device.isr.STATUS == 1
    driver.device.backend.region_read(0, 0x1000, 1)
    assert not config[6] & 8 and driver.device.isr.STATUS == 0


def test_no_vector_no_interrupt(driver: Driver) -> None:
    """4.1.5.3.1, 4.1.5.4.1."""
    (queue,) = driver.start([0])
    device = driver.device
    at = device.config.view[0x34]
    while device.config.view[at] != 0x11:
        at = device.config.view[at + 1]
    device.config.write(at + 2, b"\x00\x80")
    before = device.backend.irqs.raised
    assert queue.ask(b"x") == b"x"
    device.config_changed()
    assert device.backend.irqs.raised == before and not device.config.view[6] & 8


# ---- hostile drivers ------------------------------------------------------------------------------


def breaks(queue: Queue) -> None:
    """The device needs a reset, does no more, and works again after one."""
    driver = queue.driver
    queue.notify()
    assert driver.status & NEEDS_RESET
    assert driver.device.errors == 0
    queue.used_now()
    queue.send(b"x", 4)
    queue.notify()
    assert queue.used_now() == []
    (fresh,) = driver.start([0])
    fresh.memory.write(fresh.available, bytes(4))
    fresh.memory.write(fresh.used, bytes(4))
    assert fresh.ask(b"again") == b"agai"


@pytest.mark.parametrize("case", range(16))
def test_chains_that_cannot_be(driver: Driver, case: int) -> None:
    (queue,) = driver.start([0], INDIRECT_DESC)
    table = queue.data + 0x2000
    head = 0
    if case == 0:  # a circle
        queue.describe(0, queue.data, 4, NEXT, 1)
        queue.describe(1, queue.data, 4, NEXT, 0)
    elif case == 1:  # to itself
        queue.describe(0, queue.data, 4, NEXT, 0)
    elif case == 2:  # past the table
        queue.describe(0, queue.data, 4, NEXT, 16)
    elif case == 3:  # a head that is none
        head = 0xFFFF
    elif case == 4:  # to read, behind to write
        queue.describe(0, queue.data, 4, NEXT | WRITE, 1)
        queue.describe(1, queue.data, 4, 0)
    elif case == 5:  # outside of memory
        queue.describe(0, 1 << 40, 4, 0)
    elif case == 6:  # an indirect table in an indirect table
        driver.memory.write(table, struct.pack("<QIHH", table, 16, INDIRECT, 0))
        queue.describe(0, table, 16, INDIRECT)
    elif case == 7:  # a size that is none
        queue.describe(0, table, 17, INDIRECT)
    elif case == 8:  # an indirect table that goes on
        queue.describe(0, table, 16, INDIRECT | NEXT, 1)
    elif case == 9:  # a circle in an indirect table
        driver.memory.write(table, struct.pack("<QIHH", queue.data, 4, NEXT, 0))
        queue.describe(0, table, 16, INDIRECT)
    elif case == 10:  # longer than the queue, in a table that is (2.7.5.3.1)
        parts = [struct.pack("<QIHH", queue.data, 1, NEXT, n + 1) for n in range(16)]
        driver.memory.write(table, b"".join(parts) + struct.pack("<QIHH", queue.data, 1, 0, 0))
        queue.describe(0, table, 16 * 17, INDIRECT)
    elif case == 11:  # longer than the queue, with the parts in front of the table
        driver.memory.write(table, struct.pack("<QIHH", queue.data, 1, NEXT, 1) * 15)
        driver.memory.write(table, b"".join(struct.pack("<QIHH", queue.data, 1, NEXT, n + 1) for n in range(15)))
        driver.memory.write(table + 16 * 15, struct.pack("<QIHH", queue.data, 1, 0, 0))
        queue.describe(0, queue.data, 1, NEXT, 1)
        queue.describe(1, table, 16 * 16, INDIRECT)
    elif case == 12:  # a table that reaches past the last address
        queue.describe(0, (1 << 64) - 16, 32, INDIRECT)
    elif case == 13:  # a part that does, to read
        queue.describe(0, (1 << 64) - 2, 4, 0)
    elif case == 14:  # and to write
        queue.describe(0, queue.data, 4, NEXT, 1)
        queue.describe(1, (1 << 64) - 1, 4, WRITE)
    else:  # more than 2^32 bytes (2.7.5)
        queue.describe(0, queue.data, 4, NEXT, 1)
        queue.describe(1, 0, (1 << 32) - 3, WRITE)
    queue.offer(head)
    breaks(queue)


def test_the_longest_chain(driver: Driver) -> None:
    """2.7.5.3.2: descriptors of the queue, then a table that is longer; the chain is as long as the queue."""
    (queue,) = driver.start([0], INDIRECT_DESC)
    table = queue.data + 0x2000
    parts = [struct.pack("<QIHH", queue.data + n, 1, NEXT, n + 1) for n in range(13)]
    driver.memory.write(table, b"".join(parts) + struct.pack("<QIHH", queue.data + 0x1000, 16, WRITE, 0))
    driver.memory.write(queue.data, bytes(range(14)))
    queue.describe(5, queue.data + 13, 1, NEXT, 2)
    queue.describe(2, queue.data + 13, 1, NEXT, 9)
    queue.describe(9, table, 16 * 1000, INDIRECT | WRITE)  # which is to be ignored (2.7.5.3.2)
    queue.offer(5)
    queue.notify()
    assert queue.used_now() == [(5, 15)]
    assert driver.memory.read(queue.data + 0x1000, 15) == bytes([13, 13, *range(13)])


def test_the_last_address(driver: Driver) -> None:
    """Descriptors may end there: nothing wraps."""
    (queue,) = driver.start([0])
    memfd = os.memfd_create("top")
    os.ftruncate(memfd, 4096)
    driver.device.memory.map((1 << 64) - 4096, 4096, fd=memfd)
    os.pwrite(memfd, b"last", 4092)
    queue.describe(0, (1 << 64) - 4, 4, NEXT, 1)
    queue.describe(1, (1 << 64) - 8, 4, WRITE)
    queue.offer(0)
    queue.notify()
    assert queue.used_now() == [(0, 4)] and os.pread(memfd, 8, 4088) == b"lastlast"
    os.close(memfd)


def test_a_driver_that_goes_on_breaking_rules_fills_no_log(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(200):
        (queue,) = driver.start([0])
        queue.memory.write(queue.available, bytes(4))
        queue.describe(0, (1 << 64) - 1, 4, 0)
        queue.memory.write(queue.available + 2, b"\1\0")
        queue.notify()
        assert driver.status & NEEDS_RESET
    assert 1 <= len(caplog.records) <= 12 and not any(record.exc_info for record in caplog.records)
    assert "needs a reset" in caplog.text


def test_indirect_without_having_asked_for_it(driver: Driver) -> None:
    (queue,) = driver.start([0])
    queue.describe(0, queue.data, 16, INDIRECT)
    queue.offer(0)
    breaks(queue)


def test_more_requests_than_the_queue_has(driver: Driver) -> None:
    (queue,) = driver.start([0])
    driver.memory.write(queue.available + 2, struct.pack("<H", 17))
    breaks(queue)


@pytest.mark.parametrize("offset", [0x20, 0x28, 0x30])
def test_rings_that_are_not_aligned(driver: Driver, offset: int) -> None:
    driver.start([])
    driver.put(0x16, 2, 0)
    driver.put(offset, 4, 0x1001)
    driver.put(0x1C, 2, 1)
    assert driver.status & NEEDS_RESET and not driver.get(0x1C, 2)


@pytest.mark.parametrize(("offset", "size"), [(0x20, 256), (0x28, 6 + 32), (0x30, 6 + 128)])
def test_rings_that_reach_past_the_last_address(driver: Driver, offset: int, size: int) -> None:
    """2.7: each part has its size; the last place where it fits is as good as any."""
    for address, fits in (((1 << 64) - size & -16, True), ((1 << 64) - size + 16 & -16, False)):
        driver.start([])
        driver.put(0x16, 2, 0)
        driver.put(offset, 4, address & 0xFFFF_FFFF)
        driver.put(offset + 4, 4, address >> 32)
        driver.put(0x1C, 2, 1)
        assert bool(driver.status & NEEDS_RESET) is not fits
        assert driver.get(0x1C, 2) == int(fits)
        driver.device.backend.region_write(0, 0x3000, 2, 0)  # nothing that wraps comes of it
        assert driver.device.errors == 0


@pytest.mark.parametrize("offset", [0x20, 0x28, 0x30])
def test_rings_outside_of_memory(driver: Driver, offset: int) -> None:
    driver.start([])
    queue = Queue(driver, 0, 16)
    for at, address in ((0x20, queue.descriptors), (0x28, queue.available), (0x30, queue.used)):
        driver.put(at, 4, address)
    driver.put(offset + 4, 4, 0x100)
    driver.put(0x1C, 2, 1)
    queue.send(b"x", 4)
    queue.notify()
    assert driver.status & NEEDS_RESET and driver.device.errors == 0


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.lists(
        st.tuples(
            st.sampled_from([0, 0x10000, 0x18000, 0x18010, 1 << 20, (1 << 64) - 1]),
            st.sampled_from([0, 1, 16, 32, 4096, 1 << 20, (1 << 32) - 1]),
            st.integers(0, 7),
            st.integers(0, 17),
        ),
        min_size=16,
        max_size=16,
    ),
    heads=st.lists(st.integers(0, 17), min_size=1, max_size=4),
)
def test_any_table(driver: Driver, table: list[tuple[int, int, int, int]], heads: list[int]) -> None:
    """Whatever is in it: each request is answered, or the device needs a reset; and it never takes an error of ours."""
    (queue,) = driver.start([0], INDIRECT_DESC)
    driver.memory.write(queue.available, bytes(64))
    driver.memory.write(queue.used, bytes(64))
    for n, entry in enumerate(table):
        queue.describe(n, *entry)
    for head in heads:
        queue.offer(head)
    queue.notify()
    answered = queue.used_now()
    assert driver.device.errors == 0
    if not driver.status & NEEDS_RESET:
        assert [head for head, _ in answered] == heads


def test_the_window_in_config_space(driver: Driver) -> None:
    """4.1.4.9: the BAR by way of config space."""
    device = driver.device
    at = device.config.view[0x34]
    while device.config.view[at + 3] != 5 or device.config.view[at] != 9:
        at = device.config.view[at + 1]

    def window(offset: int, length: int) -> None:
        device.config.write(at + 4, b"\0")
        device.config.write(at + 8, struct.pack("<I", offset))
        device.config.write(at + 12, struct.pack("<I", length))

    window(0x12, 2)
    assert device.backend.region_read(7, at + 16, 2) == 2  # num_queues
    window(0x14, 1)
    device.config.write(at + 16, bytes([ACKNOWLEDGE]))
    assert driver.status == ACKNOWLEDGE
    # A read of the data is a read of the BAR, each time; setting the window, even to the same place, is no access.
    assert device.backend.region_read(7, at + 16, 1) == ACKNOWLEDGE
    driver.put(0x14, 1, ACKNOWLEDGE | DRIVER)
    assert device.backend.region_read(7, at + 16, 4) == ACKNOWLEDGE | DRIVER
    driver.put(0x14, 1, 0)
    window(0x14, 1)
    assert driver.status == 0
    device.isr.STATUS = 3
    window(0x1000, 1)
    assert device.isr.STATUS == 3
    assert device.backend.region_read(7, at + 16, 1) == 3 and device.isr.STATUS == 0
    window(1 << 20, 4)  # nothing is there
    device.config.write(at + 16, b"\1\0\0\0")
    assert device.errors == 0


def test_a_queue_is_a_power_of_two() -> None:
    for size in (0, 3, 65536):
        with pytest.raises(ValueError, match="power of two"):
            Virtqueue(Echo("x").dma, 0, size)


def test_what_cannot_be_read_is_a_queue_error(driver: Driver) -> None:
    (queue,) = driver.start([0])
    mine = driver.device.queues[0]
    queue.describe(0, 1 << 40, 4, 0)
    queue.offer(0)
    chain = mine.pop()
    assert chain is not None and (chain.read_size, chain.write_size) == (4, 0)
    with pytest.raises(QueueError, match="NO_WINDOW"):
        mine.read(chain, 4)
    assert DRIVER_OK & driver.status
