"""Registers of capabilities as software sees them (PCIe 5.0, 7.5.2, 7.5.3, 7.7 to 7.9, 10.5).

Each test quotes its section in own words.
"""

from __future__ import annotations

import pytest

from tests.pci.card import D3HOT, MSI, MSIX, Bare, Card, Endpoint, Integrated, Rig
from tests.pci.conftest import Drive
from vmodel.device import PciDevice

PM, EXPRESS = 0x01, 0x10
AER, DSN, ACS, ATS, PRI, PASID = 0x0001, 0x0003, 0x000D, 0x000F, 0x0013, 0x001B
FLR = 1 << 15
ALL = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


@pytest.fixture
def endpoint(drive: Drive) -> Rig:
    return drive(Endpoint())


def ones(card: Rig, at: int, size: int) -> int:
    """What is left of a write of all ones."""
    card.config_write(at, size, ALL[size])
    return card.config_read(at, size)


def zeros(card: Rig, at: int, size: int) -> int:
    """And of a write of 0."""
    card.config_write(at, size, 0)
    return card.config_read(at, size)


# ---- power management ----------------------------------------------------------------------------------


def test_power_capabilities(endpoint: Rig) -> None:
    """7.5.2.1: read-only; version 011b; no PME from any state, so neither D1 nor D2 nor an auxiliary current."""
    at = endpoint.at(PM)
    assert endpoint.config_read(at + 2, 2) == ones(endpoint, at + 2, 2) == 3


@pytest.mark.parametrize(("model", "kept"), [(Endpoint, 0), (Card, 8)])
def test_power_control(drive: Drive, model: type[PciDevice], kept: int) -> None:
    """7.5.2.2: D0 by default; PowerState and PME_En are RW, No_Soft_Reset tells what the function does.

    7.5.2.3: without the Data register it, Data_Select and Data_Scale are hardwired to 0; so is PME_Status (no PME).
    """
    card = drive(model())
    at = card.at(PM)
    assert card.config_read(at + 4, 2) == kept
    card.config_write(at + 4, 4, 0xFFFF_FFFC)
    assert card.config_read(at + 4, 4) == 0x100 | kept
    assert zeros(card, at + 4, 2) == kept


@pytest.mark.parametrize("model", [Endpoint, Card])
def test_states_that_are_not_there(drive: Drive, model: type[PciDevice]) -> None:
    """7.5.2.2: a write of a state that is not supported completes, and the state stays; so in D3hot, too."""
    card = drive(model())
    at = card.at(PM) + 4
    for now in (0, D3HOT):
        card.config_write(at, 1, now)
        for state in (1, 2):
            card.config_write(at, 1, state)
            assert card.config_read(at, 1) & 3 == now


def test_config_space_in_d3hot(endpoint: Rig) -> None:
    """5.3.1.4: configuration requests are served in D3hot; without No_Soft_Reset the registers are lost on leaving."""
    endpoint.command(7)
    endpoint.config_write(0x10, 4, 0xFEB0_0000)
    endpoint.power(D3HOT)
    assert endpoint.config_read(0, 4) == 0x0F11_1B36
    endpoint.config_write(0x3C, 1, 9)
    assert endpoint.config_read(0x3C, 1) == 9
    endpoint.power(0)
    assert endpoint.config_read(0x3C, 1) == 0
    assert endpoint.config_read(0x10, 4) == 0
    assert endpoint.config_read(4, 2) == 0


# ---- PCI Express ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "kind"), [(Endpoint, 0), (Integrated, 9)])
def test_express_capabilities(drive: Drive, model: type[PciDevice], kind: int) -> None:
    """7.5.3.2: version 2h; 0000b is an endpoint, 1001b one of the root complex; read-only."""
    card = drive(model())
    assert ones(card, card.at(EXPRESS) + 2, 2) == kind << 4 | 2


def test_device_capabilities(drive: Drive, endpoint: Rig) -> None:
    """7.5.3.3: read-only; 128 bytes of payload, tags of 5 bits, no phantom functions; FLR as the function has it.

    Role-Based Error Reporting must be set.
    """
    assert ones(endpoint, endpoint.at(EXPRESS) + 4, 4) == 1 << 28 | 1 << 15
    bare = drive(Bare())
    assert ones(bare, bare.at(EXPRESS) + 4, 4) == 1 << 15


def test_device_control(endpoint: Rig) -> None:
    """7.5.3.4: Relaxed Ordering and No Snoop are set by default, and reads of 512 bytes (010b).

    Where only 128 bytes of payload, tags of 5 bits, no phantom functions and no auxiliary power are supported, those
    fields are hardwired to 0.  The error enables are RW.
    """
    at = endpoint.at(EXPRESS) + 8
    assert endpoint.config_read(at, 2) == 0x2810
    endpoint.config_write(at, 2, 0xFFFF & ~FLR)
    assert endpoint.config_read(at, 2) == 0x781F
    assert zeros(endpoint, at, 2) == 0


def test_initiate_flr(drive: Drive, endpoint: Rig) -> None:
    """7.5.3.4: it always reads as 0; without the capability nothing happens.  6.6.2: the function is reset."""
    bare = drive(Bare())
    for card, line in ((endpoint, 0), (bare, 9)):
        card.config_write(0x3C, 1, 9)
        card.config_write(card.at(EXPRESS) + 8, 2, 0x2810 | FLR)
        assert card.config_read(0x3C, 1) == line
        assert card.config_read(card.at(EXPRESS) + 8, 2) == 0x2810


def test_what_an_flr_leaves(endpoint: Rig) -> None:
    """6.6.2: ASPM Control, RCB, Common Clock and Extended Synch, Max_Payload_Size, and what is sticky, stay.

    Other resets bring the first of these to their defaults.
    """
    at = endpoint.at(EXPRESS)
    endpoint.config_write(at + 0x10, 2, 0x4A)
    endpoint.config_write(at + 0x28, 2, 0x10)
    endpoint.config_write(endpoint.extended(AER) + 8, 4, 1 << 20)
    endpoint.config_write(at + 8, 2, FLR)
    assert endpoint.config_read(at + 8, 2) == 0x2810
    assert endpoint.config_read(at + 0x10, 2) == 0x4A
    assert endpoint.config_read(at + 0x28, 2) == 0
    assert endpoint.config_read(endpoint.extended(AER) + 8, 4) == 1 << 20
    endpoint.reset()
    assert endpoint.config_read(at + 0x10, 2) == 0


def test_device_status(endpoint: Rig) -> None:
    """7.5.3.5: the four kinds of errors are RW1C, all else is read-only."""
    at = endpoint.at(EXPRESS) + 10
    assert endpoint.config_read(at, 2) == 0
    endpoint.device.backend.detected(0b1111)
    assert zeros(endpoint, at, 2) == 0b1111
    endpoint.config_write(at, 2, 0b0100)
    assert endpoint.config_read(at, 2) == 0b1011
    assert ones(endpoint, at, 2) == 0


def test_the_link(endpoint: Rig) -> None:
    """7.5.3.6: read-only, and ASPM Optionality Compliance must be set.  7.5.3.8: what was negotiated, read-only.

    7.5.3.7: of an endpoint, ASPM Control, RCB, Common Clock and Extended Synch are RW; Link Disable, Retrain and the
    bandwidth interrupts are reserved, Clock Power Management is hardwired to 0 where it is not supported.
    """
    at = endpoint.at(EXPRESS)
    assert ones(endpoint, at + 0x0C, 4) == 1 << 22 | 0x11
    assert endpoint.config_read(at + 0x10, 2) == 0
    assert ones(endpoint, at + 0x10, 2) == 0b1100_1011
    assert zeros(endpoint, at + 0x10, 2) == 0
    assert ones(endpoint, at + 0x12, 2) == 0x11


def test_no_slot_and_no_root(endpoint: Rig) -> None:
    """7.5.3: registers of slots and of root ports that a function does not have are hardwired to 0."""
    at = endpoint.at(EXPRESS)
    assert [ones(endpoint, at + n, 4) for n in (0x14, 0x18, 0x1C, 0x20, 0x34, 0x38)] == [0] * 6


@pytest.mark.parametrize(("model", "prefix"), [(Endpoint, 1), (Bare, 0)])
def test_second_device_registers(drive: Drive, model: type[PciDevice], prefix: int) -> None:
    """7.5.3.15: endpoints that issue requests must have Completion Timeout Disable; those with TLP prefixes 3-bit Fmt.

    7.5.3.16: the bits of what is not offered (timeout ranges, ARI, IDO, LTR, 10-bit tags, OBFF, prefix blocking) are
    hardwired to 0; Timeout Disable and, where the function may issue AtomicOps, their Enable are RW.
    """
    card = drive(model())
    at = card.at(EXPRESS)
    assert ones(card, at + 0x24, 4) == prefix << 21 | 1 << 20 | 1 << 4
    assert card.config_read(at + 0x28, 2) == 0
    assert ones(card, at + 0x28, 4) == 0x50


def test_second_link_registers(endpoint: Rig) -> None:
    """7.5.3.18: the speeds that there are, read-only.  7.5.3.19: Target Link Speed is RW and sticky.

    The other fields may be hardwired to 0 by those who only have 2.5 GT/s.
    """
    at = endpoint.at(EXPRESS)
    assert ones(endpoint, at + 0x2C, 4) == 2
    assert endpoint.config_read(at + 0x30, 2) == 1
    assert ones(endpoint, at + 0x30, 4) == 0xF
    endpoint.config_write(at + 8, 2, FLR)
    assert endpoint.config_read(at + 0x30, 2) == 0xF


def test_no_link(drive: Drive) -> None:
    """7.5.3: an endpoint of the root complex has no link: those registers are hardwired to 0, after resets, too."""
    card = drive(Integrated())
    at = card.at(EXPRESS)
    for _ in range(2):
        assert [card.config_read(at + n, 4) for n in (0x0C, 0x10, 0x2C, 0x30)] == [0] * 4
        assert [ones(card, at + n, 4) for n in (0x0C, 0x10, 0x2C, 0x30)] == [0] * 4
        card.config_write(at + 8, 2, FLR)


# ---- MSI and MSI-X -------------------------------------------------------------------------------------


def test_msi_registers(endpoint: Rig) -> None:
    """7.7.1.2: Enable and Multiple Message Enable are RW and 0 by default, what the function can do is read-only.

    7.7.1.3: the address's low two bits are reserved: they return 0.  7.7.1.5: 16 bits of data; the extended ones are
    reserved where they are not offered.  7.7.1.7: so are the mask bits of vectors that there are none of.
    """
    at = endpoint.at(MSI)
    assert endpoint.config_read(at + 2, 2) == 0x184
    assert ones(endpoint, at + 2, 2) == 0x1F5
    assert ones(endpoint, at + 4, 4) == 0xFFFF_FFFC
    assert ones(endpoint, at + 8, 4) == 0xFFFF_FFFF
    assert ones(endpoint, at + 12, 4) == 0x0000_FFFF
    assert endpoint.config_read(at + 16, 4) == 0
    assert ones(endpoint, at + 16, 4) == 0xF
    assert ones(endpoint, at + 20, 4) == 0


def test_msix_registers(drive: Drive) -> None:
    """7.7.2.2: Enable and Function Mask are RW and 0 by default, the size (0's based) is read-only.

    7.7.2.3, 7.7.2.4: the BAR and offset of table and pending bits are read-only, the offsets multiples of 8.
    """
    card = drive(Card())
    at = card.at(MSIX)
    assert card.config_read(at + 2, 2) == 15
    assert ones(card, at + 2, 2) == 0xC00F
    assert ones(card, at + 4, 4) == 4
    assert ones(card, at + 8, 4) == 0x1000 | 4


def test_the_msix_table(drive: Drive) -> None:
    """7.7.2.7 to 7.7.2.10: address and data are RW; Vector Control's Mask is set by default, all above it reserved.

    A reset (6.1.4) masks all vectors.
    """
    card = drive(Card())
    card.command(2)
    last = 15 * 16
    for _ in range(2):
        assert [card.read((4, last + n)) for n in (0, 4, 8, 12)] == [0, 0, 0, 1]
        for n in (0, 4, 8, 12):
            card.write((4, last + n), 0xFFFF_FFFC if n == 0 else 0xFFFF_FFFE)
        assert [card.read((4, last + n)) for n in (0, 4, 8, 12)] == [0xFFFF_FFFC, 0xFFFF_FFFE, 0xFFFF_FFFE, 0]
        card.config_write(card.at(EXPRESS) + 8, 2, FLR)
        card.command(2)


# ---- extended capabilities -----------------------------------------------------------------------------


def test_error_registers(endpoint: Rig) -> None:
    """7.8.4: status RW1CS, mask and severity RWS, with defaults, of the errors that are there; the log is read-only.

    Fatal are by default Data Link, Surprise Down, Flow Control, Overflow and Malformed; Advisory Non-Fatal is masked.
    """
    at, bits = endpoint.extended(AER), 0x001F_F030
    assert [endpoint.config_read(at + n, 4) for n in range(4, 0x2C, 4)] == [0, 0, 0x0006_2030, 0, 0x2000, 0, 0, 0, 0, 0]
    assert [ones(endpoint, at + n, 4) for n in range(4, 0x2C, 4)] == [0, bits, bits, 0, 0x31C1, 0, 0, 0, 0, 0]
    endpoint.config_write(endpoint.at(EXPRESS) + 8, 2, FLR)
    assert [endpoint.config_read(at + n, 4) for n in (8, 12, 20)] == [bits, bits, 0x31C1]


def report(card: Rig, **errors: object) -> None:
    card.do(lambda: card.device.aer.report(**errors))


def test_which_error_is_logged(endpoint: Rig) -> None:
    """6.2.4.2: the First Error Pointer is valid while the bit that it points at is set; the log stays until then.

    When that is cleared, the next error is logged, whatever other bits are still set.  7.8.4.7: both are sticky.
    """
    at = endpoint.extended(AER)
    report(endpoint, uncorrectable=1 << 20, header=(1, 2, 3, 4))
    report(endpoint, uncorrectable=1 << 15, header=(5, 6, 7, 8))
    assert (endpoint.config_read(at + 0x18, 1), endpoint.config_read(at + 0x1C, 4)) == (20, 1)
    endpoint.config_write(at + 4, 4, 1 << 20)
    report(endpoint, uncorrectable=1 << 14, header=(9, 10, 11, 12))
    assert endpoint.config_read(at + 4, 4) == 1 << 15 | 1 << 14
    endpoint.config_write(endpoint.at(EXPRESS) + 8, 2, FLR)
    assert endpoint.config_read(at + 0x18, 1) == 14
    assert [endpoint.config_read(at + n, 4) for n in range(0x1C, 0x2C, 4)] == [9, 10, 11, 12]


def test_masked_errors(endpoint: Rig) -> None:
    """7.8.4.3: a masked error is not logged in header or pointer; its status bit is set nevertheless (7.8.4.2)."""
    at = endpoint.extended(AER)
    endpoint.config_write(at + 8, 4, 1 << 20)
    report(endpoint, uncorrectable=1 << 20, header=(1, 2, 3, 4))
    assert [endpoint.config_read(at + n, 4) for n in (4, 0x18, 0x1C)] == [1 << 20, 0, 0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ({"correctable": 1 << 6}, 0b0001),
        ({"uncorrectable": 1 << 14}, 0b0010),
        ({"uncorrectable": 1 << 18}, 0b0100),
        ({"uncorrectable": 1 << 20}, 0b1010),
        ({"uncorrectable": 1 << 18 | 1 << 20, "correctable": 1}, 0b1111),
        ({"uncorrectable": 1, "correctable": 2}, 0),
    ],
)
def test_errors_are_in_the_device_status(endpoint: Rig, errors: dict[str, int], status: int, masked: bool) -> None:
    """7.5.3.5: errors are logged there whether or not their report is enabled and whatever masks say.

    Fatal or not is by their severity (7.8.4.4); an unsupported request has a bit of its own as well.
    """
    if masked:
        for n in (8, 0x14):
            endpoint.config_write(endpoint.extended(AER) + n, 4, 0xFFFF_FFFF)
    report(endpoint, **errors)
    assert endpoint.config_read(endpoint.at(EXPRESS) + 10, 2) == status


def test_severity(endpoint: Rig) -> None:
    """7.8.4.4: a set bit makes the error fatal, a clear one not."""
    endpoint.config_write(endpoint.extended(AER) + 12, 4, 1 << 14)
    report(endpoint, uncorrectable=1 << 14)
    assert endpoint.config_read(endpoint.at(EXPRESS) + 10, 2) == 0b0100
    report(endpoint, uncorrectable=1 << 18)
    assert endpoint.config_read(endpoint.at(EXPRESS) + 10, 2) == 0b0110


def test_serial_number(endpoint: Rig) -> None:
    """7.9.3: an EUI-64, lower half first, read-only."""
    at = endpoint.extended(DSN)
    assert (ones(endpoint, at + 4, 4), ones(endpoint, at + 8, 4)) == (0x89AB_CDEF, 0x0123_4567)


def test_access_control(endpoint: Rig) -> None:
    """7.7.8.2: Source Validation, Translation Blocking and Upstream Forwarding are ports': 0 in an endpoint.

    7.7.8.3: a control is RW where its capability is set, 0 by default, and hardwired to 0 elsewhere.
    """
    at = endpoint.extended(ACS)
    assert ones(endpoint, at + 4, 2) == 0b100_1100
    assert endpoint.config_read(at + 6, 2) == 0
    assert ones(endpoint, at + 6, 2) == 0b100_1100


def test_translation_services(endpoint: Rig) -> None:
    """10.5.1.2: a depth of 32 is 0 0000b; requests are page-aligned.  10.5.1.3: Enable and STU are RW, 0 by default."""
    at = endpoint.extended(ATS)
    assert ones(endpoint, at + 4, 2) == 1 << 5
    assert endpoint.config_read(at + 6, 2) == 0
    assert ones(endpoint, at + 6, 2) == 0x801F


def test_pasids(endpoint: Rig) -> None:
    """7.8.8.2: what there is, read-only.  7.8.8.3: Enable is RW, the others where supported; default 0."""
    at = endpoint.extended(PASID)
    assert ones(endpoint, at + 4, 2) == 16 << 8 | 1 << 1
    assert endpoint.config_read(at + 6, 2) == 0
    assert ones(endpoint, at + 6, 2) == 0b011


def test_page_requests(endpoint: Rig) -> None:
    """10.5.2.2: Enable is RW and 0 by default; Reset always returns 0.  10.5.2.3: Stopped is 1 by default.

    10.5.2.4: the capacity is read-only.  10.5.2.5: the allocation is RW and 0 by default.
    """
    at = endpoint.extended(PRI)
    assert endpoint.config_read(at + 4, 4) == 1 << 31 | 1 << 24
    assert ones(endpoint, at + 4, 2) == 1
    assert zeros(endpoint, at + 4, 2) == 0
    assert ones(endpoint, at + 6, 2) & ~(1 << 8) == 1 << 15
    assert ones(endpoint, at + 8, 4) == 64
    assert endpoint.config_read(at + 12, 4) == 0
    assert ones(endpoint, at + 12, 4) == 0xFFFF_FFFF
