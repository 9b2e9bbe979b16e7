"""RISC-V tables, Sv39 to Sv57 and Sv39x4 to Sv57x4: each case by the shim and by the reference; random tables by both.

The rules are those of the privileged specification's translation process; each test names the extension.
"""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.iommu.tables import HOLE, RW, Guest, Parent, ReferenceGuest, ShimGuest, bits
from tests.iommu.walker import Walked
from tests.iommu.world import World, group_of, iommu
from vmodel import _shim
from vmodel.errors import Access, DmaFault, IommuError, Reason
from vmodel.iommu import AllocFlags, nested_domain_alloc, paging_domain_alloc, walked_domain_alloc
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat, page_bits
from vmodel.span import KiB, MiB

S1, S2 = TableFormat.RISCV_S1, TableFormat.RISCV_S2
R, W, NONE = Access.READ, Access.WRITE, Access(0)
AD = TableFlag.SET_ACCESSED | TableFlag.SET_DIRTY
#: Bits of an entry: valid, read, write, execute, user, global, accessed, dirty.
VALID, READ, WRITE, EXECUTE, USER, GLOBAL, ACCESSED, DIRTY = (1 << n for n in range(8))
PAGE = VALID | READ | WRITE | USER | ACCESSED | DIRTY
NAPOT = 1 << 63
SHAPES = [(format, levels) for format in (S1, S2) for levels in (3, 4, 5)]
IOVA = 0x12_3456_789A_BCDE & ~0xFFF | 0xABC


def make(format: TableFormat, levels: int, flags: int = 0, root: int = 0x4000, output_bits: int = 56) -> Table:
    return Table(format, levels, root, 12 + 9 * levels + (2 if format == S2 else 0), output_bits, TableFlag(flags))


def place(address: int) -> int:
    """An address in an entry: page numbers begin at bit 10."""
    return address >> 2


def some_iova(table: Table) -> int:
    return IOVA & (1 << table.input_bits - (table.format == S1)) - 1


def index(table: Table, iova: int, level: int) -> int:
    return iova >> page_bits(level) & (2047 if table.format == S2 and level == table.levels else 511)


def build(guest: Guest, table: Table, iova: int, page: int, level: int = 1, entry: int = PAGE) -> list[int]:
    """Writes the entries that take `iova` to `page`; the GPA of each, from the top down."""
    slots, here = [], table.root
    for n in range(table.levels, level - 1, -1):
        slots.append(here + 8 * index(table, iova, n))
        below = table.root + 0x4000 + 0x1000 * (table.levels - n)
        guest.put(slots[-1], place(page) | entry if n == level else place(below) | VALID)
        here = below
    return slots


@pytest.mark.parametrize(("format", "levels"), SHAPES)
def test_a_page_of_each_level(guest: Guest, format: TableFormat, levels: int) -> None:
    """Sv39: any level may have a leaf."""
    table = make(format, levels)
    iova = some_iova(table)
    for level in range(1, levels + 1):
        size = 1 << page_bits(level)
        page = 0x65_4321_0000_0000 // size * size
        guest.wipe()
        build(guest, table, iova, page, level)
        before, start = guest.contents(), iova // size * size
        for access in (NONE, R, W, RW):
            assert guest.walk(table, iova, access) == Walked(start, start + size - 1, page, RW, level)
        assert guest.contents() == before


@pytest.mark.parametrize(("format", "levels"), SHAPES)
def test_each_level_absent_or_out_of_reach(guest: Guest, format: TableFormat, levels: int) -> None:
    table = make(format, levels)
    iova = some_iova(table)
    for level in range(1, levels + 1):
        slots = build(guest, table, iova, 0x5000)
        guest.put(slots[levels - level], guest.get(slots[levels - level]) & ~VALID)
        assert guest.fault(table, iova) == (Reason.NOT_MAPPED, level, 0, 0)
        if level > 1:
            guest.put(slots[levels - level], place(HOLE) | VALID)
            assert guest.fault(table, iova) == (Reason.TABLE_ACCESS, level - 1, 0, 0)
    assert guest.fault(make(format, levels, root=HOLE), iova) == (Reason.TABLE_ACCESS, levels, 0, 0)


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_signed_addresses(guest: Guest, levels: int) -> None:
    """Sv39: bits 63 to 39 all equal bit 38."""
    table = make(S1, levels)
    sign = 1 << 11 + 9 * levels
    for iova in (0, sign - 1, 2**64 - sign, 2**64 - 1):
        build(guest, table, iova, 0x7000)
        start = iova & ~0xFFF
        assert guest.walk(table, iova) == Walked(start, start + 0xFFF, 0x7000, RW, 1)
    for iova in (sign, 2**63, 2**63 - 1, 2**64 - sign - 1):
        assert guest.fault(table, iova) == (Reason.INPUT_WIDTH, 0, 0, 0)


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_two_bits_more_at_stage_2(guest: Guest, levels: int) -> None:
    """Sv39x4: 2048 entries in the top table; bits beyond are zero."""
    table = make(S2, levels)
    top = 1 << 14 + 9 * levels
    for quarter in range(4):
        iova = top // 4 * quarter + 0x1000
        build(guest, table, iova, 0x5000 + 0x1000 * quarter)
        assert guest.walk(table, iova).gpa == 0x5000 + 0x1000 * quarter
    for iova in (top, 2**63, 2**64 - 1):
        assert guest.fault(table, iova) == (Reason.INPUT_WIDTH, 0, 0, 0)


@pytest.mark.parametrize("format", [S1, S2])
@pytest.mark.parametrize("flags", [0, TableFlag.PBMT])
def test_reserved(guest: Guest, format: TableFormat, flags: TableFlag) -> None:
    table = make(format, 4, flags)
    iova = some_iova(table)
    for level in (1, 2, 3, 4):
        bad = [1 << n for n in range(54, 61)]
        good = [bits(8), bits(9), GLOBAL]  # RSW, and G, which means nothing here
        slot = build(guest, table, iova, 1 << 50, level)[-1]
        leaf = guest.get(slot)
        (good if flags else bad).extend((bits(61), bits(62)))  # Svpbmt
        for extra in (*bad, bits(61, 62)):
            guest.put(slot, leaf | extra)
            assert guest.fault(table, iova) == (Reason.RESERVED_BITS, level, 0, 0), hex(extra)
        for extra in good:
            guest.put(slot, leaf | extra)
            assert guest.walk(table, iova).gpa == 1 << 50
        for low in range(12, page_bits(level)):  # a superpage that is not aligned
            guest.put(slot, leaf | place(1 << low))
            assert guest.fault(table, iova) == (Reason.RESERVED_BITS, level, 0, 0)
        guest.put(slot, leaf & ~READ)  # writable and not readable
        assert guest.fault(table, iova) == (Reason.RESERVED_BITS, level, 0, 0)
    for level in (2, 3, 4):
        slot = build(guest, table, iova, 0x5000)[4 - level]
        pointer = guest.get(slot)
        for extra in (*(1 << n for n in range(54, 64)), USER, ACCESSED, DIRTY):
            guest.put(slot, pointer | extra)
            assert guest.fault(table, iova) == (Reason.RESERVED_BITS, level, 0, 0), hex(extra)
        guest.put(slot, pointer | bits(5, 8, 9))
        assert guest.walk(table, iova).gpa == 0x5000
    slot = build(guest, table, iova, 0x5000)[-1]
    guest.put(slot, place(0x5000) | VALID)  # a pointer at the lowest level
    assert guest.fault(table, iova) == (Reason.RESERVED_BITS, 1, 0, 0)


@pytest.mark.parametrize("format", [S1, S2])
def test_64_kib(guest: Guest, format: TableFormat) -> None:
    """Svnapot: 1000 in the low bits of the page number is 64 KiB, of the lowest level; all else is reserved."""
    table = make(format, 3)
    iova = some_iova(table)
    start = iova & ~0xFFFF
    slot = build(guest, table, iova, 0x12_3458_8000, entry=PAGE | NAPOT)[-1]
    assert guest.walk(table, iova, W) == Walked(start, start + 0xFFFF, 0x12_3458_0000, RW, 1)
    for low in range(16):
        if low != 8:
            guest.put(slot, place(0x12_3458_0000 | low << 12) | PAGE | NAPOT)
            assert guest.fault(table, iova) == (Reason.RESERVED_BITS, 1, 0, 0)
    for level in (2, 3):
        build(guest, table, iova, 0x8000, level, PAGE | NAPOT)
        assert guest.fault(table, iova) == (Reason.RESERVED_BITS, level, 0, 0)


@pytest.mark.parametrize("format", [S1, S2])
@pytest.mark.parametrize("flags", [0, TableFlag.SUPERVISOR])
def test_permissions(guest: Guest, format: TableFormat, flags: TableFlag) -> None:
    """The leaf's; U clear: only privileged accesses of stage 1, and none of stage 2, where all are a user's."""
    table = make(format, 4, flags)
    iova = some_iova(table)
    base = VALID | ACCESSED | DIRTY
    for entry, allowed in ((READ, R), (READ | WRITE, RW), (READ | EXECUTE, R), (EXECUTE, NONE)):
        for user in (USER, 0):
            build(guest, table, iova, 0x5000, entry=base | entry | user)
            can = allowed if user or (flags and format == S1) else NONE
            for access in (R, W, RW):
                if access in can:
                    assert guest.walk(table, iova, access).access == can
                else:
                    assert guest.fault(table, iova, access) == (Reason.PERMISSION, 1, 0, 0)


@pytest.mark.parametrize("format", [S1, S2])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_flags_set_by_hardware(guest: Guest, format: TableFormat, level: int) -> None:
    """SADE, GADE of the device context: A with any use, D with a write; only of the leaf."""
    table = make(format, 3, AD)
    iova = some_iova(table)
    slots = build(guest, table, iova, 1 << 40, level, PAGE & ~(ACCESSED | DIRTY))
    plain = [guest.get(slot) for slot in slots]

    def changed() -> list[int]:
        return [guest.get(slot) ^ was for slot, was in zip(slots, plain, strict=True)]

    rest = [0] * (len(slots) - 1)
    assert guest.walk(table, iova, NONE).access == RW and changed() == [*rest, 0]
    assert guest.walk(table, iova, R).access == R and changed() == [*rest, ACCESSED]
    assert guest.walk(table, iova, W).access == RW and changed() == [*rest, ACCESSED | DIRTY]
    assert guest.walk(table, iova, R).access == RW


@pytest.mark.parametrize("format", [S1, S2])
def test_flags_that_software_sets(guest: Guest, format: TableFormat) -> None:
    """Without SADE: A clear faults at any use, D clear at a write."""
    table = make(format, 3)
    iova = some_iova(table)
    build(guest, table, iova, 0x5000, entry=PAGE & ~ACCESSED)
    before = guest.contents()
    for access in (NONE, R, W):
        assert guest.fault(table, iova, access) == (Reason.ACCESS_FLAG, 1, 0, 0)
    assert guest.contents() == before
    build(guest, table, iova, 0x5000, entry=PAGE & ~DIRTY)
    assert guest.walk(table, iova, R).access == R
    assert guest.fault(table, iova, W) == (Reason.PERMISSION, 1, 0, 0)


@pytest.mark.parametrize(("format", "levels"), SHAPES)
def test_output_width(guest: Guest, format: TableFormat, levels: int) -> None:
    table = make(format, levels, output_bits=40)
    iova = some_iova(table)
    for level in range(1, levels + 1):
        slot = build(guest, table, iova, 0x5000)[levels - level]
        whole = guest.get(slot)
        for bit in (40, 55):
            guest.put(slot, whole | place(1 << bit))
            assert guest.fault(table, iova) == (Reason.OUTPUT_WIDTH, level, 0, 0)


@pytest.mark.parametrize(("format", "levels"), SHAPES)
def test_a_table_that_points_to_itself(guest: Guest, format: TableFormat, levels: int) -> None:
    table = make(format, levels)
    guest.put(table.root, *[place(table.root) | VALID] * 512 * (4 if format == S2 else 1))
    assert guest.fault(table, some_iova(table)) == (Reason.RESERVED_BITS, 1, 0, 0)


@pytest.mark.parametrize(
    ("format", "levels", "root", "input_bits", "output_bits"),
    [
        (S1, 2, 0x4000, 30, 56),
        (S1, 6, 0x4000, 57, 56),
        (S1, 3, 0x4000, 38, 56),
        (S1, 3, 0x4000, 40, 56),
        (S1, 3, 0x4800, 39, 56),
        (S1, 3, 0x4000, 39, 57),
        (S1, 3, 0x4000, 39, 31),
        (S2, 3, 0x4000, 39, 56),
        (S2, 3, 0x5000, 41, 56),
        (S2, 5, 0x4000, 57, 56),
        (S2, 5, 0x4000, 60, 56),
    ],
)
def test_no_such_table(format: TableFormat, levels: int, root: int, input_bits: int, output_bits: int) -> None:
    with pytest.raises(ValueError):
        Table(format, levels, root, input_bits, output_bits)
    with pytest.raises(OSError) as caught:
        _shim.Domain.table(ShimGuest().memory, format, levels, root, input_bits, output_bits, 0, None)
    assert caught.value.errno == errno.EINVAL


# ---- two stages -------------------------------------------------------------------------------------


def test_nested(guest: Guest) -> None:
    """Stage 1's tables and pages are where stage 2 leads: here 1 MiB higher."""
    inner, outer = make(S1, 3, AD), make(S2, 3, AD, root=0x40000)
    for page in range(4, 16):
        build(guest, outer, page << 12, MiB + (page << 12), entry=PAGE & ~DIRTY)
    iova = some_iova(inner)
    for slot in build(guest, inner, iova, 0xF000, entry=PAGE & ~DIRTY):
        guest.put(slot + MiB, guest.get(slot))
        guest.put(slot, 0)
    start = iova & ~0xFFF
    assert guest.walk(inner, iova, W, outer) == Walked(start, start + 0xFFF, MiB + 0xF000, RW, 1)
    assert guest.fault(inner, 0, R, outer) == (Reason.NOT_MAPPED, 3, 1, 0)
    leaf = build(guest, outer, 0xF000, MiB + 0xF000, entry=PAGE & ~USER)[-1]
    assert guest.fault(inner, iova, R, outer) == (Reason.PERMISSION, 1, 2, 0xFABC)
    guest.put(leaf, 0)
    assert guest.fault(inner, iova, R, outer) == (Reason.NOT_MAPPED, 1, 2, 0xFABC)


# ---- any table ----------------------------------------------------------------------------------------


def random_entry(rng: random.Random, level: int, pages: list[int]) -> int:
    kind = rng.random()
    if kind < 0.05:
        return rng.getrandbits(64)
    if kind < 0.1:
        return 0
    if level > 1 and rng.random() < 0.8:
        entry = place(rng.choice(pages)) | VALID
    else:
        size = 1 << page_bits(level)
        entry = place(rng.choice((rng.choice(pages), rng.getrandbits(56))) // size * size) | PAGE
        if level == 1 and rng.random() < 0.3:
            entry = entry & ~place(0xF000) | place(0x8000) | NAPOT
        entry ^= rng.choice((0, 0, ACCESSED, DIRTY, ACCESSED | DIRTY, USER, WRITE, bits(61), bits(62)))
    return entry ^ 1 << rng.randrange(64) if rng.random() < 0.15 else entry


def random_table(rng: random.Random, root: int) -> Table:
    format, levels = rng.choice(SHAPES)
    return make(format, levels, rng.getrandbits(7) | rng.choice((0, 3)), root, rng.choice((56, 56, 48, 40)))


Seen = set[tuple[TableFormat, Reason | None]]


def compare(seed: int, nested: bool) -> Seen:
    """The same random tables walked by both; which outcomes there were."""
    shim, reference = ShimGuest(), ReferenceGuest()
    rng = random.Random(seed)
    indices = [*sorted(rng.sample(range(512), 3)), 0]
    table, parent = random_table(rng, 0x4000), random_table(rng, 0x20000) if nested else None
    words: dict[int, int] = {}
    for one in (table, parent) if parent is not None else (table,):
        pages = [one.root + 0x1000 * n for n in range(12)]
        for n, page in enumerate(pages):
            for at in indices:
                words[page + 8 * at] = random_entry(rng, one.levels - n % one.levels, pages[n + 1 :] or pages)
    for gpa, value in words.items():
        shim.put(gpa, value)
        reference.put(gpa, value)
    if parent is not None:  # so that stage 1 can be read, mostly
        for page in range(0x4000, 0x10000, 0x1000):
            build(shim, parent, page, page)
            build(reference, parent, page, page)
    above: Parent = parent
    seen: Seen = set()
    for _ in range(12):
        iova = rng.randrange(4096)
        for level in range(1, table.levels + 1):
            iova |= rng.choice(indices) << page_bits(level)
        iova &= (1 << table.input_bits) - 1
        if table.format == S1 and iova >> table.input_bits - 1:
            iova |= -1 << table.input_bits & (1 << 64) - 1
        iova = rng.getrandbits(64) if rng.random() < 0.05 else iova
        access = Access(rng.randrange(4))
        expected: Any = reference.outcome(table, iova, access, above)
        assert shim.outcome(table, iova, access, above) == expected, (table, parent, hex(iova), access)
        seen.add((table.format, None if isinstance(expected, Walked) else expected[0]))
    assert shim.contents() == reference.contents()
    return seen


@given(seed=st.integers(0, 2**64 - 1), nested=st.booleans())
@settings(max_examples=examples(300), deadline=None)
def test_any_table(seed: int, nested: bool) -> None:
    compare(seed, nested)


def test_the_tables_are_random_enough() -> None:
    """Always the same ones: every outcome turns up for both formats."""
    seen: Seen = set()
    for seed in range(200):
        seen |= compare(seed, False)
    outcomes = [None, Reason.NOT_MAPPED, Reason.PERMISSION, Reason.INPUT_WIDTH, Reason.TABLE_ACCESS]
    outcomes += [Reason.RESERVED_BITS, Reason.ACCESS_FLAG, Reason.OUTPUT_WIDTH]
    missing = [(format, reason) for format in (S1, S2) for reason in outcomes if (format, reason) not in seen]
    assert missing == []


# ---- of the kind --------------------------------------------------------------------------------------


class Tables(Guest):
    """Words of a world's RAM."""

    def __init__(self, world: World, base: int = 0) -> None:
        self.world, self.base = world, base

    def put(self, gpa: int, *values: int) -> None:
        self.world.put(self.base + gpa, *values)


@pytest.mark.parametrize("format", [S1, S2])
def test_walked_by_the_kind(format: TableFormat) -> None:
    world = World(iommu("riscv"))
    endpoint, dma = world.device("00:03.0")
    table = make(format, 4, root=0x10_0000)
    build(Tables(world), table, 0x4000_0000, 0x20_8000, entry=PAGE | NAPOT)
    world.ram[0x20_0010:0x20_0014] = b"here"
    group_of(endpoint).attach(walked_domain_alloc(endpoint, world.memory, table))
    assert dma.read(0x4000_0010, 4) == b"here"
    dma.write(0x4000_FFFF, b"x")
    assert world.ram[0x20_FFFF] == ord("x")
    with pytest.raises(DmaFault):
        dma.read(0x4001_0000, 1)
    world.close()


def test_nested_where_the_iommu_can() -> None:
    """Linux 7.3 does not nest on RISC-V; hardware does."""
    plain = World(iommu("riscv"))
    endpoint, _ = plain.device("00:03.0")
    table = make(S1, 3, root=0x10_0000)
    with pytest.raises(IommuError) as caught:
        nested_domain_alloc(endpoint, paging_domain_alloc(endpoint), plain.memory, table)
    assert caught.value.errno == errno.EOPNOTSUPP
    plain.close()
    world = World(iommu("riscv", nesting=True))
    endpoint, dma = world.device("00:03.0")
    parent = paging_domain_alloc(endpoint, AllocFlags.NEST_PARENT)
    parent.map(0, 2 * MiB, 4 * MiB)
    build(Tables(world, 2 * MiB), table, 0x4000_0000, 64 * KiB)
    world.ram[2 * MiB + 64 * KiB] = 7
    group_of(endpoint).attach(nested_domain_alloc(endpoint, parent, world.memory, table))
    assert dma.read(0x4000_0000, 1) == b"\x07"
    world.close()
