"""SET_IRQS: every combination, and what then happens when the device raises an interrupt."""

from __future__ import annotations

import errno
import itertools
import os

import pytest

from tests.proto.config_space import capability
from tests.proto.conftest import open_fds
from tests.proto.toy import Toy
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import Client, EventFd
from vmodel.vfio_user.wire import Command, Irq, IrqSetFlags, Region

NONE, BOOL, EVENTFD = IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD
MASK, UNMASK, TRIGGER = IrqSetFlags.MASK, IrqSetFlags.UNMASK, IrqSetFlags.TRIGGER


def on_device(toy: Toy, client: Client, call: object) -> None:
    """Runs something on the device's thread."""
    toy.defer(call)  # type: ignore[arg-type]
    client.info()


@pytest.mark.parametrize(
    "flags",
    [f for f in range(64) if f not in {d | a for d, a in itertools.product((1, 2, 4), (8, 16, 32))}]
    + [1 | 32 | 64, 0xFFFFFFFF],
)
def test_illegal_flags(client: Client, flags: int) -> None:
    with pytest.raises(OSError) as caught:
        client.set_irqs(Irq.MSIX, flags, data=b"\1" if flags & 2 else b"")
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("data", "action"), [*itertools.product((NONE, BOOL, EVENTFD), (MASK, UNMASK, TRIGGER))])
@pytest.mark.parametrize("index", [Irq.INTX, Irq.MSI, Irq.MSIX, Irq.ERR, Irq.REQ])
def test_every_combination(client: Client, index: int, data: int, action: int) -> None:
    event = EventFd()
    before = open_fds()
    arguments = {"data": b"\1"} if data == BOOL else {"fds": [event.fd]} if data == EVENTFD else {}
    legal = action == TRIGGER or index not in (Irq.ERR, Irq.REQ)
    for _ in range(3):
        if legal:
            client.set_irqs(index, data | action, **arguments)  # type: ignore[arg-type]
        else:
            with pytest.raises(OSError) as caught:
                client.set_irqs(index, data | action, **arguments)  # type: ignore[arg-type]
            assert caught.value.errno == errno.EINVAL
    assert open_fds() == before + (legal and data == EVENTFD)
    if data == EVENTFD and legal:
        client.set_irqs(index, data | action)  # no fd: taken away
        assert open_fds() == before
    event.close()


@pytest.mark.parametrize(
    ("start", "count"), [(70, 1), (0, 71), (69, 2), (2**32 - 1, 1), (1, 2**32 - 1), (2**31, 2**31), (70, 0)]
)
def test_vectors_that_are_not_there(client: Client, start: int, count: int) -> None:
    with pytest.raises(OSError) as caught:
        client.set_irqs(Irq.MSIX, NONE | TRIGGER, start, count)
    assert caught.value.errno == errno.EINVAL


def test_wrong_data(client: Client) -> None:
    event = EventFd()
    before = open_fds()
    for flags, count, arguments in (
        (BOOL | TRIGGER, 2, {"data": b"\1"}),
        (BOOL | TRIGGER, 2, {"data": b"\1\1\1"}),
        (NONE | TRIGGER, 1, {"data": b"\1"}),
        (EVENTFD | TRIGGER, 2, {"fds": [event.fd]}),
        (EVENTFD | TRIGGER, 1, {"fds": [event.fd] * 2}),
        (NONE | TRIGGER, 1, {"fds": [event.fd]}),
        (BOOL | TRIGGER, 0, {}),
        (NONE | MASK, 0, {}),
        (EVENTFD | TRIGGER, 0, {}),
    ):
        with pytest.raises(OSError) as caught:
            client.set_irqs(Irq.MSIX, flags, 0, count, **arguments)  # type: ignore[arg-type]
        assert caught.value.errno == errno.EINVAL
    for size in range(20):
        with pytest.raises(OSError):
            client.request(Command.DEVICE_SET_IRQS, b"\x14\0\0\0".ljust(size, b"\0")[:size])
    assert open_fds() == before
    event.close()


def test_only_eventfds(client: Client) -> None:
    read_end, write_end = os.pipe()
    before = open_fds()
    with pytest.raises(OSError) as caught:
        client.set_irqs(Irq.INTX, EVENTFD | TRIGGER, fds=[write_end])
    assert caught.value.errno == errno.EINVAL
    assert open_fds() == before
    os.close(read_end)
    os.close(write_end)


def test_intx_is_a_level(driver: Client, toy: Toy) -> None:
    (event,) = driver.eventfds(Irq.INTX)
    on_device(toy, driver, toy.intx.raise_)
    assert event.wait() == 1
    on_device(toy, driver, toy.intx.raise_)
    assert event.quiet()  # automasked
    assert driver.region_read(Region.CONFIG, 6, 1)[0] & 8
    driver.set_irqs(Irq.INTX, NONE | UNMASK)
    assert event.wait() == 1  # the level still stands
    on_device(toy, driver, toy.intx.lower)
    driver.set_irqs(Irq.INTX, NONE | UNMASK)
    assert event.quiet()
    assert not driver.region_read(Region.CONFIG, 6, 1)[0] & 8
    event.close()


def test_intx_disable(driver: Client, toy: Toy) -> None:
    (event,) = driver.eventfds(Irq.INTX)
    driver.region_write(Region.CONFIG, 4, b"\x07\x04")
    on_device(toy, driver, toy.intx.raise_)
    assert event.quiet()
    driver.region_write(Region.CONFIG, 4, b"\x07\x00")
    assert event.wait() == 1
    event.close()


def test_mask_and_unmask_eventfds(driver: Client, toy: Toy) -> None:
    (event,) = driver.eventfds(Irq.INTX)
    masked, unmasked = EventFd(), EventFd()
    driver.set_irqs(Irq.INTX, EVENTFD | MASK, fds=[masked.fd])
    driver.set_irqs(Irq.INTX, EVENTFD | UNMASK, fds=[unmasked.fd])
    on_device(toy, driver, toy.intx.raise_)
    assert (event.wait(), masked.wait()) == (1, 1)
    on_device(toy, driver, toy.intx.lower)
    driver.set_irqs(Irq.INTX, NONE | UNMASK)
    assert unmasked.wait() == 1
    for each in (event, masked, unmasked):
        each.close()


def test_the_client_triggers(driver: Client) -> None:
    events = driver.eventfds(Irq.MSIX, 3)
    driver.set_irqs(Irq.MSIX, BOOL | TRIGGER, 0, 3, data=b"\1\0\1")
    assert events[0].wait() == 1
    assert events[1].quiet()
    assert events[2].wait() == 1
    driver.set_irqs(Irq.MSIX, NONE | TRIGGER, 0, 0)  # disable all
    driver.set_irqs(Irq.MSIX, NONE | TRIGGER, 0, 3)
    assert all(event.quiet(0.01) for event in events)
    for event in events:
        event.close()


def test_msi(driver: Client, toy: Toy) -> None:
    at = capability(driver, 5)
    events = driver.eventfds(Irq.MSI, 4)
    on_device(toy, driver, lambda: toy.msi.fire(2))
    assert events[2].quiet()  # not enabled
    driver.region_write(Region.CONFIG, at + 2, b"\x21\x00")
    on_device(toy, driver, lambda: toy.msi.fire(2))
    assert events[2].wait() == 1
    driver.region_write(Region.CONFIG, at + 0x10, b"\x04\0\0\0")  # mask vector 2
    on_device(toy, driver, lambda: toy.msi.fire(2))
    assert events[2].quiet()
    assert driver.region_read(Region.CONFIG, at + 0x14, 4) == b"\x04\0\0\0"  # pending
    driver.region_write(Region.CONFIG, at + 0x10, bytes(4))
    assert events[2].wait() == 1
    assert driver.region_read(Region.CONFIG, at + 0x14, 4) == bytes(4)
    for event in events:
        event.close()


def test_more_vectors_than_fds_of_a_message(driver: Client, toy: Toy) -> None:
    events = driver.eventfds(Irq.MSIX, 70)
    driver.region_write(Region.CONFIG, capability(driver, 0x11) + 2, b"\x00\x80")
    for n in (0, 15, 16, 69):
        on_device(toy, driver, lambda n=n: toy.msix.fire(n))
        assert [n for n, event in enumerate(events) if not event.quiet(0)] == [n]
        assert events[n].wait() == 1
    for event in events:
        event.close()


def test_msix_masks_and_pending_bits(driver: Client, toy: Toy) -> None:
    at = capability(driver, 0x11)
    table, pba = 0, toy.msix.pba_offset
    events = driver.eventfds(Irq.MSIX, 8)
    enable, function_mask = b"\x00\x80", b"\x00\xc0"
    driver.region_write(Region.CONFIG, at + 2, enable)
    on_device(toy, driver, lambda: toy.msix.fire(1))
    assert events[1].wait() == 1
    # The function mask holds all vectors back.
    driver.region_write(Region.CONFIG, at + 2, function_mask)
    on_device(toy, driver, lambda: toy.msix.fire(3))
    assert events[3].quiet()
    assert driver.region_read(4, pba, 8) == b"\x08" + bytes(7)
    driver.region_write(Region.CONFIG, at + 2, enable)
    assert events[3].wait() == 1
    assert driver.region_read(4, pba, 8) == bytes(8)
    # The table's own mask bits, once the client writes there; bits that are reserved stay 0.
    driver.region_write(4, table + 5 * 16, b"\xff" * 16)
    assert driver.region_read(4, table + 5 * 16, 16) == b"\xff" * 12 + b"\x01\0\0\0"
    on_device(toy, driver, lambda: toy.msix.fire(5))
    assert events[5].quiet()
    driver.region_write(4, pba, b"\0" * 8)  # read-only
    assert driver.region_read(4, pba, 8) == b"\x20" + bytes(7)
    driver.region_write(4, table + 5 * 16 + 12, bytes(4))
    assert events[5].wait() == 1
    # A vector whose eventfd is taken away is pending, and fires when one comes.
    driver.set_irqs(Irq.MSIX, EVENTFD | TRIGGER, 0, 1)
    driver.region_write(4, table + 12, bytes(4))
    on_device(toy, driver, lambda: toy.msix.fire(0))
    assert driver.region_read(4, pba, 1) == b"\x01"
    driver.set_irqs(Irq.MSIX, EVENTFD | TRIGGER, 0, 1, fds=[events[0].fd])
    assert events[0].wait() == 1
    # SET_IRQS masks as well.
    driver.set_irqs(Irq.MSIX, NONE | MASK, 1, 1)
    driver.region_write(4, table + 16 + 12, bytes(4))
    on_device(toy, driver, lambda: toy.msix.fire(1))
    assert events[1].quiet()
    driver.set_irqs(Irq.MSIX, NONE | UNMASK, 1, 1)
    assert events[1].wait() == 1
    for event in events:
        event.close()


def test_a_full_eventfd_does_not_block_the_device(driver: Client, toy: Toy) -> None:
    event = EventFd()
    os.set_blocking(event.fd, True)
    driver.set_irqs(Irq.ERR, EVENTFD | TRIGGER, fds=[event.fd])
    os.eventfd_write(event.fd, 2**64 - 2)
    driver.set_irqs(Irq.ERR, NONE | TRIGGER)
    assert driver.info().num_irqs == 5
    event.close()


def test_argsz(client: Client) -> None:
    request = {"argsz": 19, "flags": NONE | TRIGGER, "index": 0, "start": 0, "count": 1, "data": b""}
    with pytest.raises(OSError):
        client.request(Command.DEVICE_SET_IRQS, wire.IrqSet.build(request))
