"""What may signal an interrupt, and when (PCIe 5.0, 6.1, 7.5.1.1, 7.7.1, 7.7.2, 5.3.1.4).

Each test quotes its section in own words.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.pci.card import D0, D3HOT, INTX_DISABLE, IO, MASTER, MEMORY, MSI, MSIX, Rig, SoftResetCard
from tests.pci.conftest import Drive
from vmodel.device import Msi, Msix, PciDevice
from vmodel.devices.edu import Edu, EduRegs
from vmodel.testing.fakes import FakeDriver, FakeMemory
from vmodel.vfio_user.client import EventFd
from vmodel.vfio_user.wire import Irq, IrqSetFlags

MSI_ENABLE, ALL_FOUR = 1, 2 << 4
MSIX_ENABLE, FUNCTION_MASK = 1 << 15, 1 << 14
ON = {MSI: MSI_ENABLE | ALL_FOUR, MSIX: MSIX_ENABLE}
COUNT = {MSI: 4, MSIX: 16}
MESSAGES = pytest.mark.parametrize("kind", [MSI, MSIX], ids=["MSI", "MSI-X"])


def enabled(card: Rig, kind: int, command: int = MEMORY | MASTER) -> list[EventFd]:
    card.command(command)
    card.control(kind, ON[kind])
    return card.open(card.KINDS[kind], COUNT[kind])


# ---- messages ------------------------------------------------------------------------------------------


@MESSAGES
def test_messages_need_bus_mastering(card: Rig, kind: int) -> None:
    """7.5.1.1.3: with Bus Master Enable clear a function sends no memory writes, so neither MSI nor MSI-X.

    6.1.4: what is pending stays so until it is sent.
    """
    events = enabled(card, kind, MEMORY)
    card.fire(kind, 1)
    assert events[1].quiet(0) and card.pending(kind, 1)
    card.command(MEMORY | MASTER)
    assert events[1].wait() == 1 and not card.pending(kind, 1)
    card.command(MEMORY)
    for _ in range(3):
        card.fire(kind, 1)
    assert events[1].quiet(0)
    card.command(MEMORY | MASTER)
    assert events[1].wait() == 1  # one bit, one message
    assert events[1].quiet(0)


@MESSAGES
def test_messages_need_d0(card: Rig, kind: int) -> None:
    """5.3.1.4: in D3hot a function sends no requests but PME.  7.5.2.2: No_Soft_Reset keeps its context till D0."""
    events = enabled(card, kind)
    card.power(D3HOT)
    card.fire(kind, 2)
    assert events[2].quiet(0)
    card.command(MEMORY)
    card.power(D0)
    card.settle()
    assert events[2].quiet(0)  # bus mastering is off meanwhile
    card.command(MEMORY | MASTER)
    assert events[2].wait() == 1


@MESSAGES
def test_a_reset_leaves_nothing_pending(drive: Drive, kind: int) -> None:
    """5.3.1.4, 7.5.2.2: without No_Soft_Reset the function is reset on its way to D0."""
    card = drive(SoftResetCard())
    events = enabled(card, kind)
    card.power(D3HOT)
    card.fire(kind, 2)
    card.power(D0)
    card.command(MEMORY | MASTER)
    card.control(kind, ON[kind])
    card.settle()
    assert events[2].quiet(0) and not card.pending(kind, 2)


@MESSAGES
def test_disabled(card: Rig, kind: int) -> None:
    """7.7.1.2, 7.7.2.2: with Enable clear the function must not use it; what was pending is sent once it may be."""
    events = enabled(card, kind, MEMORY)
    card.fire(kind)
    card.control(kind, 0)
    card.command(MEMORY | MASTER)
    card.fire(kind, 1)
    card.settle()
    assert all(event.quiet(0) for event in events)
    card.control(kind, ON[kind])
    assert events[0].wait() == 1
    assert events[1].quiet(0)  # no message was due when it was raised


def test_msi_and_msix_exclude_each_other(card: Rig) -> None:
    """7.7.1.2 and 7.7.2.2 each let a function use one only while the other is disabled."""
    messages, table = enabled(card, MSI), enabled(card, MSIX)
    card.fire(MSI)
    card.fire(MSIX)
    card.settle()
    assert messages[0].quiet(0) and table[0].quiet(0)
    card.control(MSI, 0)
    assert table[0].wait() == 1
    card.control(MSI, ON[MSI])
    card.control(MSIX, 0)
    assert messages[0].wait() == 1


@pytest.mark.parametrize("given", [0, 1, 2, 6, 7])
def test_vectors_that_software_has_not_given(card: Rig, given: int) -> None:
    """7.7.1.2: Multiple Message Enable says how many vectors there are, no more than were asked for (4).

    110b and 111b are reserved.  6.1.4: no others are used.
    """
    events = enabled(card, MSI)
    card.control(MSI, MSI_ENABLE | given << 4)
    count = min(1 << given, 4)
    assert card.device.msi.allocated == count
    for n in range(4):
        card.fire(MSI, n)
    card.settle()
    assert [event.quiet(0) for event in events] == [n >= count for n in range(4)]
    assert [card.pending(MSI, n) for n in range(4)] == [n >= count for n in range(4)]


def test_masked_msi_vectors(card: Rig) -> None:
    """7.7.1.7, 7.7.1.8: a masked vector's message is not sent but pending, and sent when it is unmasked."""
    events = enabled(card, MSI)
    mask = card.at(MSI) + 0x10
    card.config_write(mask, 4, 0b0101)
    for n in range(4):
        card.fire(MSI, n)
    card.settle()
    assert [event.quiet(0) for event in events] == [True, False, True, False]
    assert [card.pending(MSI, n) for n in range(4)] == [True, False, True, False]
    card.config_write(mask, 4, 0b0100)
    assert events[0].wait() == 1
    assert events[2].quiet(0) and card.pending(MSI, 2)
    card.config_write(card.at(MSI) + 0x14, 4, 0)
    assert card.pending(MSI, 2)  # read-only


def test_masked_msix_vectors(card: Rig) -> None:
    """7.7.2.2: Function Mask masks all.  6.1.4.2: else the vector's own bit counts; both leave it pending."""
    events = enabled(card, MSIX)
    card.write((4, 16 * 9 + 12), 1)
    card.write((4, 16 * 3 + 12), 0)
    card.control(MSIX, MSIX_ENABLE | FUNCTION_MASK)
    for n in (3, 9):
        card.fire(MSIX, n)
    card.settle()
    assert events[3].quiet(0) and events[9].quiet(0)
    assert card.pending(MSIX, 3) and card.pending(MSIX, 9)
    card.control(MSIX, MSIX_ENABLE)
    assert events[3].wait() == 1
    assert events[9].quiet(0) and card.pending(MSIX, 9)
    card.write((4, 16 * 9 + 12), 0)
    assert events[9].wait() == 1
    assert not card.pending(MSIX, 9)


@MESSAGES
def test_events_that_are_dealt_with(card: Rig, kind: int) -> None:
    """6.1.4.5: if what a pending vector is about has been dealt with, the bit must be cleared; a new event sets it."""
    events = enabled(card, kind, MEMORY)
    capability = card.device.msi if kind == MSI else card.device.msix
    card.fire(kind, 3)
    card.do(lambda: capability.withdraw(3))
    assert not card.pending(kind, 3)
    card.command(MEMORY | MASTER)
    card.settle()
    assert events[3].quiet(0)
    card.command(MEMORY)
    card.fire(kind, 3)
    assert card.pending(kind, 3)
    card.command(MEMORY | MASTER)
    assert events[3].wait() == 1


@MESSAGES
def test_pending_is_the_functions_not_the_clients(card: Rig, kind: int) -> None:
    """6.1.4: pending until sent.  VFIO clients take all eventfds away and set them again while a driver starts."""
    enabled(card, kind, MEMORY)
    card.fire(kind, 1)
    card.client.set_irqs(card.KINDS[kind], IrqSetFlags.DATA_NONE | IrqSetFlags.TRIGGER, 0, 0)
    assert card.pending(kind, 1)
    events = card.open(card.KINDS[kind], COUNT[kind])
    card.command(MEMORY | MASTER)
    assert events[1].wait() == 1


# ---- the pin ---------------------------------------------------------------------------------------------


@pytest.fixture
def pin(card: Rig) -> Iterator[EventFd]:
    (event,) = card.open(Irq.INTX, 1)
    card.command(MEMORY)
    yield event


def status(card: Rig) -> bool:
    return bool(card.config_read(6, 2) & 8)


def test_the_pin_needs_no_bus_mastering(card: Rig, pin: EventFd) -> None:
    """7.5.1.1.3: Bus Master Enable is about memory and I/O requests, and INTx is none."""
    card.do(card.device.intx.raise_)
    assert pin.wait() == 1


def test_interrupt_disable(card: Rig, pin: EventFd) -> None:
    """7.5.1.1.3: with Interrupt Disable set no INTx.  7.5.1.1.4: Interrupt Status says nevertheless what is pending."""
    card.command(MEMORY | INTX_DISABLE)
    card.do(card.device.intx.raise_)
    assert pin.quiet(0) and status(card)
    card.command(MEMORY)
    assert pin.wait() == 1
    card.command(MEMORY | INTX_DISABLE)
    card.unmask_intx()
    assert pin.quiet(0) and status(card)
    card.do(card.device.intx.lower)
    card.command(MEMORY)
    card.unmask_intx()
    assert pin.quiet(0) and not status(card)


@MESSAGES
def test_no_pin_beside_messages(card: Rig, pin: EventFd, kind: int) -> None:
    """7.7.1.2, 7.7.2.2: a function whose MSI or MSI-X is enabled must not use INTx."""
    card.control(kind, ON[kind])
    card.do(card.device.intx.raise_)
    assert pin.quiet(0)
    card.control(kind, 0)
    assert pin.wait() == 1


def test_no_pin_in_d3hot(card: Rig, pin: EventFd) -> None:
    """5.3.1.4: no messages but PME, so no Assert_INTx."""
    card.power(D3HOT)
    card.do(card.device.intx.raise_)
    assert pin.quiet(0)
    card.power(D0)
    assert pin.wait() == 1


# ---- models -----------------------------------------------------------------------------------------------


def test_a_driver_that_forgets_bus_mastering() -> None:
    """What pci_set_master() is for: edu's message comes when it is called, and not if it is acknowledged before."""
    with FakeMemory(1 << 16) as memory:
        edu = Edu("edu0")
        with FakeDriver(edu, memory) as driver:
            driver.config_write(4, 2, IO | MEMORY)
            driver.write(EduRegs.IRQ_RAISE, 1)
            assert driver.quiet()
            driver.config_write(4, 2, IO | MEMORY | MASTER)
            assert driver.interrupt() == 1
            driver.write(EduRegs.IRQ_ACK, 1)
            driver.config_write(4, 2, IO | MEMORY)
            driver.write(EduRegs.IRQ_RAISE, 2)
            driver.write(EduRegs.IRQ_ACK, 2)
            driver.config_write(4, 2, IO | MEMORY | MASTER)
            assert driver.quiet()
        edu.close()


@pytest.mark.parametrize("vector", [-1, 4, 1 << 40])
@pytest.mark.parametrize("part", [Msi(vectors=4), Msix(vectors=4)])
def test_a_vector_that_is_not_there(part: Msi | Msix, vector: int) -> None:
    """It is refused whether or not the guest has enabled messages; -1 is not the last one."""

    class Vectors(PciDevice):
        vendor_id, device_id, class_code = 0x1234, 0x0001, 0xFF0000
        messages = part

    device = Vectors("card0")
    with pytest.raises(ValueError, match=rf"^Msix? has no vector {vector}: it has 0 to 3$"):
        device.messages.fire(vector)
    device.defer(lambda: device.messages.fire(vector))
    device.backend.run_due(time.monotonic_ns())
    assert f"has no vector {vector}" in str(device.backend.model_errors[0])
    device.messages.fire(3)
    device.close()
