"""Walks of I/O page tables, slow and plain: what the shim's walkers are compared with.

Levels count from the bottom: an entry of level 1 maps 4 KiB, of level 2 2 MiB, and so on; Arm counts the other way, its
"level 3" is 1 here.  Every table but the top one has 512 entries of 8 bytes.

Sources, and how they are cited below:

- VT-d: Intel Virtualization Technology for Directed I/O, revision 3 and later
- SDM: Intel 64 and IA-32 Software Developer's Manual, volume 3
- AMD: AMD I/O Virtualization Technology (IOMMU) Specification, document 48882
- Arm: Arm Architecture Reference Manual for A-profile, chapter D8 (VMSAv8-64)
- RISC-V: The RISC-V Instruction Set Manual, volume II (privileged), by extension
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat, page_bits
from vmodel.span import Span

NOTHING = Access(0)
BOTH = Access.READ | Access.WRITE
#: How often a walk restarts when an entry has changed under it.
TRIES = 64


class TableMemory(Protocol):
    """Guest memory in words of 8 bytes, by GPA."""

    def load(self, gpa: int) -> int | None:
        """The word; None where it cannot be read."""

    def store(self, gpa: int, value: int) -> bool:
        """Replaces a word; False where it cannot be both read and written."""


@dataclass(frozen=True)
class Mapping:
    """What a paging domain keeps: `span` of IOVA leads to `gpa` and on."""

    span: Span
    gpa: int
    access: Access


@dataclass(frozen=True)
class Mappings:
    """A paging domain as a list: IOVAs in `aperture`, mappings that do not overlap."""

    aperture: Span
    mappings: Sequence[Mapping]


@dataclass(frozen=True)
class Walked:
    """What a walk has found: IOVAs `start`..`last` lead to `gpa` and on.

    `access` is what may be done without another walk: no writing while the dirty flag has yet to be set.  `level` is
    that of the entry, 0 for a mapping.
    """

    start: int
    last: int
    gpa: int
    access: Access
    level: int


# ---- entries ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bits:
    """A field of an entry, from bit `low` to bit `high`, both inside."""

    high: int
    low: int

    @property
    def mask(self) -> int:
        return (1 << self.high + 1) - (1 << self.low)

    def of(self, entry: int) -> int:
        """The field's value, shifted down."""
        return (entry & self.mask) >> self.low


def _bit(n: int) -> Bits:
    return Bits(n, n)


@dataclass(frozen=True)
class Next:
    """An entry that leads to the table at `address`, of level `level`."""

    address: int
    level: int
    access: Access
    used: int  # the entry with its flags set for a use


@dataclass(frozen=True)
class Page:
    """An entry that maps a page of 2**`bits` bytes."""

    address: int
    bits: int
    access: Access
    used: int
    written: int  # the entry with its flags set for a write
    access_flag_fault: bool = False


class _Refused(Exception):
    def __init__(self, reason: Reason) -> None:
        self.reason = reason


def _reserved(entry: int, *fields: Bits) -> None:
    if any(field.of(entry) for field in fields):
        raise _Refused(Reason.RESERVED_BITS)


def _access(read: int, write: int) -> Access:
    return (Access.READ if read else NOTHING) | (Access.WRITE if write else NOTHING)


def _beyond(output_bits: int, top: int) -> tuple[Bits, ...]:
    """The bits of an address field up to `top` that are wider than physical addresses."""
    return (Bits(top, output_bits),) if output_bits <= top else ()


def vtd_entry(table: Table, level: int, entry: int) -> Next | Page:
    """VT-d 9.8, second-stage paging entries (SS-PML5E to SS-PTE).

    Bits 11 and 62 are those of the tables up to revision 3; QEMU and VirtualBox refuse them as well.
    """
    read, write, large, snoop, address = _bit(0), _bit(1), _bit(7), _bit(11), Bits(51, 12)
    accessed, dirty, transient = _bit(8), _bit(9), _bit(62)

    if not read.of(entry) and not write.of(entry):  # there is no present flag: 3.7
        raise _Refused(Reason.NOT_MAPPED)
    _reserved(entry, transient, *_beyond(table.output_bits, 51))
    access = _access(read.of(entry), write.of(entry))
    used = entry | accessed.mask if TableFlag.SET_ACCESSED in table.flags else entry
    if level > 1 and not large.of(entry):
        _reserved(entry, snoop)
        return Next(address.of(entry) << 12, level - 1, access, used)
    if level > 1:
        # 10.4.2, CAP.SLLPS: which large pages there are; bit 7 is reserved elsewhere.
        pages = {2: TableFlag.PAGES_2M, 3: TableFlag.PAGES_1G}.get(level)
        if pages is None or pages not in table.flags:
            raise _Refused(Reason.RESERVED_BITS)
        _reserved(entry, Bits(page_bits(level) - 1, 12))
    if TableFlag.SNOOP not in table.flags:
        _reserved(entry, snoop)
    written = used | dirty.mask if TableFlag.SET_DIRTY in table.flags else used  # 3.7.2
    return Page(address.of(entry) << 12, page_bits(level), access, used, written)


def x86_entry(table: Table, level: int, entry: int) -> Next | Page:
    """SDM 4.5, and VT-d 9.7, first-stage paging entries (FS-PML5E to FS-PTE).  Pages of 1 GiB are always there."""
    present, write, user, large, address = _bit(0), _bit(1), _bit(2), _bit(7), Bits(51, 12)
    accessed, dirty = _bit(5), _bit(6)

    if not present.of(entry):
        raise _Refused(Reason.NOT_MAPPED)
    _reserved(entry, *_beyond(table.output_bits, 51))
    access = _access(1, write.of(entry))
    if not user.of(entry) and TableFlag.SUPERVISOR not in table.flags:
        access = NOTHING
    used = entry | accessed.mask
    if level > 1 and not large.of(entry):
        return Next(address.of(entry) << 12, level - 1, access, used)
    base = address.of(entry) << 12
    if level > 3:
        _reserved(entry, large)
    if level > 1:
        _reserved(entry, Bits(page_bits(level) - 1, 13))
        base &= ~(1 << 12)  # bit 12 is PAT there
    return Page(base, page_bits(level), access, used, used | dirty.mask)


def amd_entry(table: Table, level: int, entry: int) -> Next | Page:
    """AMD 2.2.3, I/O page tables for host translations: PTE and PDE."""
    present, accessed, dirty, next_level, address = _bit(0), _bit(5), _bit(6), Bits(11, 9), Bits(51, 12)
    read, write = _bit(61), _bit(62)

    if not present.of(entry):
        raise _Refused(Reason.NOT_MAPPED)
    _reserved(entry, Bits(58, 52))
    access = _access(read.of(entry), write.of(entry))
    used = entry | accessed.mask if TableFlag.SET_ACCESSED in table.flags else entry
    base, following = address.of(entry) << 12, next_level.of(entry)

    if 1 <= following <= 6:  # PDE
        _reserved(entry, Bits(60, 59), *_beyond(table.output_bits, 51))
        if following >= level:
            raise _Refused(Reason.RESERVED_BITS)
        return Next(base, following, access, used)

    bits = page_bits(level)
    if following == 7:
        # The lowest clear bit of the address tells the size, at least 8 KiB: a clear bit 12 means 2**13.
        bits = next((n for n in range(12, 52) if not entry >> n & 1), 52) + 1
        if not page_bits(level) < bits < page_bits(level + 1):
            raise _Refused(Reason.RESERVED_BITS)
        base = base >> bits << bits
    elif base % (1 << bits):
        raise _Refused(Reason.RESERVED_BITS)
    _reserved(base, *_beyond(table.output_bits, 51))
    written = used | dirty.mask if TableFlag.SET_DIRTY in table.flags else used
    return Page(base, bits, access, used, written)


def _arm_address(table: Table, entry: int, low: int) -> int:
    """Arm D8.2.3: output addresses beyond the configured size are an Address size fault; bits 51:48 are not ours."""
    address = entry & Bits(47, low).mask
    if address >= 1 << table.output_bits:
        raise _Refused(Reason.OUTPUT_WIDTH)
    return address


def _arm_is_table(level: int, entry: int) -> bool:
    """Arm D8.3.1, by bits 1:0: table (3), block (1), page (3 at the lowest level); else, or where there is none, fault.

    Blocks are of 1 GiB and 2 MiB with this granule.
    """
    kind = Bits(1, 0).of(entry)
    if kind == 3:
        return level > 1
    if kind == 1 and level in (2, 3):
        return False
    raise _Refused(Reason.NOT_MAPPED)


def arm_s1_entry(table: Table, level: int, entry: int) -> Next | Page:
    """Arm D8.3, stage 1 descriptors; D8.4.1 permissions; D8.5 access flag and dirty state."""
    access_flag, el0, read_only, dbm = _bit(10), _bit(6), _bit(7), _bit(51)  # el0, read_only: AP[1], AP[2]
    table_no_el0, table_read_only = _bit(61), _bit(62)  # APTable
    privileged = TableFlag.SUPERVISOR in table.flags

    if _arm_is_table(level, entry):
        access = _access(1, not table_read_only.of(entry))
        if table_no_el0.of(entry) and not privileged:
            access = NOTHING
        return Next(_arm_address(table, entry, 12), level - 1, access, entry)

    managed = bool(dbm.of(entry)) and TableFlag.SET_DIRTY in table.flags
    access = _access(1, managed or not read_only.of(entry))
    if not el0.of(entry) and not privileged:
        access = NOTHING
    base = _arm_address(table, entry, page_bits(level))
    used = entry | access_flag.mask if TableFlag.SET_ACCESSED in table.flags else entry
    written = used & ~read_only.mask if managed else used
    return Page(base, page_bits(level), access, used, written, not access_flag.of(used))


def arm_s2_entry(table: Table, level: int, entry: int) -> Next | Page:
    """Arm D8.3, stage 2 descriptors; D8.4.2 permissions (S2AP); D8.5 access flag and dirty state."""
    access_flag, read, write, dbm = _bit(10), _bit(6), _bit(7), _bit(51)

    if _arm_is_table(level, entry):
        return Next(_arm_address(table, entry, 12), level - 1, BOTH, entry)

    managed = bool(dbm.of(entry)) and TableFlag.SET_DIRTY in table.flags
    access = _access(read.of(entry), managed or write.of(entry))
    base = _arm_address(table, entry, page_bits(level))
    used = entry | access_flag.mask if TableFlag.SET_ACCESSED in table.flags else entry
    written = used | write.mask if managed else used
    return Page(base, page_bits(level), access, used, written, not access_flag.of(used))


def riscv_entry(table: Table, level: int, entry: int) -> Next | Page:
    """RISC-V Sv32, "Virtual Address Translation Process", with the wide entries of Sv39; Svnapot; Svpbmt; Sv39x4."""
    valid, read, write, execute, user, accessed, dirty = (_bit(n) for n in (0, 1, 2, 3, 4, 6, 7))
    number, future, memory_type, contiguous = Bits(53, 10), Bits(60, 54), Bits(62, 61), _bit(63)

    if not valid.of(entry):
        raise _Refused(Reason.NOT_MAPPED)
    _reserved(entry, future)
    if write.of(entry) and not read.of(entry):
        raise _Refused(Reason.RESERVED_BITS)
    address = number.of(entry) << 12
    if not (read.of(entry) or write.of(entry) or execute.of(entry)):
        _reserved(entry, user, accessed, dirty, memory_type, contiguous)
        if level == 1:
            raise _Refused(Reason.RESERVED_BITS)
        if address >> table.output_bits:
            raise _Refused(Reason.OUTPUT_WIDTH)
        return Next(address, level - 1, BOTH, entry)

    if memory_type.of(entry) == 3 or (memory_type.of(entry) and TableFlag.PBMT not in table.flags):
        raise _Refused(Reason.RESERVED_BITS)
    size = page_bits(level)
    if contiguous.of(entry):
        if level != 1 or number.of(entry) % 16 != 8:  # 64 KiB is the only such size
            raise _Refused(Reason.RESERVED_BITS)
        size, address = 16, address >> 16 << 16
    elif address % (1 << size):
        raise _Refused(Reason.RESERVED_BITS)
    if address >> table.output_bits:
        raise _Refused(Reason.OUTPUT_WIDTH)
    # Without hardware that sets it, a clear dirty flag makes a write fault.
    hardware = TableFlag.SET_DIRTY in table.flags
    access = _access(read.of(entry), write.of(entry) and (hardware or dirty.of(entry)))
    as_user = table.format == TableFormat.RISCV_S2 or TableFlag.SUPERVISOR not in table.flags
    if as_user and not user.of(entry):
        access = NOTHING
    used = entry | accessed.mask if TableFlag.SET_ACCESSED in table.flags else entry
    written = used | dirty.mask if hardware else used
    return Page(address, size, access, used, written, not accessed.of(used))


_ENTRY: dict[TableFormat, Callable[[Table, int, int], Next | Page]] = {
    TableFormat.VTD_SECOND: vtd_entry,
    TableFormat.X86: x86_entry,
    TableFormat.AMD_V1: amd_entry,
    TableFormat.ARM_S1: arm_s1_entry,
    TableFormat.ARM_S2: arm_s2_entry,
    TableFormat.RISCV_S1: riscv_entry,
    TableFormat.RISCV_S2: riscv_entry,
}


# ---- the walk -----------------------------------------------------------------------------------


class _Changed(Exception):
    """An entry is no longer what it was when it was read."""


@dataclass(frozen=True)
class _Walk:
    table: Table
    memory: TableMemory
    iova: int
    access: Access
    parent: Table | Mappings | None

    def fault(self, reason: Reason, level: int = 0) -> DmaFault:
        return DmaFault(reason, self.iova, self.access, level=level, stage=0 if self.parent is None else 1)

    def second(self, address: int, wanted: Access) -> Walked:
        """Where stage 2 takes an address.  A walk that is to set no flag asks for nothing, and looks afterwards."""
        assert self.parent is not None
        try:
            if isinstance(self.parent, Mappings):
                found = _look_up(self.parent, address, wanted if self.access else NOTHING)
            else:
                found = walk(self.parent, self.memory, address, wanted if self.access else NOTHING)
            if wanted not in found.access:
                raise DmaFault(Reason.PERMISSION, address, wanted, level=found.level)
        except DmaFault as fault:
            raise DmaFault(fault.reason, self.iova, self.access, gpa=address, level=fault.level, stage=2) from None
        return found

    def place(self, address: int, wanted: Access) -> int:
        """The GPA of the entry at `address`."""
        if self.parent is None:
            return address
        found = self.second(address, wanted)
        return found.gpa + address - found.start

    def set_flags(self, address: int, was: int, becomes: int, level: int) -> None:
        if was == becomes:
            return
        gpa = self.place(address, BOTH)
        now = self.memory.load(gpa)
        if now is not None and now != was:
            raise _Changed
        if now is None or not self.memory.store(gpa, becomes):
            raise self.fault(Reason.TABLE_ACCESS, level)

    def index(self, level: int) -> int:
        """Which entry of a table of this level; the top table may have more or fewer than 512."""
        top = self.table.input_bits if level == self.table.levels else page_bits(level + 1)
        return Bits(top - 1, page_bits(level)).of(self.iova)

    def run(self) -> Walked:
        address, level, access = self.table.root, self.table.levels, BOTH
        used: list[tuple[int, int, int, int]] = []  # address, was, becomes, level
        while True:  # each entry that is no page names a lower level
            slot = (address + 8 * self.index(level)) % (1 << 64)
            word = self.memory.load(self.place(slot, Access.READ))
            if word is None:
                raise self.fault(Reason.TABLE_ACCESS, level)
            try:
                entry = _ENTRY[self.table.format](self.table, level, word)
            except _Refused as refused:
                raise self.fault(refused.reason, level) from None
            access &= entry.access
            if isinstance(entry, Page):
                break
            # AMD 2.2.3: the bits of the IOVA that skipped levels would translate are zero.
            if any(self.index(skipped) for skipped in range(entry.level + 1, level)):
                raise self.fault(Reason.NOT_MAPPED, level)
            used.append((slot, word, entry.used, level))
            address, level = entry.address, entry.level

        if entry.access_flag_fault:  # Arm D8.12: it comes before a Permission fault
            raise self.fault(Reason.ACCESS_FLAG, level)
        if self.access not in access or not access:
            raise self.fault(Reason.PERMISSION, level)
        becomes = entry.written if Access.WRITE in self.access else entry.used
        used.append((slot, word, becomes, level))
        kept = access
        if self.access and entry.written != becomes:
            kept &= ~Access.WRITE  # the first write has to walk, for the dirty flag

        start = self.iova >> entry.bits << entry.bits
        found = Walked(start, start + (1 << entry.bits) - 1, entry.address, kept, level)
        if self.parent is not None:
            found = self.compose(found)
        if self.access:
            for one in used:
                self.set_flags(*one)
        return found

    def compose(self, first: Walked) -> Walked:
        """What both stages have in one piece around the IOVA."""
        address = first.gpa + self.iova - first.start
        second = self.second(address, self.access)
        shift = self.iova - address  # IOVA of an address of stage 2
        start, last = max(first.start, second.start + shift), min(first.last, second.last + shift)
        access = first.access & second.access
        if not access:  # only when nothing was asked for
            raise DmaFault(Reason.PERMISSION, self.iova, self.access, gpa=address, level=second.level, stage=2)
        return Walked(start, last, second.gpa + start - shift - second.start, access, first.level)


def _look_up(domain: Mappings, iova: int, access: Access) -> Walked:
    if iova not in domain.aperture:
        raise DmaFault(Reason.INPUT_WIDTH, iova, access)
    for mapping in domain.mappings:
        if iova in mapping.span:
            if access not in mapping.access:
                raise DmaFault(Reason.PERMISSION, iova, access)
            return Walked(mapping.span.start, mapping.span.last, mapping.gpa, mapping.access, 0)
    raise DmaFault(Reason.NOT_MAPPED, iova, access)


def _fits(table: Table, iova: int) -> bool:
    # SDM 3.3.7.1, RISC-V Sv39: all bits from the sign on are the same
    if table.format in (TableFormat.X86, TableFormat.RISCV_S1):
        return Bits(63, table.input_bits - 1).of(iova) in (0, Bits(63, table.input_bits - 1).of(2**64 - 1))
    return iova < 1 << table.input_bits


def walk(
    table: Table, memory: TableMemory, iova: int, access: Access, parent: Table | Mappings | None = None
) -> Walked:
    """Where `iova` leads, and what may be done there; sets accessed and dirty flags in `memory`.

    `access` NOTHING: whatever is allowed, and no flag is set.  With `parent` the addresses of this table, and those in
    it, are the parent's IOVAs.  DmaFault with reason, level, stage and gpa as the shim's `Domain.walk`; ValueError for
    an IOVA that is none.
    """
    if not 0 <= iova < 1 << 64:
        raise ValueError(f"iova {iova:#x}")
    asked = _Walk(table, memory, iova, access, parent)
    if not _fits(table, iova):
        raise asked.fault(Reason.INPUT_WIDTH)
    for _ in range(TRIES):
        try:
            return asked.run()
        except _Changed:
            continue
    raise asked.fault(Reason.TABLE_CHANGING)
