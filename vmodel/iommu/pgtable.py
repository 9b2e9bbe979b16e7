"""Formats of I/O page tables, and the description of one table; the shim walks them.

Levels count from the bottom: an entry of level 1 maps 4 KiB, of level 2 2 MiB, and so on; Arm counts the other way, its
"level 3" is 1 here.  Every table but the top one has 512 entries of 8 bytes.

Sources, and how they are cited below:

- VT-d: Intel Virtualization Technology for Directed I/O, revision 3 and later
- SDM: Intel 64 and IA-32 Software Developer's Manual, volume 3
- AMD: AMD I/O Virtualization Technology (IOMMU) Specification, document 48882
- Arm: Arm Architecture Reference Manual for A-profile, chapter D8 (VMSAv8-64)
- RISC-V: The RISC-V Instruction Set Manual, volume II (privileged), cited by extension
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class TableFormat(enum.IntEnum):
    """The format of a table; the values are the shim's `enum vms_table_format`."""

    VTD_SECOND = 0
    X86 = 1
    AMD_V1 = 2
    ARM_S1 = 3
    ARM_S2 = 4
    RISCV_S1 = 5
    RISCV_S2 = 6


class TableFlag(enum.IntFlag):
    """Permissions of a walk, and optional features of a format; the values are the shim's VMS_TABLE_*."""

    SET_ACCESSED = 1
    SET_DIRTY = 2
    SUPERVISOR = 4
    PAGES_2M = 8
    PAGES_1G = 16
    SNOOP = 32
    PBMT = 64


NO_FLAGS = TableFlag(0)


def page_bits(level: int) -> int:
    """log2 of the bytes that an entry of this level maps."""
    return 12 + 9 * (level - 1)


@dataclass(frozen=True)
class _Limits:
    levels: range
    output_bits: range
    input_bits: int
    concatenated: int = 0  # how many bits the index of the top table may have beyond nine


_LIMITS = {
    TableFormat.VTD_SECOND: _Limits(range(3, 6), range(32, 53), 57),  # VT-d 3.7
    TableFormat.X86: _Limits(range(4, 6), range(32, 53), 57),  # VT-d 3.6
    TableFormat.AMD_V1: _Limits(range(1, 7), range(32, 53), 64),  # AMD 2.2.3
    TableFormat.ARM_S1: _Limits(range(1, 5), range(32, 49), 48),  # Arm D8.2
    TableFormat.ARM_S2: _Limits(range(1, 5), range(32, 49), 48, concatenated=4),  # Arm D8.2.2: up to 16 tables
    TableFormat.RISCV_S1: _Limits(range(3, 6), range(32, 57), 57),  # RISC-V Sv39, Sv48, Sv57
    TableFormat.RISCV_S2: _Limits(range(3, 6), range(32, 57), 59, concatenated=2),  # RISC-V Sv39x4: 4 tables
}


#: Formats whose levels determine the width of IOVAs; of the stage 1 ones the sign is one of the bits.
_WHOLE = frozenset((TableFormat.X86, TableFormat.RISCV_S1, TableFormat.RISCV_S2))


@dataclass(frozen=True)
class Table:
    """The address and shape of a guest's table; the fields are the shim's `struct vms_table`.

    `root`: address of the top table, on a 4 KiB boundary (RISCV_S2: 16 KiB).  `input_bits`: width of IOVAs.
    `output_bits`: width of the addresses in entries.  ValueError: a value that the shim rejects with EINVAL.
    """

    format: TableFormat
    levels: int
    root: int
    input_bits: int
    output_bits: int
    flags: TableFlag = NO_FLAGS

    def __post_init__(self) -> None:
        limits = _LIMITS[TableFormat(self.format)]
        most = min(page_bits(self.levels + 1) + limits.concatenated, limits.input_bits)
        if self.levels not in limits.levels:
            raise ValueError(f"{self.format.name} has no {self.levels} levels")
        if self.output_bits not in limits.output_bits:
            raise ValueError(f"output of {self.output_bits} bits")
        if not page_bits(self.levels) < self.input_bits <= most:
            raise ValueError(f"input of {self.input_bits} bits")
        if self.format in _WHOLE and self.input_bits != most:
            raise ValueError(f"{self.format.name} of {self.levels} levels translates {most} bits")
        if not 0 <= self.root < 1 << 64 or self.root % (16384 if self.format == TableFormat.RISCV_S2 else 4096):
            raise ValueError(f"root at {self.root:#x}")
