"""Walks of tables in guest memory: each case by the shim and by the reference; the two compared on random tables."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.iommu.tables import (
    ALL_PAGES,
    HOLE,
    NO_FILE,
    RAM,
    READ_ONLY,
    RW,
    TO_PAGE,
    TO_TABLE,
    WRITE_ONLY,
    Guest,
    Parent,
    ReferenceGuest,
    ShimGuest,
    bits,
    build,
    index,
    make,
)
from tests.iommu.walker import Bits, Mapping, Mappings, Walked, walk
from vmodel import _shim
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat, page_bits
from vmodel.span import Span

#: All but RISC-V's, of which test_pgtable_riscv.py is.
FORMATS = VTD, X86, AMD, S1, S2 = tuple(TableFormat)[:5]
R, W, NONE = Access.READ, Access.WRITE, Access(0)
AD = TableFlag.SET_ACCESSED | TableFlag.SET_DIRTY
FULL = ALL_PAGES | AD

SHAPES = [
    *((VTD, levels) for levels in (3, 4, 5)),
    *((X86, levels) for levels in (4, 5)),
    *((AMD, levels) for levels in (1, 2, 3, 4, 5, 6)),
    *((format, levels) for format in (S1, S2) for levels in (1, 2, 3, 4)),
]
#: An IOVA with an index of its own at each level, none of them 0.
IOVA = 0x123_4567_89AB_CDEF & ~0xFFF | 0xABC


def some_iova(table: Table) -> int:
    width = table.input_bits - (table.format == X86)  # the positive half
    return IOVA & (1 << width) - 1


def leaf_levels(format: TableFormat, levels: int) -> range:
    most = levels if format == AMD else min(levels, 3)
    return range(1, most + 1)


LEAVES = [(format, levels, level) for format, levels in SHAPES for level in leaf_levels(format, levels)]


# ---- what all formats share ------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "levels", "level"), LEAVES)
def test_a_page_of_each_level(guest: Guest, format: TableFormat, levels: int, level: int) -> None:
    table = make(format, levels, output_bits=48)
    iova, size = some_iova(table), 1 << page_bits(level)
    page = 0x8765_4321_0000 // size * size
    build(guest, table, iova, page, level)
    before = guest.contents()
    start = iova // size * size
    for access in (NONE, R) if format == X86 else (NONE, R, W, RW):
        guest.put(0)
        expected = R if format == X86 and access else RW  # x86: writing has yet to set the dirty flag
        assert guest.walk(table, iova, access) == Walked(start, start + size - 1, page, expected, level)
    if format != X86:  # which sets flags in any case
        assert guest.contents() == before


@pytest.mark.parametrize(("format", "levels"), SHAPES)
def test_each_level_not_present(guest: Guest, format: TableFormat, levels: int) -> None:
    table = make(format, levels)
    iova = some_iova(table)
    for level in range(1, levels + 1):
        slots = build(guest, table, iova, 0x5000)
        guest.put(slots[levels - level], 0)
        assert guest.fault(table, iova) == (Reason.NOT_MAPPED, level, 0, 0)


@pytest.mark.parametrize(("format", "levels"), SHAPES)
@pytest.mark.parametrize("place", [HOLE, WRITE_ONLY, NO_FILE], ids=["hole", "write-only", "no file"])
def test_each_table_out_of_reach(guest: Guest, format: TableFormat, levels: int, place: int) -> None:
    whole = make(format, levels)
    iova = some_iova(whole)
    assert guest.fault(make(format, levels, root=place), iova) == (Reason.TABLE_ACCESS, levels, 0, 0)
    for level in range(2, levels + 1):
        slots = build(guest, whole, iova, 0x5000)
        guest.put(slots[levels - level], TO_TABLE[format](level - 1) | place)
        assert guest.fault(whole, iova) == (Reason.TABLE_ACCESS, level - 1, 0, 0)


@pytest.mark.parametrize(("format", "levels"), SHAPES)
def test_tables_that_point_to_themselves(guest: Guest, format: TableFormat, levels: int) -> None:
    """Each entry of the one table leads back to it: the walk goes down all the same."""
    table = make(format, levels)
    iova = some_iova(table)
    entry = TO_TABLE[format](1) | table.root
    guest.put(table.root, *[entry] * 512)
    if format == AMD:
        # Level 1 says where the next table is, and there is none below it; so does level 2 of itself.
        expected = Reason.RESERVED_BITS if levels <= 1 else None
        if expected:
            assert guest.fault(table, iova) == (expected, 1, 0, 0)
        else:
            assert guest.outcome(table, iova, R)[:2] in (  # type: ignore[index]
                (Reason.RESERVED_BITS, 1),
                (Reason.NOT_MAPPED, levels),  # it skips levels that have an index
            )
    elif format == X86:
        assert guest.walk(table, iova, R).gpa == table.root
    elif format == VTD:
        assert guest.walk(table, iova, RW).gpa == table.root
    elif format == S1:
        assert guest.fault(table, iova) == (Reason.ACCESS_FLAG, 1, 0, 0)
    else:
        assert guest.fault(table, iova) == (Reason.ACCESS_FLAG, 1, 0, 0)


def test_a_self_map_sets_flags_twice_in_one_entry(guest: Guest) -> None:
    """Windows' trick: the root is a page table of itself.  Accessed is set first, then dirty, and none is lost."""
    table = make(X86, 4)
    slot = table.root + 8 * 0x100
    guest.put(slot, table.root | bits(0, 1, 2))
    iova = 0xFFFF_8000_0000_0000 | 0x100 << 30 | 0x100 << 21 | 0x100 << 12
    assert guest.walk(table, iova, W).gpa == table.root
    assert guest.get(slot) == table.root | bits(0, 1, 2, 5, 6)


def test_a_loop_of_two_tables(guest: Guest) -> None:
    table = make(VTD, 5)
    guest.put(0x1000, *[0x2000 | bits(0, 1)] * 512)
    guest.put(0x2000, *[0x1000 | bits(0, 1)] * 512)
    assert guest.walk(table, IOVA & (1 << 57) - 1, RW).gpa == 0x2000


@pytest.mark.parametrize(("format", "levels"), SHAPES)
def test_beyond_the_input_width(guest: Guest, format: TableFormat, levels: int) -> None:
    table = make(format, levels)
    build(guest, table, 0, 0x5000)
    assert guest.walk(table, 0).gpa == 0x5000
    if table.input_bits == 64:
        assert guest.fault(table, 2**64 - 1) == (Reason.NOT_MAPPED, levels, 0, 0)
        return
    top = 1 << table.input_bits - (format == X86)
    assert guest.fault(table, top - 1) == (Reason.NOT_MAPPED, levels, 0, 0)
    assert guest.fault(table, top) == (Reason.INPUT_WIDTH, 0, 0, 0)
    assert guest.fault(table, 2**64 - 1, W)[0] == (Reason.NOT_MAPPED if format == X86 else Reason.INPUT_WIDTH)


@pytest.mark.parametrize("levels", [4, 5])
def test_x86_canonical_addresses(guest: Guest, levels: int) -> None:
    table = make(X86, levels)
    sign = 1 << 11 + 9 * levels
    for iova in (sign - 1, 2**64 - sign, 2**64 - 1):
        build(guest, table, iova, 0x7000)
        start = iova & ~0xFFF
        assert guest.walk(table, iova) == Walked(start, start + 0xFFF, 0x7000, R, 1)
    for iova in (sign, 2**63, 2**63 - 1, 2**64 - sign - 1):
        assert guest.fault(table, iova) == (Reason.INPUT_WIDTH, 0, 0, 0)


@pytest.mark.parametrize("format", [VTD, AMD, S1, S2])
def test_a_narrower_top_table(guest: Guest, format: TableFormat) -> None:
    table = Table(format, 3, 0x1000, 32, 48, ALL_PAGES)
    build(guest, table, 0xC000_0000, 0x5000)
    assert guest.walk(table, 0xC000_0123).gpa == 0x5000
    assert guest.fault(table, 1 << 32) == (Reason.INPUT_WIDTH, 0, 0, 0)


@pytest.mark.parametrize("width", [32, 40])
@pytest.mark.parametrize(("format", "levels"), SHAPES)
def test_addresses_beyond_the_output_width(guest: Guest, format: TableFormat, levels: int, width: int) -> None:
    table = make(format, levels, output_bits=width)
    iova = some_iova(table)
    reason = Reason.OUTPUT_WIDTH if format in (S1, S2) else Reason.RESERVED_BITS
    slots = build(guest, table, iova, (1 << width) - 0x1000)
    assert guest.walk(table, iova).gpa == (1 << width) - 0x1000
    for level in range(1, levels + 1):
        slots = build(guest, table, iova, 0x5000)
        slot = slots[levels - level]
        top = 48 if format in (S1, S2) else 52
        for bit in (width, top - 1):
            guest.put(slot, guest.get(slot) | 1 << bit)
            assert guest.fault(table, iova) == (reason, level, 0, 0)
            guest.put(slot, guest.get(slot) & ~(1 << bit))


@pytest.mark.parametrize(
    ("format", "level", "field"),
    [
        (VTD, 2, (20, 12)),
        (VTD, 3, (29, 12)),
        (X86, 2, (20, 13)),
        (X86, 3, (29, 13)),
        (AMD, 2, (20, 12)),
        (AMD, 3, (29, 12)),
        (AMD, 4, (38, 12)),
    ],
)
def test_low_bits_of_large_pages_are_reserved(
    guest: Guest, format: TableFormat, level: int, field: tuple[int, int]
) -> None:
    table = make(format, 4)
    iova = some_iova(table)
    slot = build(guest, table, iova, 1 << 40, level)[-1]
    for bit in range(field[1], field[0] + 1):
        guest.put(slot, TO_PAGE[format](level) | 1 << 40 | 1 << bit)
        assert guest.fault(table, iova) == (Reason.RESERVED_BITS, level, 0, 0)


@pytest.mark.parametrize("format", [VTD, X86, AMD])
def test_permissions_add_up(guest: Guest, format: TableFormat) -> None:
    """Whatever one entry forbids is forbidden; the fault is the last entry's."""
    read, write = {VTD: (0, 1), X86: (None, 1), AMD: (61, 62)}[format]
    table = make(format, 4)
    iova = some_iova(table)
    for level in (1, 2, 3, 4):
        slots = build(guest, table, iova, 0x5000)
        slot = slots[4 - level]
        whole = guest.get(slot)
        guest.put(slot, whole & ~bits(write))
        assert guest.walk(table, iova, NONE).access == R
        assert guest.walk(table, iova, R).access == R
        assert guest.fault(table, iova, W) == (Reason.PERMISSION, 1, 0, 0)
        assert guest.fault(table, iova, RW) == (Reason.PERMISSION, 1, 0, 0)
        if read is not None:
            guest.put(slot, whole & ~bits(read))
            assert guest.walk(table, iova, NONE).access == W
            assert guest.walk(table, iova, W).access == W
            assert guest.fault(table, iova, R) == (Reason.PERMISSION, 1, 0, 0)
    if format != X86:
        slots = build(guest, table, iova, 0x5000)
        guest.put(slots[0], guest.get(slots[0]) & ~bits(read))  # type: ignore[arg-type]
        guest.put(slots[3], guest.get(slots[3]) & ~bits(write))
        assert guest.fault(table, iova, NONE) == (Reason.PERMISSION, 1, 0, 0)


#: (format, accessed flag, dirty flag) of the formats that set flags
FLAGS = [(VTD, 8, 9), (X86, 5, 6), (AMD, 5, 6)]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("format", "accessed", "dirty"), FLAGS)
def test_accessed_and_dirty(guest: Guest, format: TableFormat, accessed: int, dirty: int, level: int) -> None:
    table = make(format, 4, FULL)
    iova = some_iova(table)
    slots = build(guest, table, iova, 0x4000_0000, level)
    plain = [guest.get(slot) for slot in slots]

    def flags() -> list[int]:
        return [guest.get(slot) ^ was for slot, was in zip(slots, plain, strict=True)]

    last = len(slots) - 1
    assert guest.walk(table, iova, NONE).access == RW
    assert flags() == [0] * len(slots)
    assert guest.walk(table, iova, R).access == R  # the first write has to walk once more
    assert flags() == [bits(accessed)] * len(slots)
    assert guest.walk(table, iova, W).access == RW
    assert flags() == [bits(accessed)] * last + [bits(accessed, dirty)]
    assert guest.walk(table, iova, R).access == RW  # it is dirty already


@pytest.mark.parametrize(("format", "accessed", "dirty"), FLAGS)
def test_a_fault_sets_no_flags(guest: Guest, format: TableFormat, accessed: int, dirty: int) -> None:
    table = make(format, 4, FULL)
    iova = some_iova(table)
    slots = build(guest, table, iova, 0x5000)
    write = {VTD: 1, X86: 1, AMD: 62}[format]
    guest.put(slots[3], guest.get(slots[3]) & ~bits(write))
    before = guest.contents()
    assert guest.fault(table, iova, W)[0] == Reason.PERMISSION
    guest.put(slots[3], 0)
    assert guest.fault(table, iova, W)[0] == Reason.NOT_MAPPED
    guest.put(slots[3], before[slots[3]] | 0)
    assert guest.contents()[: table.root] == before[: table.root]
    for slot in slots[:3]:
        assert not guest.get(slot) & bits(accessed, dirty)


@pytest.mark.parametrize(("format", "accessed", "dirty"), [(VTD, 8, 9), (AMD, 5, 6)])
def test_flags_only_where_asked_for(guest: Guest, format: TableFormat, accessed: int, dirty: int) -> None:
    table = make(format, 4, ALL_PAGES | TableFlag.SET_ACCESSED)
    iova = some_iova(table)
    slots = build(guest, table, iova, 0x5000)
    assert guest.walk(table, iova, W).access == RW
    assert all(guest.get(slot) & bits(accessed, dirty) == bits(accessed) for slot in slots)

    table = make(format, 4, ALL_PAGES | TableFlag.SET_DIRTY)
    slots = build(guest, table, iova, 0x5000)
    assert guest.walk(table, iova, R).access == R
    assert guest.walk(table, iova, W).access == RW
    assert [guest.get(slot) & bits(accessed, dirty) for slot in slots] == [0, 0, 0, bits(dirty)]


@pytest.mark.parametrize("format", [VTD, X86, AMD])
def test_flags_in_memory_that_cannot_be_written(guest: Guest, format: TableFormat) -> None:
    table = make(format, 4, FULL, root=0x1000)
    iova = some_iova(table)
    slots = build(guest, table, iova, 0x5000, tables=(0x2000, READ_ONLY, 0x4000))
    assert guest.walk(table, iova, NONE).gpa == 0x5000
    assert guest.fault(table, iova, R) == (Reason.TABLE_ACCESS, 2, 0, 0)
    accessed = {VTD: 8, X86: 5, AMD: 5}[format]
    guest.put(slots[2], guest.get(slots[2]) | bits(accessed))  # nothing left to set there
    assert guest.walk(table, iova, R).gpa == 0x5000


# ---- VT-d -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "needed"), [(2, TableFlag.PAGES_2M), (3, TableFlag.PAGES_1G), (4, None), (5, None)])
def test_vtd_large_pages_where_allowed(guest: Guest, level: int, needed: TableFlag | None) -> None:
    for flags in (0, TableFlag.PAGES_2M, TableFlag.PAGES_1G, ALL_PAGES):
        table = make(VTD, 5, flags)
        build(guest, table, IOVA & (1 << 57) - 1, 0, level)
        if needed is not None and needed & flags:
            assert guest.walk(table, IOVA & (1 << 57) - 1).level == level
        else:
            assert guest.fault(table, IOVA & (1 << 57) - 1) == (Reason.RESERVED_BITS, level, 0, 0)


def test_vtd_reserved_bits(guest: Guest) -> None:
    for flags in (ALL_PAGES, ALL_PAGES | TableFlag.SNOOP):
        table = make(VTD, 4, flags)
        for leaf in (1, 2, 3):
            for level in range(leaf, 5):
                slots = build(guest, table, 0x1234_5678_9000, 0x4000_0000, leaf)
                slot = slots[4 - level]
                whole = guest.get(slot)
                guest.put(slot, whole | bits(11))
                if level == leaf and flags & TableFlag.SNOOP:
                    assert guest.walk(table, 0x1234_5678_9000).level == leaf
                else:
                    assert guest.fault(table, 0x1234_5678_9000) == (Reason.RESERVED_BITS, level, 0, 0)
                guest.put(slot, whole | bits(62))
                assert guest.fault(table, 0x1234_5678_9000) == (Reason.RESERVED_BITS, level, 0, 0)
                guest.put(slot, whole | bits(2, 3, 4, 5, 6, 10, *range(52, 62), 63))  # ignored
                assert guest.walk(table, 0x1234_5678_9000).level == leaf
                guest.put(slot, bits(2, 11, 62, 63, 51))  # not present: no bit matters
                assert guest.fault(table, 0x1234_5678_9000) == (Reason.NOT_MAPPED, level, 0, 0)


# ---- x86 --------------------------------------------------------------------------------------------


def test_x86_user_and_supervisor(guest: Guest) -> None:
    for level in (1, 2, 3, 4):
        user, supervisor = make(X86, 4), make(X86, 4, TableFlag.SUPERVISOR)
        slots = build(guest, user, 0x1234_5678_9000, 0x5000)
        slot = slots[4 - level]
        guest.put(slot, guest.get(slot) & ~bits(2))
        for access in (NONE, R, W):
            assert guest.fault(user, 0x1234_5678_9000, access) == (Reason.PERMISSION, 1, 0, 0)
        assert guest.walk(supervisor, 0x1234_5678_9000, W).access == RW
        guest.put(slot, guest.get(slot) & ~bits(1))
        assert guest.fault(supervisor, 0x1234_5678_9000, W) == (Reason.PERMISSION, 1, 0, 0)


@pytest.mark.parametrize("level", [4, 5])
def test_x86_no_pages_above_1g(guest: Guest, level: int) -> None:
    table = make(X86, 5)
    build(guest, table, 0x1234_5678_9000, 0, level)
    assert guest.fault(table, 0x1234_5678_9000) == (Reason.RESERVED_BITS, level, 0, 0)


def test_x86_pat_and_ignored_bits(guest: Guest) -> None:
    table = make(X86, 4, 0)
    for level in (1, 2, 3):
        slot = build(guest, table, 0x1234_5678_9000, 0x4000_0000, level)[-1]
        pat = 7 if level == 1 else 12
        guest.put(slot, guest.get(slot) | bits(pat, 3, 4, 8, 9, 10, 11, *range(52, 64)))
        assert guest.walk(table, 0x1234_5678_9000).gpa == 0x4000_0000


# ---- AMD --------------------------------------------------------------------------------------------


def test_amd_skips_levels(guest: Guest) -> None:
    table = make(AMD, 6)
    guest.put(0x1000, bits(0, 61, 62) | 2 << 9 | 0x2000)  # from 6 to 2
    guest.put(0x2000 + 8 * 3, bits(0, 61, 62) | 1 << 9 | 0x3000)
    guest.put(0x3000 + 8 * 5, bits(0, 61, 62) | 0x7000)
    iova = 3 << 21 | 5 << 12
    assert guest.walk(table, iova | 7) == Walked(iova, iova + 0xFFF, 0x7000, RW, 1)
    for bit in (30, 38, 39, 47, 48, 56):
        assert guest.fault(table, iova | 1 << bit) == (Reason.NOT_MAPPED, 6, 0, 0)
    assert guest.fault(table, iova | 1 << 57) == (Reason.NOT_MAPPED, 6, 0, 0)  # another entry of the top table


@pytest.mark.parametrize("level", range(1, 7))
def test_amd_next_level_goes_down(guest: Guest, level: int) -> None:
    table = make(AMD, 6)
    slots = build(guest, table, 0, 0x5000)
    for following in range(max(level, 1), 7):
        guest.put(slots[6 - level], bits(0, 61, 62) | following << 9 | 0x9000)
        assert guest.fault(table, 0) == (Reason.RESERVED_BITS, level, 0, 0)


@pytest.mark.parametrize("level", range(1, 6))
def test_amd_odd_sizes(guest: Guest, level: int) -> None:
    """Next level 7: the lowest clear bit of the address says the size, between those of the levels."""
    table = make(AMD, 6, FULL, output_bits=52)
    iova = IOVA & ~0 << page_bits(level)
    for size in range(13, 53):
        address = 1 << 51 if size < 52 else 0
        slot = build(guest, table, iova, 0, level)[-1]
        guest.put(slot, bits(0, 61, 62) | 7 << 9 | address | (1 << size - 1) - 0x1000)
        if page_bits(level) < size < page_bits(level + 1):
            start = iova >> size << size
            assert guest.walk(table, iova, W) == Walked(start, start + (1 << size) - 1, address, RW, level)
            assert guest.get(slot) & bits(5, 6) == bits(5, 6)
        else:
            assert guest.fault(table, iova, W) == (Reason.RESERVED_BITS, level, 0, 0)


def test_amd_reserved_bits(guest: Guest) -> None:
    table = make(AMD, 4)
    for level in (1, 2, 3, 4):
        slots = build(guest, table, 0x1234_5678_9000, 0x5000)
        slot = slots[4 - level]
        whole = guest.get(slot)
        for bit in range(52, 59):
            guest.put(slot, whole | bits(bit))
            assert guest.fault(table, 0x1234_5678_9000) == (Reason.RESERVED_BITS, level, 0, 0)
        for bit in (59, 60):  # U and FC of pages
            guest.put(slot, whole | bits(bit))
            if level == 1:
                assert guest.walk(table, 0x1234_5678_9000).gpa == 0x5000
            else:
                assert guest.fault(table, 0x1234_5678_9000) == (Reason.RESERVED_BITS, level, 0, 0)
        guest.put(slot, whole | bits(1, 2, 3, 4, 7, 8, 63))
        assert guest.walk(table, 0x1234_5678_9000).gpa == 0x5000


# ---- Arm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [S1, S2])
def test_arm_kinds_of_descriptors(guest: Guest, format: TableFormat) -> None:
    """Bits 1:0 = 01 is a block at levels 2 and 3, and nothing at 1 and 4; x0 is nothing anywhere."""
    table = make(format, 4)
    iova = 0x1234_5678_9000
    for level in (1, 2, 3, 4):
        slots = build(guest, table, iova, 0x5000)
        slot = slots[4 - level]
        whole = guest.get(slot)
        guest.put(slot, whole & ~1)
        assert guest.fault(table, iova) == (Reason.NOT_MAPPED, level, 0, 0)
        guest.put(slot, TO_PAGE[format](2) | 0x4000_0000)
        if level in (2, 3):
            assert guest.walk(table, iova).level == level
        else:
            assert guest.fault(table, iova) == (Reason.NOT_MAPPED, level, 0, 0)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("format", [S1, S2])
def test_arm_access_flag(guest: Guest, format: TableFormat, level: int) -> None:
    iova = 0x1234_5678_9000
    manual, managed = make(format, 4), make(format, 4, TableFlag.SET_ACCESSED)
    slot = build(guest, manual, iova, 0x4000_0000, level)[-1]
    whole = guest.get(slot)
    guest.put(slot, whole & ~bits(10))
    for access in (NONE, R, W, RW):
        assert guest.fault(manual, iova, access) == (Reason.ACCESS_FLAG, level, 0, 0)
    assert guest.walk(managed, iova, NONE).access == RW
    assert guest.get(slot) == whole & ~bits(10)
    assert guest.walk(managed, iova, R).access == RW
    assert guest.get(slot) == whole
    # It comes before a Permission fault, and after an Address size fault.
    guest.put(slot, whole & ~bits(10) | bits(7) if format == S1 else whole & ~bits(10, 7))
    assert guest.fault(manual, iova, W) == (Reason.ACCESS_FLAG, level, 0, 0)
    guest.put(slot, whole & ~bits(10) | bits(45))
    narrow = make(format, 4, output_bits=40)
    assert guest.fault(narrow, iova, W) == (Reason.OUTPUT_WIDTH, level, 0, 0)


def test_arm_stage_1_permissions(guest: Guest) -> None:
    """AP[2:1], 7:6: 00 privileged only; 01 both; 10 read-only, privileged only; 11 read-only."""
    user, privileged = make(S1, 4), make(S1, 4, TableFlag.SUPERVISOR)
    iova = 0x1234_5678_9000
    slot = build(guest, user, iova, 0x5000)[-1]
    expected = {0: (NONE, RW), 1: (RW, RW), 2: (NONE, R), 3: (R, R)}
    for ap, allowed in expected.items():
        guest.put(slot, guest.get(slot) & ~bits(6, 7) | ap << 6)
        for table, access in zip((user, privileged), allowed, strict=True):
            for wanted in (NONE, R, W, RW):
                if access and wanted in access:
                    assert guest.walk(table, iova, wanted).access == access
                else:
                    assert guest.fault(table, iova, wanted) == (Reason.PERMISSION, 1, 0, 0)


@pytest.mark.parametrize("level", [2, 3, 4])
def test_arm_table_permissions(guest: Guest, level: int) -> None:
    """APTable, 62:61 of table descriptors of stage 1: no write; no access by EL0.  Stage 2 has none."""
    iova = 0x1234_5678_9000
    for format in (S1, S2):
        user, privileged = make(format, 4, AD), make(format, 4, AD | TableFlag.SUPERVISOR)
        slots = build(guest, user, iova, 0x5000)
        guest.put(slots[3], guest.get(slots[3]) | bits(51))  # DBM does not help
        whole = guest.get(slots[4 - level])
        for bit, table, allowed in (
            (62, user, R),
            (62, privileged, R),
            (61, user, NONE),
            (61, privileged, RW),
        ):
            guest.put(slots[4 - level], whole | bits(bit, 63, 60, 59))
            if format == S2:
                assert guest.walk(table, iova, RW).access == RW
            elif allowed:
                assert guest.walk(table, iova, NONE).access == allowed
            else:
                assert guest.fault(table, iova, R) == (Reason.PERMISSION, 1, 0, 0)
            if format == S1 and not allowed & W:
                assert guest.fault(table, iova, W) == (Reason.PERMISSION, 1, 0, 0)
            guest.put(slots[4 - level], whole)


def test_arm_stage_2_permissions(guest: Guest) -> None:
    table = make(S2, 4)
    iova = 0x1234_5678_9000
    slot = build(guest, table, iova, 0x5000)[-1]
    for s2ap, access in {0: NONE, 1: R, 2: W, 3: RW}.items():
        guest.put(slot, guest.get(slot) & ~bits(6, 7) | s2ap << 6)
        for wanted in (NONE, R, W, RW):
            if access and wanted in access:
                assert guest.walk(table, iova, wanted).access == access
            else:
                assert guest.fault(table, iova, wanted) == (Reason.PERMISSION, 1, 0, 0)


@pytest.mark.parametrize("format", [S1, S2])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_arm_dirty_state(guest: Guest, format: TableFormat, level: int) -> None:
    """DBM, bit 51: with HD a read-only entry is writable and clean; the first write makes it dirty."""
    iova = 0x1234_5678_9000
    off, on = make(format, 4, TableFlag.SET_ACCESSED), make(format, 4, AD)
    slot = build(guest, off, iova, 0x4000_0000, level)[-1]
    dirty = guest.get(slot) | bits(51)
    clean = dirty ^ bits(7)
    guest.put(slot, clean)
    assert guest.fault(off, iova, W) == (Reason.PERMISSION, level, 0, 0)
    assert guest.walk(on, iova, NONE).access == RW
    assert guest.walk(on, iova, R).access == R
    assert guest.get(slot) == clean
    assert guest.walk(on, iova, W).access == RW
    assert guest.get(slot) == dirty
    assert guest.walk(on, iova, R).access == RW
    guest.put(slot, clean & ~bits(51))  # no DBM: simply read-only
    assert guest.fault(on, iova, W) == (Reason.PERMISSION, level, 0, 0)
    guest.put(slot, clean & ~bits(10))  # both flags at once
    assert guest.walk(on, iova, W).access == RW
    assert guest.get(slot) == dirty


def test_arm_concatenated_tables(guest: Guest) -> None:
    """Stage 2 may begin with 16 tables in a row."""
    table = Table(S2, 2, 0x10000, 34, 40)
    iova = 15 << 30 | 7 << 21 | 3 << 12
    guest.put(0x10000 + 8 * (15 * 512 + 7), bits(0, 1) | 0x3000)
    guest.put(0x3000 + 8 * 3, TO_PAGE[S2](1) | 0x9000)
    assert guest.walk(table, iova).gpa == 0x9000
    assert guest.fault(table, 1 << 34) == (Reason.INPUT_WIDTH, 0, 0, 0)


def test_arm_ignored_bits(guest: Guest) -> None:
    for format in (S1, S2):
        table = make(format, 4)
        slots = build(guest, table, 0x1234_5678_9000, 0x5000)
        guest.put(slots[3], guest.get(slots[3]) | bits(2, 3, 4, 5, 8, 9, 11, 48, 49, 50, 52, 53, 54, *range(55, 64)))
        guest.put(slots[1], guest.get(slots[1]) | bits(*range(2, 12), 48, 49, 50, 51, 52))
        assert guest.walk(table, 0x1234_5678_9000).gpa == 0x5000


# ---- nested -----------------------------------------------------------------------------------------

PAIRS = [
    *((first, second) for first in (X86, S1) for second in FORMATS),
    (VTD, VTD),
    (AMD, S2),
    (S2, AMD),
]


def nested(guest: Guest, first: TableFormat, second: TableFormat, flags: int = FULL) -> tuple[Table, Table, list[int]]:
    """Stage 1 at GPA 0x1000 of its own world, where everything is 1 MiB higher; all tables of stage 2 are at 0x20000.

    The entries of stage 2 that are used for the page at 0x5000 (and those of the tables at 0x1000 to 0x4000).
    """
    inner, outer = make(first, 4, flags), make(second, 4, flags, root=0x20000)
    slots = []
    for page in range(1, 9):
        slots.append(build(guest, outer, page << 12, 0x10_0000 + (page << 12))[-1])
    iova = 0x1234_5678_9000
    for slot in build(guest, inner, iova, 0x5000):  # built too low: move it
        guest.put(slot + 0x10_0000, guest.get(slot))
        guest.put(slot, 0)
    return inner, outer, slots


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_nested_walks(guest: Guest, first: TableFormat, second: TableFormat) -> None:
    inner, outer, slots = nested(guest, first, second)
    iova = 0x1234_5678_9000
    before = guest.contents()
    assert guest.walk(inner, iova + 0x123, NONE, outer) == Walked(iova, iova + 0xFFF, 0x10_5000, RW, 1)
    assert guest.contents() == before  # nor in stage 2
    assert guest.walk(inner, iova, W, outer) == Walked(iova, iova + 0xFFF, 0x10_5000, RW, 1)
    assert guest.fault(inner, 0, R, outer) == (Reason.NOT_MAPPED, 4, 1, 0)
    assert guest.fault(inner, 1 << 60, R, outer) == (Reason.INPUT_WIDTH, 0, 1, 0)
    for n in range(4):  # stage 2 loses the stage-1 table of level 4 - n
        kept = guest.get(slots[n])
        guest.put(slots[n], 0)
        table = 0x1000 * (n + 1) + 8 * index(iova, 4 - n)
        assert guest.fault(inner, iova, R, outer) == (Reason.NOT_MAPPED, 1, 2, table)
        guest.put(slots[n], kept)
    guest.put(slots[4], 0)
    assert guest.fault(inner, iova + 0x123, W, outer) == (Reason.NOT_MAPPED, 1, 2, 0x5123)


@pytest.mark.parametrize("first", [X86, S1, VTD])
def test_nested_in_mappings(guest: Guest, first: TableFormat) -> None:
    inner = make(first, 4, FULL)
    iova = 0x1234_5678_9000
    for slot in build(guest, inner, iova, 0x5000):
        guest.put(slot + 0x10_0000, guest.get(slot))
        guest.put(slot, 0)
    parent = Mappings(
        Span(0, 0xFFFF), [Mapping(Span(0x1000, 0x4FFF), 0x10_1000, RW), Mapping(Span(0x5000, 0x7FFF), 0x9000, R)]
    )
    assert guest.walk(inner, iova, R, parent) == Walked(iova, iova + 0xFFF, 0x9000, R, 1)
    assert guest.fault(inner, iova, W, parent) == (Reason.PERMISSION, 0, 2, 0x5000)
    for lacking, where in ((1, 4), (2, 3), (3, 2), (4, 1)):
        some = [
            Mapping(Span(n << 12, (n << 12) + 0xFFF), 0x10_0000 + (n << 12), RW) for n in range(1, 6) if n != lacking
        ]
        address = (lacking << 12) + 8 * index(iova, where)
        assert guest.fault(inner, iova, R, Mappings(Span(0, 0xFFFF), some)) == (Reason.NOT_MAPPED, 0, 2, address)
    narrow = Mappings(Span(0, 0x4FFF), [Mapping(Span(0x1000, 0x4FFF), 0x10_1000, RW)])
    assert guest.fault(inner, iova + 5, R, narrow) == (Reason.INPUT_WIDTH, 0, 2, 0x5005)
    away = Mappings(Span(0, 0xFFFF), [Mapping(Span(0x1000, 0x4FFF), HOLE, RW)])
    assert guest.fault(inner, iova, R, away) == (Reason.TABLE_ACCESS, 4, 1, 0)


@pytest.mark.parametrize("second", [VTD, AMD, S2])
def test_setting_flags_needs_stage_2_to_allow_writing(guest: Guest, second: TableFormat) -> None:
    inner, outer, slots = nested(guest, X86, second, ALL_PAGES | TableFlag.SET_ACCESSED)
    iova = 0x1234_5678_9000
    write = {VTD: 1, AMD: 62, S2: 7}[second]
    table = 0x2000 + 8 * index(iova, 3)
    guest.put(slots[1], guest.get(slots[1]) & ~bits(write))
    assert guest.walk(inner, iova, NONE, outer).gpa == 0x10_5000
    assert guest.fault(inner, iova, R, outer) == (Reason.PERMISSION, 1, 2, table)
    guest.put(0x10_0000 + table, guest.get(0x10_0000 + table) | bits(5))
    assert guest.walk(inner, iova, R, outer).gpa == 0x10_5000
    assert guest.get(0x10_1000 + 8 * index(iova, 4)) & bits(5)
    # and reading the table needs stage 2 to allow reading
    read = {VTD: 0, AMD: 61, S2: 6}[second]
    guest.put(slots[1], guest.get(slots[1]) & ~bits(read) | bits(write))
    for access in (NONE, R):
        assert guest.fault(inner, iova, access, outer) == (Reason.PERMISSION, 1, 2, table)


def test_a_write_makes_stage_2_dirty_where_stage_1_is(guest: Guest) -> None:
    inner, outer, slots = nested(guest, X86, VTD)
    guest.walk(inner, 0x1234_5678_9000, R, outer)
    assert [guest.get(slot) & bits(8, 9) for slot in slots[:5]] == [bits(8, 9)] * 4 + [bits(8)]
    guest.walk(inner, 0x1234_5678_9000, W, outer)
    assert guest.get(slots[4]) & bits(8, 9) == bits(8, 9)


def test_nested_pieces_are_cut_by_either_stage(guest: Guest) -> None:
    inner, outer = make(X86, 4, FULL), make(VTD, 4, FULL, root=0x20000)
    iova = 0x1234_5670_0000 & ~0x1F_FFFF
    build(guest, inner, iova, 0x4020_0000, 2)
    for page in range(1, 9):
        build(guest, outer, page << 12, page << 12)
    slots = build(guest, outer, 0x4020_3000, 0x7_7000, tables=(0x21000, 0x24000, 0x25000))
    assert guest.walk(inner, iova + 0x3456, NONE, outer) == Walked(iova + 0x3000, iova + 0x3FFF, 0x7_7000, RW, 2)
    guest.put(slots[2], bits(0, 1, 7) | 0x8000_0000)
    assert guest.walk(inner, iova + 0x3456, NONE, outer) == Walked(iova, iova + 0x1F_FFFF, 0x8000_0000, RW, 2)
    guest.put(slots[1], bits(0, 1, 7) | 0xC000_0000)
    assert guest.walk(inner, iova + 0x3456, NONE, outer) == Walked(iova, iova + 0x1F_FFFF, 0xC020_0000, RW, 2)


def test_stages_that_leave_nothing(guest: Guest) -> None:
    inner = make(AMD, 1)
    guest.put(0x1000, bits(0, 61) | 0x5000)
    parent = Mappings(Span(0, 0xFFFF), [Mapping(Span(0x1000, 0x1FFF), 0x1000, RW), Mapping(Span(0x5000, 0x5FFF), 0, W)])
    for access in (NONE, R):
        assert guest.fault(inner, 8, access, parent) == (Reason.PERMISSION, 0, 2, 0x5008)


# ---- wrong arguments --------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "format": VTD,
    "levels": 4,
    "root": 0x1000,
    "input_bits": 48,
    "output_bits": 40,
    "flags": TableFlag(0),
}


@pytest.mark.parametrize("change", [
    {"format": 7}, {"format": 2**32 - 1}, {"levels": 0}, {"levels": 2}, {"levels": 6}, {"levels": 2**32 - 1},
    {"root": 8}, {"root": 0x1800}, {"input_bits": 39}, {"input_bits": 49}, {"input_bits": 0}, {"input_bits": 2**32 - 1},
    {"output_bits": 31}, {"output_bits": 53}, {"output_bits": 0},
    {"format": X86, "levels": 3, "input_bits": 39}, {"format": X86, "input_bits": 47}, {"format": X86, "levels": 5},
    {"format": AMD, "levels": 7, "input_bits": 64}, {"format": AMD, "levels": 6, "input_bits": 65},
    {"format": AMD, "levels": 6, "input_bits": 57}, {"format": AMD, "levels": 1, "input_bits": 22},
    {"format": S1, "levels": 5}, {"format": S1, "output_bits": 49}, {"format": S1, "levels": 3, "input_bits": 40},
    {"format": S2, "input_bits": 49}, {"format": S2, "levels": 3, "input_bits": 44}, {"format": S2, "output_bits": 52},
])  # fmt: skip
def test_tables_that_cannot_be(change: dict[str, Any]) -> None:
    arguments = GOOD | change
    with pytest.raises(ValueError):
        Table(**arguments)
    memory = _shim.Memory(_shim.Files(), 1)
    with pytest.raises(OSError) as caught:
        _shim.Domain.table(memory, **arguments, parent=None)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("change", [
    {}, {"levels": 3, "input_bits": 31}, {"levels": 5, "input_bits": 57}, {"output_bits": 32}, {"output_bits": 52},
    {"format": AMD, "levels": 6, "input_bits": 64}, {"format": AMD, "levels": 1, "input_bits": 13},
    {"format": X86, "levels": 5, "input_bits": 57}, {"format": S2, "levels": 3, "input_bits": 43},
    {"format": S1, "levels": 1, "input_bits": 21}, {"root": 2**64 - 4096},
])  # fmt: skip
def test_tables_that_can(change: dict[str, Any]) -> None:
    arguments = GOOD | change
    Table(**arguments)
    _shim.Domain.table(_shim.Memory(_shim.Files(), 1), **arguments, parent=None)


def test_roots_at_the_end_of_the_address_space(guest: Guest) -> None:
    table = Table(S2, 3, 2**64 - 4096, 43, 40)
    assert guest.fault(table, 0) == (Reason.TABLE_ACCESS, 3, 0, 0)
    guest.put(0, TO_PAGE[S2](3) | 0x4000_0000)
    assert guest.walk(table, 1 << 39).gpa == 0x4000_0000  # the second of its tables wraps to 0


def test_parents_that_cannot_be() -> None:
    memory = _shim.Memory(_shim.Files(), 1)
    inner = _shim.Domain.table(memory, **GOOD, parent=_shim.Domain.paging(4096, 0, 2**48 - 1, 2**48 - 1, 9))
    for parent in (_shim.Domain.plain(_shim.DOMAIN_IDENTITY), _shim.Domain.plain(_shim.DOMAIN_BLOCKED), inner):
        with pytest.raises(OSError) as caught:
            _shim.Domain.table(memory, **GOOD, parent=parent)
        assert caught.value.errno == errno.EINVAL


def test_calls_that_cannot_be() -> None:
    guest, reference = ShimGuest(), ReferenceGuest()
    domain = guest.domain(make(VTD, 4))
    with pytest.raises(OSError):
        domain.walk(0, 4)
    for iova in (-1, 2**64):
        with pytest.raises(OverflowError):
            domain.walk(iova, R)
        with pytest.raises(ValueError):
            walk(make(VTD, 4), reference, iova, R)
    for call in (
        lambda: domain.map(0, 0, 4096, R),
        lambda: domain.unmap(0, 4096),
        domain.dirty_start,
        domain.dirty_stop,
        lambda: domain.dirty_report(0, 4096, 4096, False),
        lambda: domain.flush(1, 0),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert list(domain.list()) == []


def test_words() -> None:
    assert Bits(11, 9).mask == 0xE00
    assert Bits(11, 9).of(0xABC) == 5


# ---- any table ----------------------------------------------------------------------------------------


#: Pages that stage 2 knows, beside the tables of stage 1.
DATA = [0x1000 * n for n in range(0x30, 0x38)]


def random_entry(rng: random.Random, table: Table, level: int, pages: list[int]) -> int:
    """Mostly something that a driver might write; sometimes a bit of it is wrong, sometimes all of it."""
    kind = rng.random()
    if kind < 0.04:
        return rng.getrandbits(64)
    if kind < 0.09:
        return 0
    format = table.format
    if level > 1 and rng.random() < 0.8:
        below = rng.randrange(1, level) if format == AMD and rng.random() < 0.3 else level - 1
        entry = TO_TABLE[format](below) | rng.choice(pages)
    else:
        size = 1 << page_bits(level)
        entry = TO_PAGE[format](level)
        if format == AMD and rng.random() < 0.3:
            odd = page_bits(level) + rng.randrange(1, 9)
            entry |= 7 << 9 | rng.getrandbits(40) >> odd << odd | (1 << odd - 1) - 0x1000
        elif rng.random() < 0.5:
            entry |= rng.choice(DATA) // size * size
        elif rng.random() < 0.5 or size > RAM:
            entry |= (rng.getrandbits(table.output_bits) & (1 << 48) - 1) // size * size
        else:
            entry |= rng.randrange(RAM) // size * size
        if format in (S1, S2):
            entry ^= rng.choice((0, 0, bits(10), bits(7), bits(7, 51), bits(51)))
    if rng.random() < 0.15:
        entry ^= 1 << rng.randrange(64)
    elif rng.random() < 0.2:
        entry &= ~rng.choice((bits(0), bits(1), bits(2), bits(61), bits(62)))
    return entry


def fill(rng: random.Random, table: Table, pages: list[int], words: dict[int, int], indices: list[int]) -> None:
    """Tables in `pages`, each page meant for a level; few indices, so that IOVAs meet entries."""
    for n, page in enumerate(pages):
        level = table.levels - n % table.levels
        lower = pages[n + 1 :: table.levels] or pages
        for at in indices:
            words[page + 8 * at] = random_entry(rng, table, level, lower if rng.random() < 0.9 else pages)


def random_iova(rng: random.Random, table: Table, indices: list[int]) -> int:
    iova = rng.randrange(4096)
    for level in range(1, table.levels + 1):
        iova |= rng.choice(indices) << page_bits(level)
    iova &= (1 << table.input_bits) - 1
    if table.format == X86 and iova >> table.input_bits - 1:
        iova |= -1 << table.input_bits & (1 << 64) - 1
    return rng.getrandbits(64) if rng.random() < 0.03 else iova


def random_table(rng: random.Random, root: int) -> Table:
    format, levels = rng.choice(SHAPES)
    most = min(12 + 9 * levels, 48 if format in (S1, S2) else 64)
    width = most if format == X86 or rng.random() < 0.8 else rng.randrange(page_bits(levels) + 1, most + 1)
    output = rng.choice((48, 48, 48, 32, 40, 52 if format < S1 else 44))
    return Table(format, levels, root, width, output, TableFlag(rng.getrandbits(6) | rng.choice((0, 3, 24, 27))))


@pytest.fixture(scope="module")
def pair() -> tuple[ShimGuest, ReferenceGuest]:
    return ShimGuest(), ReferenceGuest()


Seen = set[tuple[TableFormat, Reason | None]]


def compare(pair: tuple[ShimGuest, ReferenceGuest], seed: int, kind: str) -> Seen:
    """The same random tables walked by both; which outcomes there were."""
    seen: Seen = set()
    shim, reference = pair
    rng = random.Random(seed)
    indices = [*sorted(rng.sample(range(512), 3)), 0]
    first = [0x1000 * n for n in range(1, 13)]
    second = [0x1000 * n for n in range(16, 28)]
    words: dict[int, int] = {}
    table = random_table(rng, first[0])
    parent: Parent = None
    fill(rng, table, first, words, indices)
    if kind == "table":
        parent = random_table(rng, second[0])
        fill(rng, parent, second, words, indices)
        whole = reference_builder(words)
        for page in first + DATA:  # so that stage 1 can be read, mostly; low pages stay where they are
            if rng.random() < 0.97:
                build(whole, parent, page, page, tables=[second[0], *(0x40000 + 0x1000 * n for n in range(5))])
    elif kind == "mappings":
        some = [Mapping(Span(page, page + 0xFFF), page, RW if rng.random() < 0.9 else R) for page in first + DATA]
        far = [
            Mapping(Span.sized(n << 20, 1 << rng.randrange(12, 21)), rng.getrandbits(40) << 12, RW) for n in range(1, 9)
        ]
        parent = Mappings(Span(0, 2**48 - 1), some + far)
        parent = Mappings(parent.aperture, [m for m in parent.mappings if m.gpa + m.span.size <= 2**64])
    for guest in pair:
        guest.wipe()
        for gpa, value in words.items():
            guest.put(gpa, value)
    domain = shim.domain(table, parent)
    for _ in range(12):
        iova, access = random_iova(rng, table, indices), Access(rng.randrange(4))
        expected = reference.outcome(table, iova, access, parent)
        try:
            found: Any = walked(domain, iova, access)
        except DmaFault as fault:
            found = fault.reason, fault.level, fault.stage, fault.gpa
        assert found == expected, (table, parent, hex(iova), access)
        seen.add((table.format, None if isinstance(expected, Walked) else expected[0]))
    assert shim.contents() == reference.contents()
    return seen


def walked(domain: _shim.Domain, iova: int, access: Access) -> Walked:
    start, last, gpa, prot, level = domain.walk(iova, access)
    return Walked(start, last, gpa, Access(prot), level)


def reference_builder(words: dict[int, int]) -> Guest:
    """Something that `build` can write to, and that only collects words."""

    class Collector(Guest):
        def put(self, gpa: int, *values: int) -> None:
            words[gpa] = values[0]

    return Collector()


@given(seed=st.integers(0, 2**64 - 1), kind=st.sampled_from(["alone", "alone", "table", "mappings"]))
@settings(max_examples=examples(600), deadline=None)
def test_any_table(pair: tuple[ShimGuest, ReferenceGuest], seed: int, kind: str) -> None:
    compare(pair, seed, kind)


def test_the_tables_are_random_enough(pair: tuple[ShimGuest, ReferenceGuest]) -> None:
    """Some of them, always the same: every outcome turns up for every format."""
    seen: Seen = set()
    for seed in range(250):
        seen |= compare(pair, seed, "alone")
    common = {None, Reason.NOT_MAPPED, Reason.PERMISSION, Reason.INPUT_WIDTH, Reason.TABLE_ACCESS}
    for format in FORMATS:
        own = {Reason.ACCESS_FLAG, Reason.OUTPUT_WIDTH} if format in (S1, S2) else {Reason.RESERVED_BITS}
        for reason in common | own:
            assert (format, reason) in seen, (format, reason)
