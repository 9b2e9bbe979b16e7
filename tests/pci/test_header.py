"""The first 64 bytes of config space as software sees them (PCIe 5.0, 7.5.1.1, 7.5.1.2).

Each test quotes its section in own words.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.pci.card import Bare, Endpoint, Rig
from tests.pci.conftest import Drive
from vmodel.errors import Access, DmaFault, Reason

ALL = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


@pytest.fixture
def endpoint(drive: Drive) -> Rig:
    return drive(Endpoint())


@pytest.fixture
def bare(drive: Drive) -> Rig:
    return drive(Bare())


def ones(card: Rig, at: int, size: int) -> int:
    """What is left of a write of all ones."""
    card.config_write(at, size, ALL[size])
    return card.config_read(at, size)


@pytest.mark.parametrize(
    ("at", "size", "value"),
    [
        pytest.param(0x00, 2, 0x1B36, id="7.5.1.1.1 Vendor ID"),
        pytest.param(0x02, 2, 0x0F11, id="7.5.1.1.2 Device ID"),
        pytest.param(0x08, 1, 0x34, id="7.5.1.1.5 Revision ID"),
        pytest.param(0x09, 1, 0x12, id="7.5.1.1.6 Programming Interface"),
        pytest.param(0x0A, 1, 0x80, id="7.5.1.1.6 Sub-Class"),
        pytest.param(0x0B, 1, 0x05, id="7.5.1.1.6 Base Class"),
        pytest.param(0x0D, 1, 0, id="7.5.1.1.8 Latency Timer"),
        pytest.param(0x0E, 1, 0, id="7.5.1.1.9 Header Type"),
        pytest.param(0x0F, 1, 0, id="7.5.1.1.10 BIST"),
        pytest.param(0x28, 4, 0, id="7.5.1.2.2 Cardbus CIS Pointer"),
        pytest.param(0x2C, 2, 0x1AF4, id="7.5.1.2.3 Subsystem Vendor ID"),
        pytest.param(0x2E, 2, 0x1101, id="7.5.1.2.3 Subsystem ID"),
        pytest.param(0x38, 4, 0, id="7.5.1.1 reserved"),
        pytest.param(0x3D, 1, 2, id="7.5.1.1.13 Interrupt Pin"),
        pytest.param(0x3E, 2, 0, id="7.5.1.2.5 Min_Gnt, Max_Lat"),
    ],
)
def test_what_cannot_be_written(endpoint: Rig, at: int, size: int, value: int) -> None:
    """Identities are read-only; what was conventional PCI's is hardwired to 0; reserved bits return 0 (7.4)."""
    assert endpoint.config_read(at, size) == value
    assert ones(endpoint, at, size) == value
    endpoint.config_write(at, size, 0)
    assert endpoint.config_read(at, size) == value


def test_command(endpoint: Rig) -> None:
    """7.5.1.1.3: all bits are 0 by default; I/O, Memory, Bus Master, Parity, SERR# and Interrupt Disable are RW.

    Special Cycles, Memory Write and Invalidate, Palette Snoop, IDSEL Stepping and Fast Back-to-Back are hardwired to 0.
    """
    assert endpoint.config_read(4, 2) == 0
    assert ones(endpoint, 4, 2) == 0b101_0100_0111
    endpoint.config_write(5, 1, 0)
    assert endpoint.config_read(4, 2) == 0b0100_0111
    endpoint.config_write(4, 2, 0)
    assert endpoint.config_read(4, 2) == 0


def test_status(endpoint: Rig) -> None:
    """7.5.1.1.4: Capabilities List is hardwired to 1; 66 MHz, Fast Back-to-Back and DEVSEL to 0; the default is 0.

    Bits 8 and 11 to 15 are RW1C, all others read-only.
    """
    header = endpoint.device.config.header
    assert endpoint.config_read(6, 2) == 0x10
    header.STATUS |= 0xF900  # all errors that there are
    endpoint.config_write(6, 2, 0)
    assert endpoint.config_read(6, 2) == 0xF910
    endpoint.config_write(6, 2, 0x2000)
    assert endpoint.config_read(6, 2) == 0xD910
    endpoint.config_write(7, 1, 0x01)
    assert endpoint.config_read(6, 2) == 0xD810
    assert ones(endpoint, 6, 2) == 0x10


def test_a_command_leaves_the_status_beside_it(endpoint: Rig) -> None:
    """7.5.1.1.4: writing 0 to an RW1C bit has no effect; so a driver's 32-bit write of Command does no harm."""
    endpoint.device.config.header.STATUS |= 0x2000
    endpoint.config_write(4, 4, 7)
    assert endpoint.config_read(4, 4) == 0x2010_0007


def test_cache_line_size(endpoint: Rig) -> None:
    """7.5.1.1.7: read-write for compatibility, 0 by default."""
    assert endpoint.config_read(0x0C, 1) == 0
    endpoint.config_write(0x0C, 1, 0x5A)
    assert endpoint.config_read(0x0C, 4) == 0x5A


def test_functions_of_a_device(drive: Drive) -> None:
    """7.5.1.1.9: Multi-Function Device is set where there are several functions; the layout is that of Type 0."""
    assert drive(Bare("one", multifunction=True)).config_read(0x0E, 1) == 0x80


def test_interrupt_line(endpoint: Rig) -> None:
    """7.5.1.1.12: read-write where there is an interrupt pin; the function does not use it."""
    endpoint.config_write(0x3C, 1, 0x5A)
    assert endpoint.config_read(0x3C, 2) == 0x025A


def test_no_pin(bare: Rig) -> None:
    """7.5.1.1.13: 0 says that the function uses no INTx."""
    assert bare.config_read(0x3D, 1) == 0
    assert bare.device.backend.irq_info(0).count == 0


def test_the_list(endpoint: Rig) -> None:
    """7.5.1.1.11: the pointer is not 0, its low two bits are, and so in each capability; the list ends with 0.

    7.5.3.1: PCI Express, 10h, is somewhere in it.
    """
    found, at = [], ones(endpoint, 0x34, 1)
    while at:
        assert at % 4 == 0 and 0x40 <= at < 0x100
        head = endpoint.config_read(at, 2)
        endpoint.config_write(at, 2, 0xFFFF)
        assert endpoint.config_read(at, 2) == head
        assert head & 0xFF not in found
        found.append(head & 0xFF)
        at = head >> 8
    assert found == [0x01, 0x05, 0x10]


def test_extended_capabilities(endpoint: Rig, bare: Rig) -> None:
    """7.6.3: from 100h on, read-only id, version and next, whose low two bits are 0; the last one's is 0.

    Without any, there is a header of id, version and next 0.
    """
    found, at = {}, 0x100
    while at:
        assert at % 4 == 0
        head = endpoint.config_read(at, 4)
        assert ones(endpoint, at, 4) == head
        found[head & 0xFFFF] = head >> 16 & 15
        at = head >> 20
    assert found == {0x0001: 2, 0x0003: 1, 0x000D: 1, 0x000F: 1, 0x001B: 1, 0x0013: 1}
    assert ones(bare, 0x100, 4) == 0


# ---- what is mapped ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "sized"),
    [
        pytest.param(0x10, 0xFFFF_FF80, id="128 bytes of memory"),
        pytest.param(0x14, 0xFFFF_FFFD, id="4 ports"),
        pytest.param(0x18, 0x0000_000C, id="8 GiB, lower half"),
        pytest.param(0x1C, 0xFFFF_FFFE, id="8 GiB, upper half"),
        pytest.param(0x20, 0xFFFF_FF01, id="256 ports"),
        pytest.param(0x24, 0x0000_0000, id="none"),
    ],
)
def test_sizes(endpoint: Rig, at: int, sized: int) -> None:
    """7.5.1.2.1: low bits of the address return 0 after a write of all ones; what is not there is hardwired to 0.

    Memory: bit 0 is 0, bits 2:1 are 00b or, for 64 bits, 10b, bit 3 Prefetchable.  I/O: bit 0 is 1, bit 1 is 0.
    """
    bits = sized & (3 if sized & 1 else 15) if at != 0x1C else 0
    assert endpoint.config_read(at, 4) == bits
    assert ones(endpoint, at, 4) == sized
    endpoint.config_write(at, 4, 0)
    assert endpoint.config_read(at, 4) == bits


def test_any_address(endpoint: Rig) -> None:
    """7.5.1.2.1: all address bits above the size are RW, so each aligned address can be set; by bytes, too."""
    for bit in range(7, 32):
        endpoint.config_write(0x10, 4, 1 << bit)
        assert endpoint.config_read(0x10, 4) == 1 << bit
    endpoint.config_write(0x10, 4, 0)
    endpoint.config_write(0x12, 2, 0xFEB0)
    endpoint.config_write(0x11, 1, 0x12)
    assert endpoint.config_read(0x10, 4) == 0xFEB0_1200


def test_the_rom(endpoint: Rig, bare: Rig) -> None:
    """7.5.1.2.4: Enable is RW and 0 by default, bits 10:1 are 0, the address's low bits say how large it is: 16 KiB.

    A function without one hardwires all of it to 0.
    """
    assert endpoint.config_read(0x30, 4) == 0
    assert ones(endpoint, 0x30, 4) == 0xFFFF_C001
    endpoint.config_write(0x30, 4, 0xFFFF_F7FE)
    assert endpoint.config_read(0x30, 4) == 0xFFFF_C000
    assert ones(bare, 0x30, 4) == 0


def test_decoding(endpoint: Rig) -> None:
    """7.5.1.1.3: with Memory Space Enable clear a memory request is unsupported, with I/O Space Enable clear a port's.

    What is read then is all ones; nothing is written.
    """
    for command in range(4):
        endpoint.config_write(4, 2, command)
        assert endpoint.read((0, 0)) == (0 if command & 2 else ALL[4])
        assert endpoint.read((1, 0)) == (0 if command & 1 else ALL[4])


# ---- errors --------------------------------------------------------------------------------------------


def requests(card: Rig, call: Callable[[], object]) -> int:
    """Status after the device has made a request, or tried to; the errors in it are cleared."""

    def make() -> None:
        with suppress(DmaFault):
            call()

    card.do(make)
    status = card.config_read(6, 2)
    card.config_write(6, 2, ALL[2])
    assert card.config_read(6, 2) == 0x10
    return status & ~0x10


def test_requests_that_are_refused(endpoint: Rig) -> None:
    """7.5.1.1.4, Received Master Abort: a requester got a completion with Unsupported Request.

    A write has no completion, and with bus mastering off there is no request.
    """
    dma, nowhere = endpoint.device.dma, 1 << 40
    endpoint.command(6)
    for call in (
        lambda: dma.read(nowhere, 8),
        lambda: dma.readinto(nowhere, bytearray(8)),
        lambda: dma.gather([(0x1000, 8), (nowhere, 8)]),
        lambda: dma.fetch_add(nowhere, 8, 1),
        lambda: dma.view(nowhere, 8).__enter__(),
        lambda: dma.with_pasid(3).read(nowhere, 8),
    ):
        assert requests(endpoint, call) == 1 << 13
    for call in (
        lambda: dma.write(nowhere, bytes(8)),
        lambda: dma.scatter([(nowhere, 8)], bytes(8)),
        lambda: dma.read(0x1000, 8),
        lambda: dma.fetch_add(0x1001, 8, 1),
        lambda: dma.read((1 << 64) - 4, 8),
    ):
        assert requests(endpoint, call) == 0
    endpoint.command(2)
    assert requests(endpoint, lambda: dma.read(nowhere, 8)) == 0


@pytest.mark.parametrize(
    ("reason", "command", "status"),
    [
        (Reason.UNSUPPORTED_REQUEST, 0, 1 << 13),
        (Reason.COMPLETER_ABORT, 0, 1 << 12),
        (Reason.COMPLETION_TIMEOUT, 0, 0),
        (Reason.POISONED, 0, 1 << 15),
        (Reason.POISONED, 1 << 6, 1 << 15 | 1 << 8),
        (Reason.NOT_MAPPED, 0, 1 << 13),
    ],
)
def test_completions_with_errors(endpoint: Rig, reason: Reason, command: int, status: int) -> None:
    """7.5.1.1.4: Received Target Abort by Completer Abort, Detected Parity Error by a poisoned TLP.

    Master Data Parity Error besides, if Parity Error Response is set.
    """
    endpoint.command(command)
    dma = endpoint.device.dma
    assert requests(endpoint, lambda: dma.refused(reason, Access.WRITE)) == 0
    assert requests(endpoint, lambda: dma.refused(reason, Access.READ)) == status
