"""virtio-iommu reports faults to its driver (5.13.6.9), as far as there are buffers."""

from __future__ import annotations

import struct

import pytest

from tests.virtio.driver import Queue
from tests.virtio.world import READ, A, World
from vmodel.device import ResetKind
from vmodel.devices.virtio_iommu import MAX_EVENTS
from vmodel.errors import DmaFault, Reason


def offer_events(queue: Queue, count: int) -> None:
    for n in range(count):
        queue.describe(n, queue.data + 32 * n, 24, 2)
        queue.offer(n)
    queue.notify()


def test_faults_are_events(world: World) -> None:
    offer_events(world.events, 2)
    world.attach(1, A)
    world.map(1, 0x8000, 0x8FFF, 0, READ)
    assert world.reaches("a", 0x8010) is None
    with pytest.raises(DmaFault):
        world.machine.devices["a"].dma.read(0x5010, 4)
    world.settle()
    assert [written for _, written in world.events.used_now()] == [24, 24]
    events = [struct.unpack("<B3xIIIQ", world.driver.memory.read(world.events.data + 32 * n, 24)) for n in (0, 1)]
    assert events == [(2, 0x102, A, 0, 0x8010), (2, 0x101, A, 0, 0x5010)]
    assert [r.reason for r in world.machine.system.iommus[0].faults.drain()] == [Reason.PERMISSION, Reason.NOT_MAPPED]


def test_events_wait_for_buffers(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """5.13.6.9: without a buffer the device waits for one, or drops the event; what it drops it counts, and says so."""
    world.attach(1, A)
    for _ in range(MAX_EVENTS + 36):
        world.reaches("a", 0x5000)
    assert world.iommu.dropped_faults == 36
    assert "a fault is dropped: no buffers in the event queue" in caplog.text
    world.settle()
    assert world.events.used_now() == []
    offer_events(world.events, 8)
    assert len(world.events.used_now()) == 8
    offer_events(world.events, 64)
    assert len(world.events.used_now()) == MAX_EVENTS - 8


def test_faults_while_the_device_is_busy_are_bounded(world: World) -> None:
    """Its thread may wait for its client while other devices fault without end."""
    offer_events(world.events, 64)
    world.attach(1, A)
    for _ in range(1000):
        world.reaches("a", 0x5000)
    assert len(world.iommu.backend.agenda._soon) == 1
    world.settle()
    assert len(world.events.used_now()) == MAX_EVENTS
    assert world.iommu.dropped_faults == 1000 - MAX_EVENTS
    world.reaches("a", 0x6000)
    world.settle()
    offer_events(world.events, 1)
    assert len(world.events.used_now()) == 1


def test_faults_after_a_reset_are_told_again(world: World) -> None:
    """The reset drops the deferred work, and the next fault defers its own."""
    world.attach(1, A)
    world.reaches("a", 0x5000)
    world.iommu.reset(ResetKind.DEVICE)
    world.iommu.config.write(4, b"\x06\x00")
    world.start()
    offer_events(world.events, 1)
    assert world.events.used_now() == []  # the old one's is dropped
    world.attach(1, A)
    world.reaches("a", 0x5000)
    world.settle()
    assert [written for _, written in world.events.used_now()] == [24]


def test_event_buffers_that_are_too_small(world: World) -> None:
    """5.13.6.9.2: a report takes one buffer, and one that is too small is not filled with a part of it."""
    queue = world.events
    for n, size in enumerate((8, 23, 24)):
        queue.describe(n, queue.data + 32 * n, size, 2)
        queue.offer(n)
    queue.notify()
    world.attach(1, A)
    world.reaches("a", 0x5000)
    world.settle()
    assert queue.used_now() == [(0, 0), (1, 0), (2, 24)]
    assert world.driver.memory.read(queue.data, 64) == bytes(64)


def test_no_events_without_a_driver(world: World) -> None:
    world.driver.put(0x14, 1, 0)
    group = world.machine.system["a"].group
    assert group is not None
    group.attach(world.machine.system.iommus[0].blocked)
    world.reaches("a", 0x5000)
    world.settle()
    assert world.iommu.errors == 0
