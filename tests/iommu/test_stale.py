"""Uses of stale translations: counted and reported where that is asked for, and only there."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.iommu.tables import RW, TO_PAGE, ShimGuest, bits, build, make
from vmodel import _shim
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.domain import PagingDomain
from vmodel.iommu.pgtable import TableFormat
from vmodel.machine import Machine, parse
from vmodel.server import Server
from vmodel.span import PAGE, MiB
from vmodel.status import described

R, W = Access.READ, Access.WRITE
IOVA = 0x1234_5678_9000


class Device:
    """A requester behind a VT-d table, with the switch on."""

    def __init__(self, on: bool = True) -> None:
        self.guest = ShimGuest()
        self.table = make(TableFormat.VTD_SECOND, 4)
        self.domain = self.guest.domain(self.table)
        self.requester = _shim.Requester(self.guest.memory)
        self.requester.enable(True)
        self.requester.attach(self.domain)
        self.requester.check_stale(on)

    @property
    def stale(self) -> int:
        return self.requester.stats()[7]


def test_another_page() -> None:
    device = Device()
    slot = build(device.guest, device.table, IOVA, 0x5000)[-1]
    device.requester.read(IOVA, 4)
    device.requester.read(IOVA, 4)
    assert device.stale == 0 and device.requester.stale() == []
    device.guest.put(slot, 0x6000 | 1)
    device.requester.read(IOVA + 8, 4)
    assert device.stale == 1
    (note,) = device.requester.stale()
    assert (note.iova, note.was, note.now, note.pasid) == (IOVA + 8, 0x5008, 0x6008, None)
    assert (note.access, note.was_prot, note.now_prot, note.reason) == (R, RW, R, 0)
    device.domain.flush(0, 2**64 - 1)
    device.requester.read(IOVA, 4)
    assert device.stale == 1 and device.requester.stale() == []


def test_gone_and_forbidden() -> None:
    device = Device()
    slot = build(device.guest, device.table, IOVA, 0x5000)[-1]
    device.requester.write(IOVA, b"x")
    device.guest.put(slot, 0x5000 | 1)
    device.requester.read(IOVA, 4)
    assert device.stale == 0  # reading is allowed as before
    device.requester.write(IOVA, b"y")
    device.guest.put(slot, 0)
    device.requester.read(IOVA, 4)
    wrote, read = device.requester.stale()
    assert (wrote.access, wrote.was, wrote.now, wrote.now_prot) == (W, 0x5000, 0x5000, R)
    assert (read.now, read.reason) == (0, Reason.NOT_MAPPED)


def test_a_large_page_is_compared_page_by_page() -> None:
    device = Device()
    start = IOVA & ~0x1F_FFFF
    slot = build(device.guest, device.table, start, 0, 2)[-1]
    device.requester.read(start, 4)
    # All of it is in the IOTLB; now it is made of small pages, of which two are there.
    device.guest.put(slot, 0x10_0003)
    device.guest.put(0x10_0000, 0x3, 0x1003)
    assert len(device.requester.read(start + 0xFF8, 3 * PAGE)) == 3 * PAGE
    assert [note.iova - start for note in device.requester.stale()] == [0x2000, 0x3000]
    device.guest.put(slot, TO_PAGE[TableFormat.VTD_SECOND](2))
    device.requester.read(start, 3 * PAGE)
    assert device.requester.stale() == [] and device.stale == 2


def test_looking_sets_no_flags() -> None:
    device = Device()
    device.table = make(TableFormat.X86, 4)
    device.domain = device.guest.domain(device.table)
    device.requester.attach(device.domain)
    slots = build(device.guest, device.table, IOVA, 0x5000)
    device.requester.write(IOVA, b"x")
    for slot in slots:
        device.guest.put(slot, device.guest.get(slot) & ~bits(5, 6))
    device.requester.write(IOVA, b"x")
    assert not any(device.guest.get(slot) & bits(5, 6) for slot in slots)
    assert device.stale == 0


def touches(device: Device) -> list[Callable[[], object]]:
    requester = device.requester
    return [
        lambda: requester.read(IOVA, 4),
        lambda: requester.readinto(IOVA, bytearray(4)),
        lambda: requester.write(IOVA, b"abcd"),
        lambda: requester.gather([(IOVA, 2), (IOVA + 8, 2)], bytearray(4), 0),
        lambda: requester.atomic(IOVA, 0, 4, 1, 0),
        lambda: requester.translate([IOVA], R),
        lambda: requester.pin(IOVA, 8, 0).close(),
    ]


@pytest.mark.parametrize("n", range(7))
def test_every_kind_of_access_tells(n: int) -> None:
    device = Device()
    told: list[_shim.StaleNote] = []
    device.requester.on_stale = told.extend
    slot = build(device.guest, device.table, IOVA, 0x5000)[-1]
    device.requester.write(IOVA, b"1234")
    device.requester.read(IOVA, 4)
    device.guest.put(slot, 0)
    touches(device)[n]()
    assert told and told[0].iova == IOVA and len(told) == device.stale == (2 if n == 3 else 1)
    assert device.requester.stale() == []


def test_what_fails_later_tells_as_well() -> None:
    device = Device()
    told: list[_shim.StaleNote] = []
    device.requester.on_stale = told.extend
    slot = build(device.guest, device.table, IOVA, 0x5000)[-1]
    device.requester.read(IOVA, 4)
    device.guest.put(slot, 0)
    with pytest.raises(DmaFault):
        device.requester.read(IOVA, 2 * PAGE)
    assert len(told) == 1


def test_off() -> None:
    device = Device(on=False)
    slot = build(device.guest, device.table, IOVA, 0x5000)[-1]
    device.requester.read(IOVA, 4)
    device.guest.put(slot, 0)
    device.requester.read(IOVA, 4)
    assert device.stale == 0 and device.requester.stale() == []
    device.requester.check_stale(True)
    device.requester.read(IOVA, 4)
    assert device.stale == 1
    device.requester.check_stale(True)  # as it was
    assert len(device.requester.stale()) == 1
    device.requester.check_stale(False)
    device.requester.read(IOVA, 4)
    assert device.stale == 1


def test_more_than_there_is_room_for() -> None:
    device = Device()
    slot = build(device.guest, device.table, IOVA, 0x5000)[-1]
    device.requester.read(IOVA, 4)
    device.guest.put(slot, 0)
    for n in range(100):
        device.requester.read(IOVA + n, 1)
    assert device.stale == 100
    assert [note.iova - IOVA for note in device.requester.stale()] == list(range(64))
    device.requester.read(IOVA, 1)
    assert len(device.requester.stale()) == 1


@pytest.mark.parametrize("pasid", [_shim.NO_PASID, 5])
def test_the_words_that_chose_a_domain(pasid: int) -> None:
    device = Device()
    plain = _shim.Domain.plain(_shim.DOMAIN_IDENTITY)
    device.requester.attach(plain, pasid)
    device.guest.put(0x8000, 1, 2)
    device.requester.chosen_by(device.guest.memory, [(0x8000, 1), (0x8008, 2)], pasid)
    device.requester.read(0x9000, 4, pasid)
    assert device.stale == 0
    device.guest.put(0x8008, 3)
    device.requester.read(0x9000, 4, pasid)
    (note,) = device.requester.stale()
    assert (note.kind, note.iova, note.word, note.was, note.now) == (_shim.STALE_ROUTE, 0x9000, 0x8008, 2, 3)
    assert note.pasid == (None if pasid == _shim.NO_PASID else 5)
    device.requester.chosen_by(device.guest.memory, [(0x4000_0000, 1)], pasid)
    device.requester.read(0x9000, 4, pasid)
    assert device.requester.stale()[0].reason == Reason.TABLE_ACCESS
    device.requester.attach(plain, pasid)  # words are the attachment's
    device.requester.read(0x9000, 4, pasid)
    assert device.stale == 2
    with pytest.raises(OSError) as caught:
        device.requester.chosen_by(device.guest.memory, [], 9)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(OSError) as caught:
        device.requester.chosen_by(device.guest.memory, [(0, 0)] * 25, pasid)
    assert caught.value.errno == errno.EINVAL


# ---- a machine ---------------------------------------------------------------------------------------

MACHINE = """
[machine]
name = "m"
[[iommu]]
name = "vtd0"
kind = "vt-d"
params = { report_stale = %s }
capabilities = { flush_ms = 100000.0 }
[[device]]
name = "edu0"
model = "edu"
address = "0000:00:03.0"
[[group]]
device = "edu0"
domain = "paging"
[[group.mapping]]
iova = 0x4000_0000
gpa = 0x10_0000
size = "1M"
"""


def made(report: bool) -> Machine:
    machine = parse(MACHINE % str(report).lower(), Path("m.toml"))
    device = machine.devices["edu0"]
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 16 * MiB)
    device.memory.map(0, 16 * MiB, fd=fd)
    os.close(fd)
    device.dma.bus_master = True
    return machine


@pytest.mark.parametrize("report", [True, False])
def test_dma_fq(report: bool, caplog: pytest.LogCaptureFixture) -> None:
    """An access to an unmapped, not yet flushed page gets through and is reported."""
    machine = made(report)
    dma, group = machine.devices["edu0"].dma, machine.system["edu0"].group
    assert group is not None and isinstance(group.domain, PagingDomain)
    domain = group.domain
    with caplog.at_level(logging.WARNING):
        dma.read(0x4000_1000, 4)
        domain.unmap(0x4000_0000, MiB)
        for _ in range(20):
            dma.read(0x4000_1000, 4)
    assert dma.stats.stale == (20 if report else 0)
    lines = [line for line in caplog.messages if "stale" in line]
    assert len(lines) == (10 if report else 0)
    if report:
        assert lines[0] == (
            "vtd0: edu0 [0x18]: READ at iova 0x40001000 is stale: cached is gpa 0x101000 (READ|WRITE), "
            "the tables say NOT_MAPPED"
        )
    assert described(machine)["devices"]["edu0"]["stale"] == dma.stats.stale
    domain.flush()
    with pytest.raises(DmaFault):
        dma.read(0x4000_1000, 4)
    machine.close()


def test_it_is_among_the_counters(tmp_path: Path) -> None:
    machine = made(True)
    server = Server()
    server.add(machine.devices["edu0"], tmp_path / "s")
    assert server.stats()["edu0"]["stale"] == 0
    server.stop()
    machine.close()
