"""placeholder until the helper's"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class TableFormat(enum.IntEnum):
    VTD_SECOND = 0
    X86 = 1
    AMD_V1 = 2
    ARM_S1 = 3
    ARM_S2 = 4


class TableFlags(enum.IntFlag):
    NONE = 0
    SET_ACCESSED = 1
    SET_DIRTY = 2
    SUPERVISOR = 4
    PAGES_2M = 8
    PAGES_1G = 16
    SNOOP = 32


@dataclass(frozen=True)
class Table:
    format: TableFormat
    levels: int
    root: int
    input_bits: int
    output_bits: int
    flags: TableFlags = TableFlags.NONE
