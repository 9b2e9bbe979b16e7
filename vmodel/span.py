"""`Span(start, last)`: an address range with an INCLUSIVE last, so that 2**64 - 1 needs no special case."""

from __future__ import annotations

from dataclasses import dataclass

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
#: Granule of guest memory, DMA windows and dirty tracking, in bytes.
PAGE = 4 * KiB


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """Addresses `start`..`last`, both inside, 0 <= start <= last < 2**64."""

    start: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.last < 1 << 64:
            raise ValueError(f"bad span {self.start:#x}..{self.last:#x}")

    @classmethod
    def sized(cls, start: int, size: int) -> Span:
        """The span of `size` >= 1 bytes from `start` on; ValueError when it wraps."""
        return cls(start, start + size - 1)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.last - self.start + 1

    def __contains__(self, address: int) -> bool:
        return self.start <= address <= self.last

    def covers(self, other: Span) -> bool:
        """Whether `other` lies wholly inside."""
        return self.start <= other.start and other.last <= self.last

    def overlaps(self, other: Span) -> bool:
        """Whether the two share an address."""
        return self.start <= other.last and other.start <= self.last

    def __str__(self) -> str:
        return f"{self.start:#x}..{self.last:#x}"
