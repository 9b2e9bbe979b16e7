"""The shim's ledger: what is mapped for devices, and what they do with it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.iommu.tables import ShimGuest
from vmodel import _shim
from vmodel._shim import LONG_NS, IncidentKind, Ledger, MappingUse, UseFlag
from vmodel.errors import DmaFault
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.span import PAGE, KiB

READ, WRITE, RW = 1, 2, 3
PAGES = 64


class Rig:
    """A requester behind a paging domain that a ledger follows; `ram` is the guest's memory."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, PAGES * PAGE)
        self.ram = mmap.mmap(self.fd, PAGES * PAGE)
        self.memory = _shim.Memory(_shim.Files(), 8)
        self.memory.map(0, PAGES * PAGE, RW, self.fd, 0)
        self.domain = _shim.Domain.paging(PAGE, 0, 2**48 - 1, 2**52 - 1, 100_000)
        self.ledger = Ledger()
        self.requester = self.another()

    def another(self) -> _shim.Requester:
        requester = _shim.Requester(self.memory)
        requester.enable(True)
        requester.attach(self.domain)
        self.ledger.follow(requester, 7, notified=False)
        return requester

    def live(self) -> list[MappingUse]:
        return list(self.ledger.live())

    def ended(self) -> list[MappingUse]:
        return [use for _, use in self.ledger.ended()]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    os.close(rig.fd)


def where(uses: list[MappingUse]) -> list[tuple[int, int, int, int]]:
    return [(use.start, use.size, use.gpa, use.prot) for use in uses]


def test_a_mapping_from_its_beginning_to_its_end(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, 2 * PAGE, RW)
    (use,) = rig.live()
    assert where([use]) == [(0x10000, 2 * PAGE, 0x2000, RW)]
    assert (use.id, use.who, use.pasid, use.flags) == (1, 7, None, UseFlag(0))
    assert use.mapped and not use.first_use and not use.ended

    rig.requester.write(0x10010, bytes(16))
    rig.requester.write(0x10020, bytes(16))
    rig.requester.read(0x10FF0, 32)
    rig.requester.read(0x10FF0, 8)
    (use,) = rig.live()
    assert (use.read, use.written, use.touched) == (40, 32, 64)
    assert use.mapped <= use.first_use <= use.last_use
    assert rig.ledger.spans(1, written=True) == [(0x10010, 0x1002F)]
    assert rig.ledger.spans(1, written=False) == [(0x10FF0, 0x1100F)]

    rig.domain.unmap(0x10000, 2 * PAGE)
    assert rig.live() == []
    (use,) = rig.ended()
    assert use.ended >= use.last_use and (use.read, use.written, use.touched) == (40, 32, 64)
    assert rig.ledger.spans(1, written=True) == [(0x10010, 0x1002F)]
    totals = rig.ledger.totals()
    assert (totals.mapped, totals.mapped_bytes, totals.ended, totals.live) == (1, 2 * PAGE, 1, 0)
    assert totals.uses[0][RW - 1][RW][1] == 1
    assert (totals.bytes[0][RW - 1][1], totals.touched[0][RW - 1][1]) == (2 * PAGE, 64)


def test_what_was_mapped_before_it_was_followed_is_there(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, PAGE, READ)
    rig.domain.map(0x11000, 0x3000, PAGE, READ)
    other = Ledger()
    other.follow(rig.requester, 1, notified=False)
    assert where(list(other.live())) == [(0x10000, PAGE, 0x2000, READ), (0x11000, PAGE, 0x3000, READ)]
    # The ledger that it followed before has lost its domain.
    assert [use.flags for use in rig.ended()] == [UseFlag.DETACHED] * 2
    Ledger.leave(rig.requester)
    assert list(other.live()) == []
    with pytest.raises(OSError, match="No such file"):
        Ledger.incident(rig.requester, IncidentKind.OFF, 0, READ)


def test_a_part_that_is_unmapped_ends_alone_with_its_own_bytes(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, 4 * PAGE, RW)
    rig.requester.write(0x10800, bytes(2 * PAGE))
    rig.domain.unmap(0x11000, PAGE)
    (gone,) = rig.ended()
    assert where([gone]) == [(0x11000, PAGE, 0x3000, RW)] and gone.touched == PAGE
    assert where(rig.live()) == [(0x10000, PAGE, 0x2000, RW), (0x12000, 2 * PAGE, 0x4000, RW)]
    assert [use.touched for use in rig.live()] == [0x800, 0x800]
    assert rig.ledger.totals().mapped == 3


def test_a_detached_domain_ends_its_mappings(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, PAGE, RW)
    rig.requester.attach(None)
    assert [use.flags for use in rig.ended()] == [UseFlag.DETACHED]
    assert rig.ledger.totals().detached == 1
    rig.requester.attach(rig.domain)
    assert where(rig.live()) == [(0x10000, PAGE, 0x2000, RW)]


def test_two_requesters_of_a_domain_share_its_mappings(rig: Rig) -> None:
    second = rig.another()
    rig.domain.map(0x10000, 0x2000, PAGE, RW)
    second.write(0x10000, b"x")
    rig.requester.read(0x10001, 1)
    (use,) = rig.live()
    assert (use.read, use.written, use.touched) == (1, 1, 2)
    rig.requester.attach(None)
    assert len(rig.live()) == 1
    rig.domain.unmap(0x10000, PAGE)
    assert len(rig.ended()) == 1 and rig.ledger.totals().ended == 1


def test_a_page_in_two_live_mappings_one_of_them_writable(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, 2 * PAGE, READ)
    rig.domain.map(0x20000, 0x3000, PAGE, READ)
    assert rig.ledger.totals().twins == 0
    rig.domain.map(0x30000, 0x3000, PAGE, WRITE)
    assert rig.ledger.totals().twins == 1
    first, second, third = rig.live()
    assert (first.flags, second.flags, third.flags) == (UseFlag(0), UseFlag.TWIN, UseFlag.TWIN)
    assert (second.twin, third.twin) == (0x30000, 0x20000)
    for iova in (0x30000, 0x20000, 0x10000):
        rig.domain.unmap(iova, PAGE if iova > 0x10000 else 2 * PAGE)
    rig.domain.map(0x30000, 0x3000, PAGE, WRITE)
    assert rig.ledger.totals().twins == 1


def test_kernel_pointers_in_bytes_that_were_not_touched(rig: Rig) -> None:
    for offset, word in (
        (0x00, 0xFFFF888001234560),  # Linux's direct map of memory on x86-64
        (0x08, 0xFFFFFFFF81000000),  # its text
        (0x10, 0xFFFFFFFFFFFFFFF4),  # -12
        (0x18, 0x00007F0000001000),  # a user's
        (0x40, 0xFFFF000012345678),  # arm64's direct map
    ):
        rig.ram[0x2000 + offset : 0x2008 + offset] = word.to_bytes(8, "little")
    rig.domain.map(0x10000, 0x2000, PAGE, RW)
    (use,) = rig.live()
    assert use.pointers == 3
    rig.requester.read(0x10000, 8)
    rig.domain.unmap(0x10000, PAGE)
    (use,) = rig.ended()
    assert use.exposed_pointers == 2
    assert (rig.ledger.totals().pointers, rig.ledger.totals().exposed_pointers) == (3, (2, 0))


def test_what_the_driver_left_mapped(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, PAGE, RW)
    rig.domain.map(0x20000, 0x3000, PAGE, RW)
    rig.ledger.released()
    rig.domain.map(0x30000, 0x4000, PAGE, RW)
    assert [bool(use.released) for use in rig.live()] == [True, True, False]
    rig.requester.write(0x20000, b"x")  # so it was kept for use
    assert [bool(use.released) for use in rig.live()] == [True, False, False]


def test_what_lives_for_a_second_is_counted_apart(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, PAGE, RW)
    rig.domain.map(0x20000, 0x3000, PAGE, READ)
    rig.domain.unmap(0x20000, PAGE)
    began = rig.live()[0].mapped
    while time.monotonic_ns() < began + LONG_NS:
        time.sleep(0.05)
    rig.domain.unmap(0x10000, PAGE)
    assert rig.ended()[-1].flags == UseFlag.LONG
    assert rig.ledger.totals().uses[1][RW - 1][0][0] == 1 and not any(rig.ledger.totals().uses[0][RW - 1][0])


def test_a_mapping_with_pages_that_were_not_touched_is_too_large(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, 16 * PAGE, RW)
    rig.requester.write(0x11FFF, b"xx")  # the last byte of a page, and the first one of the next
    rig.domain.map(0x40000, 0x2000, 2 * PAGE, READ)
    rig.requester.read(0x40FFF, 2)  # of each page something is used
    rig.domain.map(0x50000, 0x2000, 2 * PAGE, READ)  # not used at all
    rig.domain.clear(0, 2**48 - 1)
    assert [UseFlag.TOO_LARGE in use.flags for use in rig.ended()] == [True, False, False]
    totals = rig.ledger.totals()
    assert (totals.too_large, totals.too_large_bytes) == ((1, 0), (14 * PAGE, 0))


def test_an_invalidation_may_begin_and_end_anywhere() -> None:
    rig = Tables(notified=True)
    rig.set(4, 0x1000 | RW)
    rig.domain.flush(4 * PAGE + 5, 4 * PAGE + 5)
    assert rig.live() == [(4 * PAGE, PAGE, 0x1000, RW)]


def test_a_stale_use_shows_what_the_tables_say_by_now() -> None:
    rig = Tables(notified=False)
    rig.set(4, 0x1000 | RW)
    rig.requester.write(4 * PAGE, b"x")
    rig.set(4, 0)
    Ledger.incident(rig.requester, IncidentKind.STALE, 4 * PAGE, WRITE)
    ((_, item),) = rig.ledger.incidents()
    assert item.use is not None and item.use.ended and rig.live() == []


def test_incidents_name_the_mapping_that_they_met(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, PAGE, READ)
    with pytest.raises(DmaFault):
        rig.requester.write(0x10008, b"x")
    Ledger.incident(rig.requester, IncidentKind.DIRECTION, 0x10008, WRITE)
    rig.domain.unmap(0x10000, PAGE)
    Ledger.incident(rig.requester, IncidentKind.UNMAPPED, 0x10FFF, READ)
    Ledger.incident(rig.requester, IncidentKind.UNMAPPED, 0x11000, READ)
    items = [item for _, item in rig.ledger.incidents()]
    assert [(item.kind, item.iova, item.access) for item in items] == [
        (IncidentKind.DIRECTION, 0x10008, WRITE),
        (IncidentKind.UNMAPPED, 0x10FFF, READ),
        (IncidentKind.UNMAPPED, 0x11000, READ),
    ]
    live, ended, none = (item.use for item in items)
    assert live is not None and live.id == 1 and not live.ended
    assert ended is not None and ended.id == 1 and ended.ended
    assert none is None
    assert rig.ledger.totals().incidents[IncidentKind.UNMAPPED] == 2
    with pytest.raises(OSError, match="Invalid argument"):
        Ledger.incident(rig.requester, 5, 0, READ)  # type: ignore[arg-type]


def test_an_iova_that_is_mapped_again_at_once(rig: Rig) -> None:
    for _ in range(3):
        rig.domain.map(0x10000, 0x2000, PAGE, READ)
        rig.domain.unmap(0x10000, PAGE)
    totals = rig.ledger.totals()
    # A machine that stands still for 10 ms between them would count fewer: never more than two.
    assert totals.reused <= 2 and totals.flushes == 3


def test_more_spans_than_there_is_room_for_are_joined_and_the_mapping_says_so(rig: Rig) -> None:
    rig.domain.map(0x10000, 0x2000, 16 * PAGE, RW)
    for i in range(_shim.SET_SPANS):
        rig.requester.write(0x10000 + 64 * i, b"x")
    (use,) = rig.live()
    assert use.touched == _shim.SET_SPANS and UseFlag.INEXACT not in use.flags
    rig.requester.write(0x18000, b"x")
    (use,) = rig.live()
    assert UseFlag.INEXACT in use.flags and use.touched >= _shim.SET_SPANS + 1
    assert len(rig.ledger.spans(1, written=True)) == _shim.SET_SPANS
    assert use.written == _shim.SET_SPANS + 1


def test_the_last_ended_mappings_are_kept_and_the_totals_are_exact(rig: Rig) -> None:
    n = _shim.LEDGER_ENDED + 10
    for i in range(n):
        rig.domain.map(0x10000 + i * PAGE, 0x2000, PAGE, READ)
        rig.domain.unmap(0x10000 + i * PAGE, PAGE)
    assert [use.id for use in rig.ended()] == list(range(11, n + 1))
    assert [number for number, _ in rig.ledger.ended(n - 2)] == [n - 2, n - 1]
    assert rig.ledger.totals().ended == n and rig.ledger.totals().uses[0][READ - 1][0][0] == n


def test_more_live_mappings_than_there_is_room_for_are_counted(rig: Rig) -> None:
    for i in range(_shim.LEDGER_LIVE + 3):
        rig.domain.map(i * PAGE, 0x2000, PAGE, READ)
    totals = rig.ledger.totals()
    assert (totals.live, totals.mapped, totals.unrecorded) == (_shim.LEDGER_LIVE, _shim.LEDGER_LIVE, 3)
    assert rig.requester.read(_shim.LEDGER_LIVE * PAGE, 1) == b"\0"  # goes on, unrecorded
    rig.domain.clear(0, 2**48 - 1)
    assert rig.ledger.totals().live == 0


# ---- tables of a guest ---------------------------------------------------------------------

ROOT, MIDDLE, LOW, LEAVES = 0x10000, 0x11000, 0x12000, 0x13000
TABLE = Table(TableFormat.VTD_SECOND, 4, ROOT, 48, 46)


class Tables:
    """A requester behind VT-d's second-stage tables; entries of 4 KiB for IOVAs from 0 to 2 MiB are in LEAVES."""

    def __init__(self, *, notified: bool) -> None:
        self.guest = ShimGuest()
        for table, below in ((ROOT, MIDDLE), (MIDDLE, LOW), (LOW, LEAVES)):
            self.guest.put(table, below | RW)
        self.domain = self.guest.domain(TABLE)
        self.requester = _shim.Requester(self.guest.memory)
        self.requester.enable(True)
        self.ledger = Ledger()
        self.ledger.follow(self.requester, 0, notified=notified)
        self.requester.attach(self.domain)

    def set(self, page: int, *entries: int) -> None:
        self.guest.put(LEAVES + 8 * page, *entries)

    def live(self) -> list[tuple[int, int, int, int]]:
        return where(list(self.ledger.live()))

    def ended(self) -> list[tuple[int, int, int, int]]:
        return where([use for _, use in self.ledger.ended()])


def test_a_guest_that_invalidates_when_it_maps_is_followed_from_the_map_on() -> None:
    rig = Tables(notified=True)
    rig.set(4, 0x1000 | RW, 0x2000 | RW, 0x1000 | READ)
    assert rig.live() == []
    rig.domain.flush(0, 16 * PAGE - 1)  # a power of two, as guests have to round
    # Entries that lead to pages side by side, with one permission, are one mapping.
    assert rig.live() == [(4 * PAGE, 2 * PAGE, 0x1000, RW), (6 * PAGE, PAGE, 0x1000, READ)]
    rig.set(4, 0)
    rig.domain.flush(4 * PAGE, 5 * PAGE - 1)
    assert rig.ended() == [(4 * PAGE, PAGE, 0x1000, RW)]
    assert rig.live() == [(6 * PAGE, PAGE, 0x1000, READ), (5 * PAGE, PAGE, 0x2000, RW)]
    rig.set(5, 0x3000 | RW)
    rig.domain.flush(0, 2**64 - 1)
    assert rig.ended()[1:] == [(5 * PAGE, PAGE, 0x2000, RW)]
    assert rig.live()[1:] == [(5 * PAGE, PAGE, 0x3000, RW)]
    assert rig.ledger.totals().learnt == 0 and rig.ledger.totals().flushes == 3


def test_a_guest_that_does_not_is_learnt_from_accesses() -> None:
    rig = Tables(notified=False)
    rig.set(4, 0x1000 | RW, 0x2000 | RW)
    rig.domain.flush(0, 2**64 - 1)
    assert rig.live() == []
    rig.requester.write(4 * PAGE + 0xFFC, bytes(8))
    assert rig.live() == [(4 * PAGE, PAGE, 0x1000, RW), (5 * PAGE, PAGE, 0x2000, RW)]
    assert all(use.flags == UseFlag.LEARNT and use.written == 4 for use in rig.ledger.live())
    rig.set(4, 0x3000 | RW, 0)
    rig.requester.write(4 * PAGE, b"x")  # by the IOTLB: it is not the new mapping that is used
    rig.domain.flush(0, 2**64 - 1)
    assert rig.live() == [] and len(rig.ended()) == 2
    rig.requester.write(4 * PAGE, b"x")
    assert rig.live() == [(4 * PAGE, PAGE, 0x3000, RW)]
    assert rig.ledger.totals().learnt == 3


def test_tables_of_a_domain_are_read_when_it_is_attached() -> None:
    rig = Tables(notified=True)
    rig.requester.attach(None)
    rig.set(511, 0x1000 | RW)
    rig.requester.attach(rig.domain)
    assert rig.live() == [(511 * PAGE, PAGE, 0x1000, RW)]


def test_tables_that_lead_in_circles_are_walked_in_bounded_time() -> None:
    rig = Tables(notified=True)
    rig.guest.put(ROOT, *([ROOT | RW] * 512))
    rig.domain.flush(0, 2**64 - 1)
    totals = rig.ledger.totals()
    assert totals.unwalked == 1 and totals.live <= _shim.LEDGER_LIVE
    rig.guest.put(ROOT, *([0] * 512))
    rig.domain.flush(0, 2**64 - 1)
    rig.domain.flush(0, 2**64 - 1)
    assert rig.live() == []


@pytest.mark.parametrize("word", [0x1000 | RW | 1 << 62, 2**52 - PAGE | RW])
def test_entries_that_no_walk_takes_are_no_mappings(word: int) -> None:
    rig = Tables(notified=True)
    rig.set(0, word, 0x1000 | READ)
    rig.domain.flush(0, 2**64 - 1)
    assert rig.live() == [(PAGE, PAGE, 0x1000, READ)]


# ---- against a model -----------------------------------------------------------------------

IOVAS = 12


STEPS = st.tuples(st.sampled_from("mmuurwf"), st.integers(0, IOVAS - 1), st.integers(1, 4), st.integers(0, 4095))


@given(st.lists(STEPS, max_size=40))
def test_any_sequence_is_as_a_dictionary_of_pages_has_it(steps: list[tuple[str, int, int, int]]) -> None:
    rig = Rig()
    mapped: dict[int, tuple[int, int]] = {}  # IOVA page: GPA page, bytes of it that were touched, as a bitmap
    ended: list[tuple[int, int]] = []
    for what, page, n, offset in steps:
        iova, size = page * PAGE, n * PAGE
        try:
            if what == "m":
                rig.domain.map(iova, (page * 7 + n) % 32 * PAGE, size, RW)
                mapped |= {page + i: ((page * 7 + n) % 32 + i, 0) for i in range(n)}
            elif what == "u":
                rig.domain.clear(iova, iova + size - 1)
                ended += [mapped.pop(page + i) for i in range(n) if page + i in mapped]
            elif what == "f":
                rig.domain.flush(iova, iova + size - 1)
            else:
                move = rig.requester.read if what == "r" else lambda at, m: rig.requester.write(at, bytes(m))
                move(iova + offset, n)
                for at in range(iova + offset, iova + offset + n):
                    gpa, bits = mapped[at // PAGE]
                    mapped[at // PAGE] = gpa, bits | 1 << at % PAGE
        except (OSError, DmaFault):
            if what in "rw":  # what came before the fault is done
                for at in range(iova + offset, iova + offset + n):
                    if at // PAGE not in mapped:
                        break
                    gpa, bits = mapped[at // PAGE]
                    mapped[at // PAGE] = gpa, bits | 1 << at % PAGE
    uses = list(rig.ledger.live())
    now = {use.start // PAGE + i: use.gpa // PAGE + i for use in uses for i in range(use.size // PAGE)}
    assert now == {page: gpa for page, (gpa, _) in mapped.items()}
    assert sum(use.touched for use in uses) == sum(bits.bit_count() for _, bits in mapped.values())
    gone = [use for _, use in rig.ledger.ended()]
    assert sum(use.touched for use in gone) == sum(bits.bit_count() for _, bits in ended)
    assert sum(use.size for use in gone) == len(ended) * PAGE
    totals = rig.ledger.totals()
    assert totals.live == len(uses) and totals.mapped == totals.live + totals.ended
    assert totals.live_bytes == len(mapped) * PAGE
    assert totals.mapped_bytes == totals.live_bytes + len(ended) * PAGE
    Ledger.leave(rig.requester)
    assert rig.ledger.totals().live == rig.ledger.totals().live_bytes == 0
    os.close(rig.fd)


def test_sizes_of_classes(rig: Rig) -> None:
    for i, pages in enumerate((1, 2, 3, 4, 5)):
        rig.domain.map((i + 1) * 64 * KiB, 0, pages * PAGE, READ)
    rig.domain.clear(0, 2**48 - 1)
    assert rig.ledger.totals().uses[0][READ - 1][0][:5] == (1, 1, 2, 1, 0)
