"""Addresses and sizes.

`Span(start, last)` is an address range with an INCLUSIVE last, so that 2**64 - 1 needs no special case.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
#: Granule of guest memory, DMA windows and dirty tracking, in bytes.
PAGE = 4 * KiB
#: Suffixes of a number of bytes.
UNITS = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": 1024 * GiB}

_SIZE = re.compile(r"(0x[0-9a-f_]+|[0-9][0-9_]*)([KMGT]?)", re.IGNORECASE)


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """Addresses `start`..`last`, inclusive; 0 <= start <= last < 2**64."""

    start: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.last < 1 << 64:
            raise ValueError(f"bad span {self.start:#x}..{self.last:#x}")

    @classmethod
    def sized(cls, start: int, size: int) -> Span:
        """The span of `size` >= 1 bytes from `start` on.  ValueError: it would end above 2**64 - 1."""
        return cls(start, start + size - 1)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.last - self.start + 1

    def __contains__(self, address: int) -> bool:
        return self.start <= address <= self.last

    def covers(self, other: Span) -> bool:
        """Whether all addresses of `other` are in this span."""
        return self.start <= other.start and other.last <= self.last

    def overlaps(self, other: Span) -> bool:
        """Whether the two share an address."""
        return self.start <= other.last and other.start <= self.last

    def __str__(self) -> str:
        return f"{self.start:#x}..{self.last:#x}"


def number(value: object) -> int:
    """Parses a number of bytes or an address: 4096, "4K" or "0x4000_0000".  ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('must be a number or text, as 4096, "4K" or "0x4000_0000"')
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        digits = match[1].strip("_") if match else ""
        if match is None or digits.lower() in ("", "0x"):
            raise ValueError('must be a number with K, M, G or T behind it, or 0x before it, as "4K" or "0x4000_0000"')
        value = int(digits, 0 if digits.lower().startswith("0x") else 10) * UNITS[match[2].upper()]
    if not 0 <= value < 1 << 64:
        raise ValueError("must be from 0 to 2**64 - 1")
    return value
