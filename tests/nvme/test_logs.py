"""Log pages, and the asynchronous events that point at them."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.nvme.driver import PAGE, Driver, name, prps
from vmodel.device import ResetKind
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.regs import ControllerRegs

GET_LOG, SET, EVENT = 0x02, 0x09, 0x0C
NAMESPACE_NOTICES = 1 << 8


def test_smart_counts(driver: Driver) -> None:
    pair = driver.create(1)
    for _ in range(3):
        assert pair.send(0x01, nsid=1, dptr=prps(driver.page), cdw12=7).status == 0
    assert pair.send(0x02, nsid=1, dptr=prps(driver.page), cdw12=7).status == 0
    data = driver.log(2, 512)
    assert struct.unpack_from("<BHBB", data) == (0, 303, 100, 10)
    units_read, units_written, reads, writes = (int.from_bytes(data[at : at + 16], "little") for at in (32, 48, 64, 80))
    assert (units_read, units_written, reads, writes) == (1, 1, 1, 3)
    cycles, hours, unsafe, media, errors = (
        int.from_bytes(data[at : at + 16], "little") for at in (112, 128, 144, 160, 176)
    )
    assert (cycles, hours, unsafe, media, errors) == (1, 0, 0, 0, 0)
    assert struct.unpack_from("<H", data, 200) == (303,)


@pytest.mark.parametrize("opcode", [0x02, 0x05, 0x0C])
def test_what_is_read(started: Callable[..., Driver], opcode: int) -> None:
    """5.14.1.2: Data Units Read has the blocks of Compare, Read and Verify; Host Read Commands the first two."""
    driver = started(namespaces=[{"memory": "8M"}])
    pair = driver.create(1)
    pages = [driver.memory.take(PAGE) for _ in range(256)]
    lists = driver.memory.take(PAGE)
    driver.memory.write(lists, struct.pack("<255Q", *pages[1:]))
    assert pair.send(opcode, nsid=1, dptr=prps(pages[0], lists), cdw12=2047).status == 0
    data = driver.log(2, 512)
    assert int.from_bytes(data[32:48], "little") == 3  # 2048 units of 512 bytes
    assert int.from_bytes(data[64:80], "little") == (opcode != 0x0C)


def test_shutdowns_that_are_none(driver: Driver) -> None:
    driver.create(1)
    driver.device.reset(ResetKind.DEVICE)
    driver.device.config.write(4, b"\x06\x00")
    driver.enable()
    data = driver.log(2, 512)
    assert (data[112], data[144]) == (2, 1)
    driver.put(ControllerRegs.CC, driver.get(ControllerRegs.CC) | 1 << 14)
    driver.until(lambda: driver.status.SHST == 2)
    driver.device.reset(ResetKind.DEVICE)
    driver.device.config.write(4, b"\x06\x00")
    driver.enable()
    data = driver.log(2, 512)
    assert (data[112], data[144]) == (3, 1)


@pytest.mark.parametrize("page", [1, 2, 3, 4, 5, 6, 0x81])
def test_pages_of_a_namespace(driver: Driver, page: int) -> None:
    """5.14.1: of a page that is the controller's or the subsystem's, NSID is 0h or FFFFFFFFh, else Invalid Field.

    5.15.2.2, LPA bit 0: SMART is the controller's, too.
    """
    assert not driver.identify(1)[261] & 1
    for nsid, status in ((1, "INVALID_FIELD"), (99, "INVALID_FIELD"), (0, "SUCCESS"), (0xFFFF_FFFF, "SUCCESS")):
        done = driver.admin.send(GET_LOG, nsid=nsid, cdw10=127 << 16 | page, dptr=prps(driver.page))
        assert name(done) == status


def test_errors(driver: Driver) -> None:
    pair = driver.create(1)
    done = pair.send(0x02, nsid=1, cdw10=2048, dptr=prps(driver.page))
    assert name(done) == "LBA_OUT_OF_RANGE" and done.status & 1 << 13, "there is more in the log"
    driver.admin.send(0xC5)
    data = driver.log(1, 4096)
    count, sqid, cid, status, location, lba, nsid = struct.unpack_from("<QHHHHQI", data, 64)
    assert (count, sqid, cid, status >> 1, lba, nsid) == (1, 1, done.cid, done.status, 2048, 1)
    assert location == 40
    assert struct.unpack_from("<QHHHH", data)[:2] == (2, 0)
    assert data[128:] == bytes(4096 - 128)
    driver.disable()
    driver.enable()
    assert driver.log(1, 4096) == data, "resets keep it"
    for _ in range(70):
        driver.admin.send(0xC5)
    data = driver.log(1, 4096)
    assert [struct.unpack_from("<Q", data, 64 * n)[0] for n in (0, 63)] == [72, 9]
    assert int.from_bytes(driver.log(2, 512)[176:192], "little") == 72


def test_parts_of_a_page(driver: Driver) -> None:
    whole = driver.log(5, 4096)
    assert driver.ask(GET_LOG, 16, cdw10=3 << 16 | 5, cdw12=1024) == whole[1024:1040]
    assert driver.ask(GET_LOG, 16, cdw10=1023 << 16 | 5, cdw12=4092)[:4] == whole[4092:]
    done = driver.admin.send(GET_LOG, cdw10=5, cdw12=4096, dptr=prps(driver.page))
    assert name(done) == "SUCCESS"
    for fields in ({"cdw12": 4100}, {"cdw12": 2}, {"cdw13": 1}):
        done = driver.admin.send(GET_LOG, cdw10=5, dptr=prps(driver.page), **fields)
        assert name(done) == "INVALID_FIELD"


@pytest.mark.parametrize("page", [0x00, 0x07, 0x0D, 0x70, 0xC0, 0xFF])
def test_unknown_pages(driver: Driver, page: int) -> None:
    assert name(driver.admin.send(GET_LOG, cdw10=page, dptr=prps(driver.page))) == "INVALID_LOG_PAGE"


def test_more_than_there_is(driver: Driver) -> None:
    """What there is of the page is transferred; more than MDTS allows is Invalid Field (5.15.2.2, MDTS)."""
    driver.memory.write(driver.page, b"\xee" * PAGE)
    done = driver.admin.send(GET_LOG, cdw10=0xFFFF << 16 | 2, cdw11=0xFFFF, nsid=0, dptr=prps(driver.page))
    assert name(done) == "INVALID_FIELD"
    words = (2 << 20) // 4 - 1
    low, high = words & 0xFFFF, words >> 16
    done = driver.admin.send(GET_LOG, cdw10=low << 16 | 2, cdw11=high, nsid=0, dptr=prps(driver.page))
    assert done.status == 0
    data = driver.memory.read(driver.page, PAGE)
    assert data[512:] == b"\xee" * (PAGE - 512) and data[3] == 100


def test_command_effects(driver: Driver) -> None:
    data = driver.log(5, 4096)
    words = struct.unpack("<1024I", data)
    admin, io = words[:256], words[256:512]
    assert admin[0x06] == 1 and admin[0x0D] == 1 | 8 and admin[0x80] & 0x7000F == 0x10007 and admin[0xC5] == 0
    # 5.14.1.5: CCC (bit 4) is for commands that change capabilities of the controller.  None does: features are no
    # capabilities, and CAP is the same with each firmware.
    assert not any(word & 1 << 4 for word in words)
    assert io[0x01] == 3 and io[0x02] == 1 and io[0x7F] == 0
    assert [n for n in range(256) if io[n]] == [0, 1, 2, 4, 5, 8, 9, 0x0C, 0x19]
    assert driver.admin.send(GET_LOG, cdw10=5, cdw14=2 << 24).status & 0x7FF == 2


def test_changed_namespaces(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "64K"}] * 3)
    for nsid in (3, 1):
        driver.device.namespace_changed(nsid)
    assert struct.unpack_from("<3I", driver.log(4, 4096, retain=True)) == (1, 3, 0)
    assert struct.unpack_from("<3I", driver.log(4, 4096)) == (1, 3, 0)
    assert driver.log(4, 4096) == bytes(4096)


def test_a_page_that_cannot_be_delivered_is_kept(driver: Driver) -> None:
    driver.device.namespace_changed(1)
    done = driver.admin.send(GET_LOG, cdw10=1023 << 16 | 4, dptr=prps(1 << 40))
    assert name(done) == "DATA_TRANSFER_ERROR"
    assert driver.log(4, 4)[:1] == b"\1"


def request(driver: Driver) -> int:
    cid = driver.admin.write(NvmeCommand.make(EVENT))
    driver.admin.ring()
    return cid


def test_events_wait_for_requests(driver: Driver) -> None:
    assert driver.admin.send(SET, cdw10=0x0B, cdw11=NAMESPACE_NOTICES).status == 0
    driver.device.namespace_changed(1)
    cid = request(driver)
    (completion,) = driver.admin.wait()
    assert (completion.cid, completion.result) == (cid, 0x04_00_02)


def test_events_of_a_kind_wait_for_the_log_to_be_read(driver: Driver) -> None:
    assert driver.admin.send(SET, cdw10=0x0B, cdw11=NAMESPACE_NOTICES).status == 0
    request(driver), request(driver)
    driver.device.namespace_changed(1)
    assert len(driver.admin.wait()) == 1
    driver.device.namespace_changed(1)
    driver.log(4, 4, retain=True)
    driver.run()
    assert not driver.admin.reap()
    driver.log(4, 4)
    # What had happened before was in the page that was read.
    assert not driver.admin.reap()
    driver.device.namespace_changed(1)
    assert driver.admin.wait()[0].result == 0x04_00_02


def test_notices_that_nobody_wants(driver: Driver) -> None:
    request(driver)
    driver.device.namespace_changed(1)
    driver.run()
    assert not driver.admin.reap()


def test_a_warning(driver: Driver) -> None:
    request(driver)
    assert driver.admin.send(SET, cdw10=0x04, cdw11=300).status == 0
    assert not driver.admin.reap()
    cids = [driver.admin.write(NvmeCommand.make(SET, cdw10=0x0B, cdw11=2))]
    driver.admin.ring()
    first, second = driver.admin.wait(2)
    assert (first.result == 0x02_01_01 and second.cid == cids[0]) or second.result == 0x02_01_01


def test_too_many_requests(driver: Driver) -> None:
    for _ in range(4):
        request(driver)
    assert name(driver.admin.send(EVENT)) == "EVENT_LIMIT_EXCEEDED"
    assert driver.identify(1)[259] == 3


def test_resets_forget_requests(driver: Driver) -> None:
    request(driver)
    driver.disable()
    driver.enable()
    driver.doorbell(9, 1)  # an event
    driver.run()
    assert not driver.admin.reap()
    request(driver)
    assert driver.admin.wait()[0].result == 0x01_00_00
