"""Identify: the structures against the offsets of the specification."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.nvme.driver import PAGE, Driver, name, prps
from vmodel.devices.nvme import Nvme
from vmodel.devices.nvme.identify import Controller, NamespaceData

#: Offsets of figure 247, written down once more by hand.
CONTROLLER = {
    "cntlid": (78, "<H"), "ver": (80, "<I"), "oaes": (92, "<I"), "cntrltype": (111, "<B"), "oacs": (256, "<H"),
    "acl": (258, "<B"), "aerl": (259, "<B"), "frmw": (260, "<B"), "lpa": (261, "<B"), "elpe": (262, "<B"),
    "wctemp": (266, "<H"), "cctemp": (268, "<H"), "edstt": (316, "<H"), "dsto": (318, "<B"), "fwug": (319, "<B"),
    "kas": (320, "<H"), "sanicap": (328, "<I"), "sqes": (512, "<B"), "cqes": (513, "<B"), "nn": (516, "<I"),
    "oncs": (520, "<H"), "fuses": (522, "<H"), "fna": (524, "<B"), "vwc": (525, "<B"), "nwpc": (531, "<B"),
    "acwu": (532, "<H"), "sgls": (536, "<I"), "mnan": (540, "<I"),
}  # fmt: skip


def test_controller(started: Callable[..., Driver]) -> None:
    driver = started(
        serial="VM0001",
        product="A disk",
        firmware="7.7",
        capacity="64K",
        max_transfer="128K",
        namespaces=[{"memory": "1M"}, {"memory": "2M", "lba": 4096}],
    )
    data = driver.identify(1)
    assert struct.unpack_from("<HH", data) == (0x1234, 0x1234)
    assert (data[4:24].rstrip(), data[24:64].rstrip(), data[64:72].rstrip()) == (b"VM0001", b"A disk", b"7.7")
    assert data[77] == 5
    parsed = Controller.parse(data)
    for field, (offset, form) in CONTROLLER.items():
        assert parsed[field] == struct.unpack_from(form, data, offset)[0], field
    assert (parsed.ver, parsed.sqes, parsed.cqes, parsed.nn, parsed.cntrltype) == (0x10400, 0x66, 0x44, 32, 1)
    assert int.from_bytes(data[280:296], "little") == (3 << 20) + (64 << 10)
    assert int.from_bytes(data[296:312], "little") == 64 << 10
    assert (parsed.oncs, parsed.oacs) == (0b1_1101_1111, 0b1_0011_1110)
    assert data[768:1024].rstrip(b"\0").startswith(b"nqn.2014-08.org.nvmexpress:uuid:")
    assert struct.unpack_from("<H", data, 2048) == (2500,)


def test_two_controllers_differ(started: Callable[..., Driver]) -> None:
    one, other = started(serial="A"), started(serial="B")
    assert one.identify(1)[768:1024] != other.identify(1)[768:1024]
    assert Nvme("x", {"serial": "A"}).uuid != Nvme("y", {"serial": "A"}).uuid


def test_namespaces(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "1M"}, {"memory": "2M", "lba": 4096}])
    for nsid, blocks, form in ((1, 2048, 0), (2, 512, 1)):
        data = driver.identify(0, nsid)
        assert struct.unpack_from("<QQQ", data) == (blocks, blocks, blocks)
        assert (data[25], data[26], data[33]) == (1, form, 9)
        assert struct.unpack_from("<II", data, 128) == (9 << 16, 12 << 16)
        assert int.from_bytes(data[48:64], "little") == nsid << 20
        parsed = NamespaceData.parse(data)
        assert (parsed.mssrl, parsed.mcl) == struct.unpack_from("<HI", data, 74)
        assert (parsed.npwg, parsed.npdg) == struct.unpack_from("<H2xH", data, 64)
    assert driver.identify(0, 3) == bytes(PAGE)
    common = driver.identify(0, 0xFFFF_FFFF)
    assert common[:24] == bytes(24) and common[25] == 1


def test_lists(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "64K"}] * 5)
    driver.device.inventory.attached(3).attached = False
    assert struct.unpack_from("<6I", driver.identify(2)) == (1, 2, 4, 5, 0, 0)
    assert struct.unpack_from("<3I", driver.identify(2, 2)) == (4, 5, 0)
    assert struct.unpack_from("<6I", driver.identify(0x10)) == (1, 2, 3, 4, 5, 0)
    assert driver.identify(7) == driver.identify(2)
    assert driver.identify(0, 3) == bytes(PAGE) != driver.identify(0x11, 3)
    assert struct.unpack_from("<HH", driver.identify(0x12, 1)) == (1, 0)
    assert driver.identify(0x12, 3) == bytes(PAGE)
    assert struct.unpack_from("<HH", driver.identify(0x13)) == (1, 0)
    done = driver.admin.send(0x06, cdw10=1 << 16 | 0x13, dptr=prps(driver.page))
    assert (done.status, driver.memory.read(driver.page, 2)) == (0, b"\0\0")


def test_descriptors(driver: Driver) -> None:
    data = driver.identify(3, 1)
    assert data[:4] == b"\x03\x10\0\0"
    assert data[4:20] == driver.device.inventory.attached(1).uuid.bytes
    assert data[20:] == bytes(PAGE - 20)


def test_those_of_the_command_set(driver: Driver) -> None:
    assert driver.identify(5, 1) == driver.identify(6) == bytes(PAGE)
    assert driver.identify(8, 1)[14] == 1


def test_one_controller_with_one_command_set(driver: Driver) -> None:
    """5.15.2, CNS 14h and 15h: a primary controller without resources to share, and no secondary ones; of technical
    proposal 4056, 1Ah to 1Ch: one combination of I/O command sets, that of NVM.
    """
    assert driver.identify(0x14) == driver.identify(0x15) == bytes(PAGE)  # the controller's own id is 0
    assert driver.identify(0x1A) == driver.identify(0x10)
    assert driver.identify(0x1B, 1) == bytes(PAGE)
    assert driver.identify(0xFFFF << 16 | 0x1C) == driver.identify(0x1C) == struct.pack("<Q", 1).ljust(PAGE, b"\0")


@pytest.mark.parametrize(
    ("cns", "nsid", "more", "status"),
    [
        (0xFF, 0, {}, "INVALID_FIELD"),
        (4, 0, {}, "INVALID_FIELD"),
        (0, 0, {}, "INVALID_NAMESPACE"),
        (0, 33, {}, "INVALID_NAMESPACE"),
        (0, 0xFFFF_FFFE, {}, "INVALID_NAMESPACE"),
        (2, 0xFFFF_FFFE, {}, "INVALID_NAMESPACE"),
        (2, 0xFFFF_FFFF, {}, "INVALID_NAMESPACE"),
        (3, 2, {}, "INVALID_FIELD"),
        (3, 0xFFFF_FFFF, {}, "INVALID_NAMESPACE"),
        (5, 1, {"cdw11": 2 << 24}, "INVALID_FIELD"),
        (6, 0, {"cdw11": 1 << 24}, "INVALID_FIELD"),
        (0x11, 0, {}, "INVALID_NAMESPACE"),
        (0x12, 0xFFFF_FFFF, {}, "INVALID_FIELD"),
        (0x1A, 0, {"cdw11": 2 << 24}, "INVALID_FIELD"),
        (0x1B, 2, {}, "INVALID_FIELD"),
        (0x01_001C, 0, {}, "INVALID_FIELD"),
    ],
)
def test_what_is_not_there(driver: Driver, cns: int, nsid: int, more: dict[str, int], status: str) -> None:
    assert name(driver.admin.send(0x06, nsid=nsid, cdw10=cns, dptr=prps(driver.page), **more)) == status


def test_data_pointers(driver: Driver) -> None:
    """A page that begins inside of one, and goes on in another."""
    first, second = driver.memory.take(PAGE), driver.memory.take(PAGE)
    whole = driver.identify(1)
    assert driver.admin.send(0x06, cdw10=1, dptr=prps(first + 1024, second)).status == 0
    assert driver.memory.read(first + 1024, 3072) + driver.memory.read(second, 1024) == whole
    assert name(driver.admin.send(0x06, cdw10=1, dptr=prps(first + 2, second))) == "PRP_OFFSET_INVALID"
    assert name(driver.admin.send(0x06, cdw10=1, dptr=prps(first + 4, second + 4))) == "PRP_OFFSET_INVALID"
    assert name(driver.admin.send(0x06, cdw10=1, dptr=prps(1 << 40))) == "DATA_TRANSFER_ERROR"
    assert not driver.status.CFS
