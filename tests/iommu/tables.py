"""Guest memory with tables in it, walked by the shim or by the reference: one class each, with the same calls."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Sequence

from tests.iommu.walker import Mappings, Walked, walk
from vmodel import _shim
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat
from vmodel.span import MiB

RW = Access.READ | Access.WRITE
RAM = 2 * MiB
#: Windows beside the RAM at 0: may be read only; may be written only; has no file.
READ_ONLY, WRITE_ONLY, NO_FILE = 0x20_0000, 0x21_0000, 0x22_0000
EXTRA = 0x1_0000
HOLE = 0x4000_0000
#: (reason, level, stage, gpa)
Fault = tuple[Reason, int, int, int]
Parent = Table | Mappings | None


class Guest:
    """RAM at 0, READ_ONLY and WRITE_ONLY memory, and a window without a file; holes elsewhere."""

    def load(self, gpa: int) -> int | None:
        """As TableMemory."""
        return None if gpa >= WRITE_ONLY else self.get(gpa)

    def store(self, gpa: int, value: int) -> bool:
        """As TableMemory."""
        if gpa >= READ_ONLY:
            return False
        self.put(gpa, value)
        return True

    def get(self, gpa: int) -> int:
        raise NotImplementedError

    def put(self, gpa: int, *values: int) -> None:
        raise NotImplementedError

    def contents(self) -> bytes:
        raise NotImplementedError

    def wipe(self) -> None:
        """Zeros, as at first."""

    def walk(self, table: Table, iova: int, access: Access = Access.READ, parent: Parent = None) -> Walked:
        raise NotImplementedError

    def fault(self, table: Table, iova: int, access: Access = Access.READ, parent: Parent = None) -> Fault:
        """How the walk fails; it must."""
        found = self.outcome(table, iova, access, parent)
        assert isinstance(found, tuple), found
        return found

    def outcome(self, table: Table, iova: int, access: Access, parent: Parent = None) -> Walked | Fault:
        try:
            return self.walk(table, iova, access, parent)
        except DmaFault as fault:
            assert (fault.iova, fault.access, fault.done, fault.pasid) == (iova, access, 0, None)
            return fault.reason, fault.level, fault.stage, fault.gpa


class ReferenceGuest(Guest):
    """Walked by `walker.walk`."""

    def __init__(self) -> None:
        self.bytes = bytearray(RAM + 2 * EXTRA)

    def get(self, gpa: int) -> int:
        return int(struct.unpack_from("<Q", self.bytes, gpa)[0])

    def put(self, gpa: int, *values: int) -> None:
        struct.pack_into(f"<{len(values)}Q", self.bytes, gpa, *values)

    def contents(self) -> bytes:
        return bytes(self.bytes)

    def wipe(self) -> None:
        self.bytes[:] = bytes(len(self.bytes))

    def walk(self, table: Table, iova: int, access: Access = Access.READ, parent: Parent = None) -> Walked:
        return walk(table, self, iova, access, parent)


class ShimGuest(Guest):
    """Walked by the shim, past all IOTLBs."""

    def __init__(self) -> None:
        self.memory = _shim.Memory(_shim.Files(), 8)
        self.fd = os.memfd_create("guest-ram")
        os.ftruncate(self.fd, RAM + 2 * EXTRA)
        self.bytes = mmap.mmap(self.fd, RAM + 2 * EXTRA)
        self.memory.map(0, RAM, RW, self.fd, 0)
        self.memory.map(READ_ONLY, EXTRA, Access.READ, self.fd, RAM)
        self.memory.map(WRITE_ONLY, EXTRA, Access.WRITE, self.fd, RAM + EXTRA)
        self.memory.map(NO_FILE, EXTRA, RW, -1, 0)

    def __del__(self) -> None:
        os.close(self.fd)

    def get(self, gpa: int) -> int:
        return int(struct.unpack_from("<Q", self.bytes, gpa)[0])

    def put(self, gpa: int, *values: int) -> None:
        struct.pack_into(f"<{len(values)}Q", self.bytes, gpa, *values)

    def contents(self) -> bytes:
        return self.bytes[:]

    def wipe(self) -> None:
        self.bytes[:] = bytes(len(self.bytes))

    def domain(self, table: Table, parent: Parent = None) -> _shim.Domain:
        above: _shim.Domain | None = None
        if isinstance(parent, Table):
            above = self.domain(parent)
        elif parent is not None:
            aperture = parent.aperture
            above = _shim.Domain.paging(4096, aperture.start, aperture.last, 2**64 - 1, 2**32)
            for one in parent.mappings:
                above.map(one.span.start, one.gpa, one.span.size, one.access)
        return _shim.Domain.table(
            self.memory,
            table.format,
            table.levels,
            table.root,
            table.input_bits,
            table.output_bits,
            table.flags,
            above,
        )

    def walk(self, table: Table, iova: int, access: Access = Access.READ, parent: Parent = None) -> Walked:
        start, last, gpa, prot, level = self.domain(table, parent).walk(iova, access)
        return Walked(start, last, gpa, Access(prot), level)


# ---- entries, written by hand from the specifications ----------------------------------------------


def bits(*numbers: int) -> int:
    """A word with these bits set."""
    return sum(1 << n for n in numbers)


#: What makes an entry that leads to a table, of the level given, and a page, usable for anything.
TO_TABLE: dict[TableFormat, Callable[[int], int]] = {
    TableFormat.VTD_SECOND: lambda level: bits(0, 1),
    TableFormat.X86: lambda level: bits(0, 1, 2),
    TableFormat.AMD_V1: lambda level: bits(0, 61, 62) | level << 9,
    TableFormat.ARM_S1: lambda level: bits(0, 1),
    TableFormat.ARM_S2: lambda level: bits(0, 1),
}
TO_PAGE: dict[TableFormat, Callable[[int], int]] = {
    TableFormat.VTD_SECOND: lambda level: bits(0, 1) if level == 1 else bits(0, 1, 7),
    TableFormat.X86: lambda level: bits(0, 1, 2) if level == 1 else bits(0, 1, 2, 7),
    TableFormat.AMD_V1: lambda level: bits(0, 61, 62),
    TableFormat.ARM_S1: lambda level: bits(0, 6, 10) | (bits(1) if level == 1 else 0),
    TableFormat.ARM_S2: lambda level: bits(0, 6, 7, 10) | (bits(1) if level == 1 else 0),
}
INPUT_BITS = {TableFormat.ARM_S1: 48, TableFormat.ARM_S2: 48}
ALL_PAGES = TableFlag.PAGES_2M | TableFlag.PAGES_1G


def make(format: TableFormat, levels: int, flags: int = ALL_PAGES, root: int = 0x1000, output_bits: int = 48) -> Table:
    """A table of full width."""
    width = min(12 + 9 * levels, INPUT_BITS.get(format, 64))
    return Table(format, levels, root, width, output_bits, TableFlag(flags))


def index(iova: int, level: int) -> int:
    return iova >> 12 + 9 * (level - 1) & 511


def build(guest: Guest, table: Table, iova: int, page: int, level: int = 1, tables: Sequence[int] = ()) -> list[int]:
    """Writes the entries that take `iova` to `page` by an entry of `level`; the GPA of each, from the top down.

    Tables are at root, root + 0x1000 and so on, or where `tables` says.
    """
    at = [table.root, *tables] if tables else [table.root + 0x1000 * n for n in range(table.levels)]
    slots = []
    for n, here in enumerate(range(table.levels, level - 1, -1)):
        slots.append(at[n] + 8 * index(iova, here))
        entry = TO_PAGE[table.format](here) | page if here == level else TO_TABLE[table.format](here - 1) | at[n + 1]
        guest.put(slots[-1], entry)
    return slots
