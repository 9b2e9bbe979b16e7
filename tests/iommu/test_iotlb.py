"""Guest tables by way of a requester: what its IOTLB keeps, for how long, and which flags are set when."""

from __future__ import annotations

import errno

import pytest
from vmodel._vmshim import ffi

from tests.iommu.tables import RW, TO_PAGE, ShimGuest, bits, build, make
from tests.iommu.walker import Mapping, Mappings
from vmodel import _shim
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat
from vmodel.span import PAGE, Span

R, W, NONE = Access.READ, Access.WRITE, Access(0)
IOVA = 0x1234_5678_9000
FULL = TableFlag.SET_ACCESSED | TableFlag.SET_DIRTY | TableFlag.PAGES_2M | TableFlag.PAGES_1G
#: (format, dirty flag, level of the page)
KINDS = [(TableFormat.VTD_SECOND, 9, 1), (TableFormat.X86, 6, 1), (TableFormat.AMD_V1, 6, 1), (TableFormat.X86, 6, 2)]


class Device:
    """A requester behind tables of the guest's."""

    def __init__(self, table: Table, parent: Mappings | None = None) -> None:
        self.guest = ShimGuest()
        self.table = table
        self.domain = self.guest.domain(table, parent)
        self.requester = _shim.Requester(self.guest.memory)
        self.requester.enable(True)
        self.requester.attach(self.domain)

    def lookups(self) -> tuple[int, int]:
        """(hits, misses)"""
        stats = self.requester.stats()
        return stats[5], stats[6]


def fault(device: Device, iova: int, size: int = 1) -> DmaFault:
    with pytest.raises(DmaFault) as caught:
        device.requester.read(iova, size)
    return caught.value


@pytest.mark.parametrize(("format", "dirty", "level"), KINDS)
@pytest.mark.parametrize("first", [R, NONE], ids=["read", "nothing"])
def test_the_first_write_sets_the_dirty_flag(format: TableFormat, dirty: int, level: int, first: Access) -> None:
    """Whatever the IOTLB has learnt before."""
    device = Device(make(format, 4, FULL))
    page = 0 if level == 2 else 0x5000
    slot = build(device.guest, device.table, IOVA, page, level)[-1]
    for _ in range(3):
        device.requester.translate([IOVA], first)
    assert device.lookups() == (2, 1)
    assert not device.guest.get(slot) & bits(dirty)
    device.requester.write(IOVA, b"")  # nothing is written
    assert not device.guest.get(slot) & bits(dirty)
    device.requester.write(IOVA + 0xFF8, b"hello")
    assert device.guest.get(slot) & bits(dirty)
    assert device.lookups() == (2, 2)
    device.requester.write(IOVA + 0xFF8, b"hello")
    assert device.requester.read(IOVA + 0xFF8, 5) == b"hello"
    assert device.lookups() == (4, 2)


def test_an_atomic_reads_and_writes() -> None:
    device = Device(make(TableFormat.X86, 4))
    slot = build(device.guest, device.table, IOVA, 0x5000)[-1]
    device.guest.put(0x5008, 40)
    assert device.requester.atomic(IOVA + 8, 0, 8, 2, 0) == 40
    assert device.guest.get(0x5008) == 42
    assert device.guest.get(slot) & bits(5, 6) == bits(5, 6)


@pytest.mark.parametrize("level", [1, 2])
def test_entries_stay_until_they_are_flushed(level: int) -> None:
    device = Device(make(TableFormat.VTD_SECOND, 4))
    device.guest.put(0x10_0000, 1)
    device.guest.put(0x5000, 2)
    at = 0x10_0000 if level == 1 else 0
    slot = build(device.guest, device.table, IOVA & ~0x1F_FFFF, at, level)[-1]
    start = IOVA & ~0x1F_FFFF
    here = start + (0 if level == 1 else 0x10_0000)
    assert device.requester.read(here, 1) == b"\x01"
    device.guest.put(slot, TO_PAGE[TableFormat.VTD_SECOND](level) & ~bits(1) if level == 2 else 0x5003)
    assert device.requester.read(here, 1) == b"\x01"
    device.domain.flush(0, start - 1)  # beside it
    device.domain.flush(start + (1 << 12 + 9 * (level - 1)), 2**64 - 1)
    device.requester.write(here, b"\x03")
    device.domain.flush(start + 5, start + 5)
    if level == 1:
        assert device.requester.read(here, 1) == b"\x02"
    else:
        with pytest.raises(DmaFault) as caught:
            device.requester.write(here, b"\x04")
        assert (caught.value.reason, caught.value.level) == (Reason.PERMISSION, 2)
        assert device.requester.read(here, 1) == b"\x03"


def test_what_is_not_there_is_not_remembered() -> None:
    device = Device(make(TableFormat.AMD_V1, 4))
    assert fault(device, IOVA).reason == Reason.NOT_MAPPED
    build(device.guest, device.table, IOVA, 0x5000)
    assert device.requester.read(IOVA, 4) == bytes(4)


def test_faults_of_a_later_piece() -> None:
    """`gpa` is where the faulting address leads, not the one before it."""
    device = Device(make(TableFormat.VTD_SECOND, 4))
    build(device.guest, device.table, IOVA, 0x5000)
    seen = fault(device, IOVA + 0xFF0, 0x20)
    assert (seen.reason, seen.iova, seen.done, seen.level, seen.gpa) == (Reason.NOT_MAPPED, IOVA + PAGE, 16, 1, 0)
    build(device.guest, device.table, IOVA + PAGE, 0x4000_0000)
    seen = fault(device, IOVA + 0xFF0, 0x20)
    assert (seen.reason, seen.iova, seen.done, seen.level, seen.gpa) == (
        Reason.NO_WINDOW,
        IOVA + PAGE,
        16,
        0,
        0x4000_0000,
    )


def test_pasids_are_apart() -> None:
    """Many of them, with the same IOVAs: none gets another's page."""
    device = Device(make(TableFormat.X86, 4))
    domains = []
    for n in range(200):
        domain = _shim.Domain.paging(PAGE, 0, 2**48 - 1, 2**32, 9)
        domain.map(IOVA, (16 + n) * PAGE, PAGE, RW)
        device.requester.attach(domain, n)
        domains.append(domain)
        device.guest.put((16 + n) * PAGE, n)
    for _ in range(2):
        for n in range(200):
            assert device.requester.read(IOVA, 1, n) == bytes([n])
    domains[7].unmap(IOVA, PAGE)
    with pytest.raises(DmaFault) as caught:
        device.requester.read(IOVA, 1, 7)
    assert (caught.value.reason, caught.value.pasid) == (Reason.NOT_MAPPED, 7)
    assert device.requester.read(IOVA, 1, 8) == b"\x08"
    with pytest.raises(DmaFault) as caught:
        device.requester.read(IOVA, 1, 200)
    assert caught.value.reason == Reason.PASID


def test_a_nested_write_is_logged_by_the_parent() -> None:
    """The page, at the parent's IOVA, and the tables in which flags were set."""
    guest = ShimGuest()
    parent = _shim.Domain.paging(PAGE, 0, 2**48 - 1, 2**48, 9)
    parent.map(0, 0x1_0000, 16 * PAGE, RW)
    inner = make(TableFormat.X86, 4)
    for slot in build(guest, inner, IOVA, 0x5000):
        guest.put(slot + 0x1_0000, guest.get(slot))
    t = inner
    domain = _shim.Domain.table(guest.memory, t.format, t.levels, t.root, t.input_bits, t.output_bits, t.flags, parent)
    requester = _shim.Requester(guest.memory)
    requester.enable(True)
    requester.attach(domain)
    parent.dirty_start()
    guest.memory.dirty_start([])
    requester.read(IOVA, 8)
    assert parent.dirty_report(0, 16 * PAGE, PAGE, False)[0] == 0b0001_1110
    requester.write(IOVA + 4, b"x")
    assert parent.dirty_report(0, 16 * PAGE, PAGE, True)[0] == 0b0011_0000
    assert parent.dirty_report(0, 16 * PAGE, PAGE, False)[0] == 0b0011_0000
    assert guest.memory.dirty_report(0x1_0000, 16 * PAGE, PAGE)[0] == 0b0011_1110
    requester.write(IOVA + 4, b"y")
    assert parent.dirty_report(0, 16 * PAGE, PAGE, False)[0] == 0b0010_0000


def test_stage_2_faults_of_dma() -> None:
    some = Mappings(Span(0, 2**40), [Mapping(Span(0x1000, 0x4FFF), 0x1000, RW)])
    device = Device(make(TableFormat.X86, 4), some)
    build(device.guest, device.table, IOVA, 0x5000)
    seen = fault(device, IOVA + 8)
    assert (seen.reason, seen.stage, seen.level, seen.gpa, seen.iova) == (Reason.NOT_MAPPED, 2, 0, 0x5008, IOVA + 8)


def test_calls_that_cannot_be() -> None:
    device = Device(make(TableFormat.X86, 4))
    for access in (4, 7, 2**32 - 1):
        with pytest.raises(OSError) as caught:
            device.requester.translate([IOVA], access)
        assert caught.value.errno == errno.EINVAL
    for pasid in (-1, 2**32):
        with pytest.raises(OverflowError):
            device.requester.attach(device.domain, pasid)
        with pytest.raises(OverflowError):
            device.requester.read(0, 1, pasid)
    with pytest.raises(OverflowError):
        device.requester.read(2**64, 1)
    assert device.requester.translate([], R) == []
    assert device.requester.stats()[4] == 0


def test_things_live_as_long_as_they_are_used() -> None:
    """The order of destruction does not matter: the requester keeps the domain, that keeps its parent."""
    guest = ShimGuest()
    parent = _shim.Domain.paging(PAGE, 0, 2**48 - 1, 2**48, 9)
    parent.map(0, 0, 16 * PAGE, RW)
    t = make(TableFormat.X86, 4)
    build(guest, t, IOVA, 0x5000)
    domain = _shim.Domain.table(guest.memory, t.format, t.levels, t.root, t.input_bits, t.output_bits, t.flags, parent)
    requester = _shim.Requester(guest.memory)
    requester.enable(True)
    requester.attach(domain)
    requester.attach(domain, 4)
    handles = [domain.handle, parent.handle, guest.memory.handle]
    for handle in handles:
        ffi.release(handle)
    assert requester.read(IOVA, 4) == bytes(4)
    requester.attach(None)
    assert requester.read(IOVA, 4, 4) == bytes(4)
    ffi.release(requester.handle)


@pytest.mark.parametrize("pasid", [_shim.NO_PASID, 3])
def test_nothing_is_left_of_the_domain_before(pasid: int) -> None:
    """Over and over: the shim's own structures come back at the same addresses."""
    device = Device(make(TableFormat.X86, 4))
    domains = [_shim.Domain.paging(PAGE, 0, 2**48 - 1, 2**32, 9) for _ in range(3)]
    for n, domain in enumerate(domains):
        device.guest.put((16 + n) * PAGE, n)
        device.guest.put((32 + n) * PAGE, n)
        domain.map(IOVA, (16 + n) * PAGE, PAGE, RW)
        domain.map(IOVA + PAGE, (32 + n) * PAGE, 2 * PAGE, RW)
    for n in range(100):
        device.requester.attach(domains[n % 3], pasid)
        assert device.requester.read(IOVA, 1, pasid) == bytes([n % 3])
        assert device.requester.read(IOVA + PAGE, 1, pasid) == bytes([n % 3])
