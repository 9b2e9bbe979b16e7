"""What a controller says that it has, it has, and nothing else (NVMe 1.4, 5.15.2.2 against the rest)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.nvme.driver import PAGE, Driver, name, prps
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.identify import Controller
from vmodel.devices.nvme.regs import ControllerRegs

GET_LOG, SET, GET = 0x02, 0x09, 0x0A

#: Figure 139: optional admin commands, and the bit of OACS that is set where they are supported.
OACS = {
    0x81: 0, 0x82: 0, 0x80: 1, 0x10: 2, 0x11: 2, 0x0D: 3, 0x15: 3, 0x14: 4, 0x19: 5, 0x1A: 5, 0x1D: 6, 0x1E: 6, 0x1C: 7,
    0x7C: 8, 0x86: 9,
}  # fmt: skip
#: Figure 346: optional I/O commands, and the bit of ONCS.
ONCS = {0x05: 0, 0x04: 1, 0x09: 2, 0x08: 3, 0x0D: 5, 0x0E: 5, 0x11: 5, 0x15: 5, 0x0C: 7, 0x19: 8}


@pytest.mark.parametrize("shadow", [True, False])
def test_admin_commands(started: Callable[..., Driver], shadow: bool) -> None:
    """5.15.2.2, OACS: a bit is set if its commands are supported; else they are Invalid Command Opcode (4.6.1.2.1).

    5.14.1.5: the effects log says the same (CSUPP).  SANICAP other than 0: Sanitize is supported.
    """
    driver = started(shadow_doorbells=shadow)
    parsed = Controller.parse(driver.identify(1))
    effects = struct.unpack_from("<256I", driver.log(5, PAGE))
    for opcode, bit in OACS.items():
        offered = bool(parsed.oacs >> bit & 1)
        assert bool(effects[opcode] & 1) is offered, hex(opcode)
        known = name(driver.admin.send(opcode, dptr=prps(driver.page), nsid=0xFFFF_0000)) != "INVALID_OPCODE"
        assert known is offered, hex(opcode)
    assert parsed.oacs >> 10 == 0
    assert bool(parsed.oacs >> 8 & 1) is shadow
    assert bool(parsed.sanicap & 7) and effects[0x84] & 1
    mandatory = {0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0A, 0x0C, 0x18}
    expected = mandatory | {0x84} | {opcode for opcode, bit in OACS.items() if parsed.oacs >> bit & 1}
    assert {opcode for opcode, effect in enumerate(effects) if effect & 1} == expected
    assert all(effect & 1 for effect in effects if effect)


def test_io_commands(started: Callable[..., Driver]) -> None:
    """5.15.2.2, ONCS: likewise of I/O commands; reserved bits are 0.  5.14.1.5: the effects log agrees."""
    driver = started()
    parsed = Controller.parse(driver.identify(1))
    io = struct.unpack("<256I", part(driver, 5, 1024, 1024))
    pair = driver.create(1)
    for opcode, bit in ONCS.items():
        offered = bool(parsed.oncs >> bit & 1)
        assert bool(io[opcode] & 1) is offered, hex(opcode)
        known = name(pair.send(opcode, dptr=prps(driver.page), nsid=0xFFFF_0000)) != "INVALID_OPCODE"
        assert known is offered, hex(opcode)
    assert parsed.oncs >> 9 == 0
    expected = {0x00, 0x01, 0x02} | {opcode for opcode, bit in ONCS.items() if parsed.oncs >> bit & 1}
    assert {opcode for opcode, effect in enumerate(io) if effect & 1} == expected


def part(driver: Driver, page: int, offset: int, size: int) -> bytes:
    """A part of a log page."""
    return driver.ask(GET_LOG, size, nsid=0xFFFF_FFFF, cdw10=(size // 4 - 1) << 16 | page, cdw12=offset)


@pytest.mark.parametrize(
    ("page", "offered"),
    [
        pytest.param(0x05, lambda c: c.lpa >> 1 & 1, id="effects"),
        pytest.param(0x06, lambda c: c.oacs >> 4 & 1, id="self-test"),
        pytest.param(0x07, lambda c: c.lpa >> 3 & 1, id="telemetry, host"),
        pytest.param(0x08, lambda c: c.lpa >> 3 & 1, id="telemetry, controller"),
        pytest.param(0x09, lambda c: c.ctratt >> 4 & 1, id="endurance groups"),
        pytest.param(0x0A, lambda c: c.ctratt >> 5 & 1, id="predictable latency"),
        pytest.param(0x0C, lambda c: c.cmic >> 3 & 1, id="ANA"),
        pytest.param(0x0D, lambda c: c.lpa >> 4 & 1, id="persistent events"),
        pytest.param(0x0E, lambda c: c.oacs >> 9 & 1, id="LBA status"),
        pytest.param(0x80, lambda c: c.oncs >> 5 & 1, id="reservations"),
        pytest.param(0x81, lambda c: c.sanicap & 7, id="sanitize"),
    ],
)
def test_log_pages(driver: Driver, page: int, offered: Callable[[object], int]) -> None:
    """5.14.1: a page that goes with a capability is there if that is, else Invalid Log Page."""
    done = driver.admin.send(GET_LOG, nsid=0xFFFF_FFFF, cdw10=3 << 16 | page, dptr=prps(driver.page))
    wanted = "SUCCESS" if offered(Controller.parse(driver.identify(1))) else "INVALID_LOG_PAGE"
    assert name(done) == wanted


@pytest.mark.parametrize(
    ("feature", "offered"),
    [
        pytest.param(0x06, lambda c: c.vwc & 1, id="write cache"),
        pytest.param(0x0C, lambda c: c.apsta & 1, id="autonomous power states"),
        pytest.param(0x0D, lambda c: c.hmpre, id="host memory buffer"),
        pytest.param(0x0E, lambda c: c.oncs >> 6 & 1, id="timestamp"),
        pytest.param(0x0F, lambda c: c.kas, id="keep alive"),
        pytest.param(0x10, lambda c: c.hctma & 1, id="thermal management"),
        pytest.param(0x11, lambda c: c.ctratt >> 1 & 1, id="non-operational power state"),
        pytest.param(0x12, lambda c: c.ctratt >> 3 & 1, id="read recovery levels"),
        pytest.param(0x13, lambda c: c.ctratt >> 5 & 1, id="predictable latency"),
        pytest.param(0x15, lambda c: c.oacs >> 9 & 1, id="LBA status attributes"),
        pytest.param(0x18, lambda c: c.ctratt >> 4 & 1, id="endurance groups"),
        pytest.param(0x82, lambda c: c.oncs >> 5 & 1, id="reservation notifications"),
    ],
)
def test_features(driver: Driver, feature: int, offered: Callable[[object], int]) -> None:
    """5.21.1: a feature that goes with a capability is there if that is; else Invalid Field in Command."""
    done = driver.admin.send(GET, cdw10=feature, dptr=prps(driver.page))
    wanted = "SUCCESS" if offered(Controller.parse(driver.identify(1))) else "INVALID_FIELD"
    assert name(done) == wanted


def test_mandatory_features(driver: Driver) -> None:
    """5.21.1, figure 275: what each I/O controller has."""
    for feature in (0x01, 0x02, 0x04, 0x05, 0x07, 0x08, 0x09, 0x0A, 0x0B):
        assert driver.admin.send(GET, nsid=int(feature == 0x05), cdw10=feature).status == 0, hex(feature)


def test_saving(driver: Driver) -> None:
    """5.15.2.2, ONCS bit 4: Save and Select are supported; 5.13.2: bit 0 says if a value can be saved.

    5.21: one that can be is saved, another is Feature Identifier Not Saveable.
    """
    assert Controller.parse(driver.identify(1)).oncs >> 4 & 1
    for feature in (0x01, 0x02, 0x04, 0x06, 0x08, 0x0A, 0x0B, 0x0F, 0x17, 0x80):
        supported = driver.admin.send(GET, cdw10=3 << 8 | feature)
        value = driver.admin.send(GET, cdw10=feature).result
        done = driver.admin.send(SET, cdw10=1 << 31 | feature, cdw11=value)
        assert name(done) == ("SUCCESS" if supported.result & 1 else "FEATURE_NOT_SAVEABLE"), hex(feature)


def test_changing(driver: Driver) -> None:
    """5.13.2: bit 2 says that a value can be changed, bit 1 that it is a namespace's; bits above are reserved."""
    for feature in (0x01, 0x02, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0E, 0x0F, 0x17, 0x80, 0x81, 0x84):
        per_namespace = feature in (0x05, 0x84)
        done = driver.admin.send(GET, nsid=int(per_namespace), cdw10=3 << 8 | feature)
        assert done.status == 0 and done.result >> 1 == 0b10 | per_namespace, hex(feature)


def test_limits(driver: Driver) -> None:
    """5.15.2.2: AERL is 0's based; ELPE entries are in the error log; NPSS says which power states have a descriptor.

    FRMW bits 3:1: slots.  NWPC: states of write protection.  NN: largest namespace id.
    """
    parsed = Controller.parse(driver.identify(1))
    for _ in range(parsed.aerl + 1):
        driver.admin.write(NvmeCommand.make(0x0C))
    driver.admin.ring()
    assert not driver.admin.reap()
    assert name(driver.admin.send(0x0C)) == "EVENT_LIMIT_EXCEEDED"
    whole = 64 * (parsed.elpe + 1)
    done = driver.admin.send(GET_LOG, nsid=0xFFFF_FFFF, cdw10=1, cdw12=whole + 4, dptr=prps(driver.page))
    assert name(done) == "INVALID_FIELD"
    assert [bool(state.maximum_power) for state in parsed.power_states] == [n <= parsed.npss for n in range(32)]
    slots = parsed.frmw >> 1 & 7
    assert name(driver.admin.send(0x10, cdw10=3 << 3 | slots + 1)) == "INVALID_FIRMWARE_SLOT"
    for state in range(4):
        offered = parsed.nwpc & (1, 1, 2, 4)[state]
        done = driver.admin.send(SET, nsid=1, cdw10=0x84, cdw11=state)
        assert name(done) == ("SUCCESS" if offered else "INVALID_FIELD"), state
    for nsid, status in ((parsed.nn, "SUCCESS"), (parsed.nn + 1, "INVALID_NAMESPACE")):
        assert name(driver.admin.send(0x06, nsid=nsid, dptr=prps(driver.page))) == status


def test_names(driver: Driver) -> None:
    """5.15.2.2: strings are ASCII, left-justified, padded with blanks; the NQN is one by UUID and ends with 0 (7.9)."""
    data = driver.identify(1)
    for at, size in ((4, 20), (24, 40), (64, 8)):
        text = data[at : at + size]
        assert all(0x20 <= byte < 0x7F for byte in text) and text[0] != 0x20
    nqn, _, rest = data[768:1024].partition(b"\0")
    prefix, uuid = nqn[:32].decode(), nqn[32:].decode()
    assert prefix == "nqn.2014-08.org.nvmexpress:uuid:" and not any(rest)
    assert [len(part) for part in uuid.split("-")] == [8, 4, 4, 4, 12] and uuid == uuid.lower()


def test_identifiers(driver: Driver) -> None:
    """7.10.1: VID and SSVID are those of the PCI header.  7.10.3: the OUI's most significant byte comes last; in that,
    bit 1 says that no registration authority has assigned it (IEEE 802).  7.10.4, 7.10.5 with 5.15.2.1: EUI64 and
    NGUID are 0, as without an OUI there are none; 7.11: so there is a UUID."""
    config, data = driver.device.config.view, driver.identify(1)
    assert data[0:2] == bytes(config[0x00:0x02]) and data[2:4] == bytes(config[0x2C:0x2E])
    assert data[75] & 0b11 == 0b10
    assert not any(driver.identify(0, 1)[104:128])
    kind, length, _, _, *uuid = driver.identify(3, 1)[:20]
    assert (kind, length) == (3, 16) and any(uuid)


def test_reserved_registers(started: Callable[..., Driver]) -> None:
    """3.1: reserved registers are read-only and return 0; so are those of boot partitions (CAP.BPS), the controller
    memory buffer (CAP.CMBS) and the persistent memory region (CAP.PMRS) where there are none.
    """
    for params in ({}, {"doorbell_stride": 2}):
        driver = started(namespaces=[], **params)
        cap = driver.get(ControllerRegs.CAP)
        assert (cap >> 45 & 1, cap >> 56 & 3) == (0, 0)
        assert [n for n in range(19, 24) if cap >> n & 1] == [] and cap >> 58 == 0
        access = driver.device.backend
        for offset in (0x18, *range(0x38, 0x1000, 4)):
            access.region_write(0, offset, 4, 0xFFFF_FFFF)
            assert access.region_read(0, offset, 4) == 0, hex(offset)


def test_what_registers_keep(started: Callable[..., Driver]) -> None:
    """3.1.1, 3.1.2, 3.1.6: CAP, VS and CSTS are read-only, but for NSSRO.  3.1.8: AQA 31:28, 15:12 are reserved.

    3.1.9, 3.1.10: bits 11:0 of ASQ and ACQ are reserved.  3.1.5: so are bits 31:24 and 3:1 of CC.
    """
    driver = started(namespaces=[])
    driver.disable()
    for register, kept in (
        (ControllerRegs.CAP, driver.get(ControllerRegs.CAP)),
        (ControllerRegs.VS, 0x0001_0400),
        (ControllerRegs.CSTS, 0),
        (ControllerRegs.AQA, 0x0FFF_0FFF),
        (ControllerRegs.ASQ, (1 << 64) - 4096),
        (ControllerRegs.ACQ, (1 << 64) - 4096),
    ):
        driver.put(register, (1 << register.width) - 1)
        assert driver.get(register) == kept, register
    driver.put(ControllerRegs.CC, 0xFF00_000E)
    assert driver.get(ControllerRegs.CC) == 0


def test_nothing_is_taken_before_it_is_ready(driver: Driver) -> None:
    """7.6.1: commands are submitted once RDY is set; 3.1.25: doorbells of a controller that is disabled do nothing."""
    driver.disable()
    driver.set_up()
    driver.doorbell(0, 1)
    driver.run()
    driver.enable()
    assert not driver.admin.reap()
    assert driver.identify(1)[:2] == b"\x34\x12"


@pytest.mark.parametrize("interrupts", ["msix", "msi"])
@pytest.mark.parametrize("stride", [0, 6])
def test_the_function(started: Callable[..., Driver], interrupts: str, stride: int) -> None:
    """2.1: class 010802h; MLBAR is 64-bit memory that is not prefetchable, of at least 16 KiB.

    2.2 to 2.5: PCI power management, MSI or MSI-X, and PCI Express with FLR and Role-Based Error Reporting.
    """
    config = started(namespaces=[], interrupts=interrupts, doorbell_stride=stride).device.config
    assert bytes(config.view[9:12]) == b"\x02\x08\x01"
    config.write(0x10, b"\xff" * 8)
    bar = int.from_bytes(config.view[0x10:0x18], "little")
    assert bar & 15 == 0b0100 and not bar >> 4 & 0x3FF
    found, at = {}, config.view[0x34]
    while at:
        found[config.view[at]], at = at, config.view[at + 1]
    assert set(found) == {0x01, 0x10, 0x11 if interrupts == "msix" else 0x05}
    capabilities = int.from_bytes(config.view[found[0x10] + 4 : found[0x10] + 8], "little")
    assert capabilities >> 28 & 1 and capabilities >> 15 & 1
