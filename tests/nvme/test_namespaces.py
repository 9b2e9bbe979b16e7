"""Namespaces: in machine files, made and deleted by the guest, attached, formatted."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nvme.blocks import read, write
from tests.nvme.driver import PAGE, Driver, name, prps
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.regs import ControllerRegs

FORMAT, MANAGE, ATTACH, GET_LOG = 0x80, 0x0D, 0x15, 0x02
CREATE, DELETE, DETACH = 0, 1, 1
WRITE, READ = 0x01, 0x02
ALL = 0xFFFF_FFFF


def create(driver: Driver, blocks: int, capacity: int | None = None, form: int = 0, **more: int) -> tuple[str, int]:
    data = bytearray(PAGE)
    struct.pack_into("<QQ", data, 0, blocks, blocks if capacity is None else capacity)
    data[26] = form
    data[29], data[30] = more.get("dps", 0), more.get("nmic", 0)
    driver.memory.write(driver.page, bytes(data))
    done = driver.admin.send(MANAGE, cdw10=CREATE, cdw11=more.get("csi", 0) << 24, dptr=prps(driver.page))
    return name(done), done.result


def attach(driver: Driver, nsid: int, select: int = 0, controllers: tuple[int, ...] = (0,)) -> str:
    driver.memory.write(driver.page, struct.pack(f"<{1 + len(controllers)}H", len(controllers), *controllers))
    return name(driver.admin.send(ATTACH, nsid=nsid, cdw10=select, dptr=prps(driver.page)))


def delete(driver: Driver, nsid: int) -> str:
    return name(driver.admin.send(MANAGE, nsid=nsid, cdw10=DELETE))


def test_a_life(started: Callable[..., Driver]) -> None:
    driver = started(capacity="1M", namespaces=[{"memory": "64K"}])
    pair = driver.create(1)
    assert create(driver, 2048) == ("SUCCESS", 2)
    assert int.from_bytes(driver.identify(1)[296:312], "little") == 0
    assert name(pair.send(READ, nsid=2, dptr=prps(driver.page))) == "INVALID_FIELD", "it is not attached"
    assert attach(driver, 2) == "SUCCESS"
    assert write(driver, pair, 2, 2047, b"x" * 512) == "SUCCESS"
    assert read(driver, pair, 2, 2047, 512) == b"x" * 512
    driver.disable()
    driver.enable()
    pair = driver.create(1)
    assert read(driver, pair, 2, 2047, 512) == b"x" * 512
    assert attach(driver, 2, DETACH) == "SUCCESS"
    assert name(pair.send(READ, nsid=2, dptr=prps(driver.page))) == "INVALID_FIELD"
    assert delete(driver, 2) == "SUCCESS"
    assert int.from_bytes(driver.identify(1)[296:312], "little") == 1 << 20
    assert create(driver, 256, form=1) == ("SUCCESS", 2)
    assert attach(driver, 2) == "SUCCESS"
    assert read(driver, pair, 2, 0, 4096) == bytes(4096)


def test_names_of_namespaces(started: Callable[..., Driver]) -> None:
    """A machine file's namespace keeps its identifiers from run to run; one that a guest creates gets new ones."""
    first = started(serial="A", capacity="64K", namespaces=[{"memory": "64K"}])
    again = started(serial="A", capacity="64K", namespaces=[{"memory": "64K"}])
    assert first.identify(3, 1) == again.identify(3, 1)
    names = []
    for driver in (first, again):
        create(driver, 128)
        attach(driver, 2)
        names.append(driver.identify(3, 2))
    assert names[0] != names[1]


def test_what_cannot_be_created(started: Callable[..., Driver]) -> None:
    driver = started(capacity="64K", namespaces=[{"memory": "64K"}])
    assert create(driver, 129)[0] == "INSUFFICIENT_CAPACITY"
    assert create(driver, (1 << 64) - 1)[0] == "INSUFFICIENT_CAPACITY"
    assert create(driver, 17, form=1)[0] == "INSUFFICIENT_CAPACITY"
    assert create(driver, 0)[0] == "INVALID_FIELD"
    assert create(driver, 128, 64)[0] == "THIN_PROVISIONING_NOT_SUPPORTED"
    assert create(driver, 8, form=2)[0] == "INVALID_FORMAT"
    assert create(driver, 8, form=0x10)[0] == "INVALID_FIELD"
    assert create(driver, 8, dps=1)[0] == "INVALID_FIELD"
    assert create(driver, 8, nmic=1)[0] == "INVALID_FIELD"
    assert create(driver, 8, csi=2)[0] == "INVALID_FIELD"
    assert name(driver.admin.send(MANAGE, cdw10=2)) == "INVALID_FIELD"
    assert name(driver.admin.send(MANAGE, cdw10=CREATE, dptr=prps(1 << 40))) == "DATA_TRANSFER_ERROR"
    for _ in range(7):
        assert create(driver, 16)[0] == "SUCCESS"
    assert driver.device.inventory.unallocated == 64 * 1024 - 7 * 8192


@pytest.mark.parametrize(("blocks", "needed"), [(129, 129 * 512), ((1 << 64) - 1, (1 << 64) - 1)])
def test_how_much_is_missing(started: Callable[..., Driver], blocks: int, needed: int) -> None:
    """4.6.1.2.1, Namespace Insufficient Capacity: Command Specific Information of the error log says what it needs."""
    driver = started(capacity="64K", namespaces=[])
    assert create(driver, blocks)[0] == "INSUFFICIENT_CAPACITY"
    assert struct.unpack_from("<Q", driver.log(1, 64), 32) == (needed,)


def test_as_many_as_there_may_be(started: Callable[..., Driver]) -> None:
    driver = started(capacity="1M", namespaces=[{"memory": "64K"}])
    assert [create(driver, 8) for _ in range(31)] == [("SUCCESS", nsid) for nsid in range(2, 33)]
    assert create(driver, 8)[0] == "NAMESPACE_ID_UNAVAILABLE"
    assert delete(driver, 7) == "SUCCESS"
    assert create(driver, 8) == ("SUCCESS", 7)


def test_what_cannot_be_attached(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "64K"}])
    assert attach(driver, 1) == "NAMESPACE_ALREADY_ATTACHED"
    assert attach(driver, 2) == "INVALID_FIELD"
    assert attach(driver, 99) == attach(driver, ALL) == "INVALID_NAMESPACE"
    assert attach(driver, 1, 2) == "INVALID_FIELD"
    for controllers in ((), (1,), (0, 1)):
        assert attach(driver, 1, DETACH, controllers) == "CONTROLLER_LIST_INVALID"
    assert attach(driver, 1, DETACH) == "SUCCESS"
    assert attach(driver, 1, DETACH) == "NAMESPACE_NOT_ATTACHED"


def test_what_cannot_be_deleted(driver: Driver) -> None:
    assert delete(driver, 2) == "INVALID_FIELD"
    assert delete(driver, 33) == delete(driver, 0) == "INVALID_NAMESPACE"


def test_deleting_what_is_protected(started: Callable[..., Driver]) -> None:
    """8.19.1: Namespace Management is not among the commands that a namespace which is write protected takes."""
    driver = started(namespaces=[{"memory": "64K"}] * 2)
    assert driver.admin.send(0x09, nsid=2, cdw10=0x84, cdw11=1).status == 0
    assert delete(driver, 2) == delete(driver, ALL) == "NAMESPACE_WRITE_PROTECTED"
    assert driver.identify(0x10)[:12] == struct.pack("<3I", 1, 2, 0)
    assert delete(driver, 1) == "SUCCESS"
    assert driver.admin.send(0x09, nsid=2, cdw10=0x84, cdw11=0).status == 0
    assert delete(driver, 2) == "SUCCESS"


def test_deleting_all(started: Callable[..., Driver], tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    driver = started(namespaces=[{"memory": "64K"}, {"path": path, "size": "64K"}])
    pair = driver.create(1)
    assert write(driver, pair, 2, 0, b"kept" * 128) == "SUCCESS"
    assert delete(driver, ALL) == "SUCCESS"
    assert driver.identify(0x10) == bytes(PAGE)
    # Memory can be used again; the file is the host's and stays as it is.
    assert driver.device.inventory.unallocated == 64 * 1024
    assert path.read_bytes()[:512] == b"kept" * 128


def test_notices(started: Callable[..., Driver]) -> None:
    driver = started(capacity="64K", namespaces=[{"memory": "64K"}])
    assert driver.admin.send(0x09, cdw10=0x0B, cdw11=1 << 8).status == 0
    steps: list[tuple[Callable[[], Any], int]] = [
        (lambda: attach(driver, 2), 2),
        (lambda: attach(driver, 2, DETACH), 2),
        (lambda: driver.admin.send(FORMAT, nsid=1, cdw10=1), 1),
        (lambda: delete(driver, 1), 1),
    ]
    assert create(driver, 128) == ("SUCCESS", 2)
    for step, nsid in steps:
        step()
        driver.admin.write(NvmeCommand.make(0x0C))
        driver.admin.ring()
        (completion,) = driver.admin.wait()
        assert completion.result == 0x04_00_02
        assert struct.unpack_from("<2I", driver.log(4, 4096)) == (nsid, 0)


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("erase", [0, 1, 2])
def test_format(started: Callable[..., Driver], tmp_path: Path, where: str, erase: int) -> None:
    one = {"memory": "1M"} if where == "memory" else {"path": tmp_path / "disk.img", "size": "1M"}
    driver = started(namespaces=[one, {"memory": "64K"}])
    pair = driver.create(1)
    for slba in (0, 2047):
        assert write(driver, pair, 1, slba, b"x" * 512) == "SUCCESS"
    assert write(driver, pair, 2, 0, b"y" * 512) == "SUCCESS"
    assert name(driver.admin.send(FORMAT, nsid=1, cdw10=erase << 9 | 1)) == "SUCCESS"
    data = driver.identify(0, 1)
    assert (struct.unpack_from("<Q", data), data[26]) == ((256,), 1)
    assert read(driver, pair, 1, 0, 4096) == read(driver, pair, 1, 255, 4096) == bytes(4096)
    assert read(driver, pair, 2, 0, 512) == b"y" * 512
    assert name(driver.admin.send(FORMAT, nsid=ALL)) == "SUCCESS"
    assert read(driver, pair, 2, 0, 512) == bytes(512)


@pytest.mark.parametrize(
    ("nsid", "cdw10", "status"),
    [
        (1, 2, "INVALID_FORMAT"),
        (1, 1 << 4, "INVALID_FORMAT"),
        (1, 1 << 5, "INVALID_FORMAT"),
        (1, 3 << 9, "INVALID_FIELD"),
        (2, 0, "INVALID_FIELD"),
        (0, 0, "INVALID_NAMESPACE"),
    ],
)
def test_what_cannot_be_formatted(driver: Driver, nsid: int, cdw10: int, status: str) -> None:
    assert name(driver.admin.send(FORMAT, nsid=nsid, cdw10=cdw10)) == status


def test_formatting_what_is_protected(started: Callable[..., Driver], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"image" * 1024 + bytes(3072))
    driver = started(namespaces=[{"path": image, "read_only": True}, {"memory": "64K"}])
    pair = driver.create(1)
    assert read(driver, pair, 1, 0, 512)[:5] == b"image"
    assert driver.identify(0, 1)[99] == 1
    assert name(driver.admin.send(FORMAT, nsid=1)) == "NAMESPACE_WRITE_PROTECTED"
    assert name(driver.admin.send(FORMAT, nsid=ALL)) == "NAMESPACE_WRITE_PROTECTED"
    assert name(pair.send(WRITE, nsid=1, dptr=prps(driver.page))) == "NAMESPACE_WRITE_PROTECTED"
    assert name(driver.admin.send(FORMAT, nsid=2)) == "SUCCESS"
    assert image.read_bytes()[:5] == b"image"


def test_commands_while_a_namespace_is_formatted(driver: Driver) -> None:
    pair = driver.create(1)
    driver.admin.write(NvmeCommand.make(FORMAT, nsid=1, cdw10=1))
    driver.doorbell(0, driver.admin.tail)
    driver.device.backend.run_due(0)  # one turn: it has begun
    assert driver.device.inventory.attached(1).formatting
    read_it = NvmeCommand.make(READ, nsid=1, dptr=prps(driver.page))
    pair.write(read_it)
    driver.doorbell(1, pair.tail)
    driver.device.backend.run_due(0)
    (completion,) = pair.wait()
    assert name(completion) in ("FORMAT_IN_PROGRESS", "SUCCESS")
    (done,) = driver.admin.wait()
    assert done.status == 0
    assert name(pair.send(READ, nsid=1, dptr=prps(driver.page))) == "SUCCESS"


def test_format_goes_on_through_a_reset(driver: Driver) -> None:
    pair = driver.create(1)
    assert write(driver, pair, 1, 2047, b"x" * 512) == "SUCCESS"
    driver.admin.write(NvmeCommand.make(FORMAT, nsid=1))
    driver.doorbell(0, driver.admin.tail)
    driver.device.backend.run_due(0)
    assert driver.device.inventory.attached(1).formatting
    driver.put(ControllerRegs.CC, 0)
    driver.enable()
    pair = driver.create(1)
    assert not driver.device.inventory.attached(1).formatting
    assert read(driver, pair, 1, 2047, 512) == bytes(512)
    assert not driver.admin.reap(), "nobody waits for the command any more"
