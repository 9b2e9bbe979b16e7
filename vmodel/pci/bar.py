"""Base address registers and what lies behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from vmodel.regs import RegisterBank, RegisterError
from vmodel.span import PAGE, Span

_B = TypeVar("_B", bound=RegisterBank)


@dataclass(frozen=True)
class BankSlot:
    """A register bank at offset `at` of a BAR.  On a device's instance the bank itself takes its place."""

    bar: Bar
    bank: type[RegisterBank]
    at: int

    @property
    def span(self) -> Span:
        """Its bytes, from the BAR's start."""
        return Span.sized(self.at, self.bank.size)


@dataclass(frozen=True)
class RamSlot:
    """Plain memory at offset `at` of a BAR; on a device's instance a writable memoryview takes its place.

    `mappable`: the client may map it, and its accesses then never reach the device.
    """

    bar: Bar
    at: int
    size: int
    mappable: bool

    @property
    def span(self) -> Span:
        """Its bytes, from the BAR's start."""
        return Span.sized(self.at, self.size)


class Bar:
    """One BAR, as a value: what is declared in it is kept by the class that declares it (`device.declare`).

    `fill` is what bytes read as that nothing is behind.
    """

    io: ClassVar[bool]
    least: ClassVar[int]

    def __init__(self, index: int, *, size: int, fill: int = 0xFF) -> None:
        self.index = index
        self.size = size
        self.fill = fill
        self.is_64bit = False
        self.prefetchable = False
        if not 0 <= index <= 5:
            raise RegisterError(f"BAR index {index} is not 0..5")
        if size < self.least or size & (size - 1):
            # QEMU aborts on any other size.
            raise RegisterError(f"BAR{index}: size {size:#x} is no power of two of at least {self.least}")

    def holds(self, what: str, at: int, size: int) -> None:
        """RegisterError when [at, at+size) is not inside the BAR."""
        if at < 0 or size <= 0 or at + size > self.size:
            raise RegisterError(f"BAR{self.index}: {what} at {at:#x}+{size:#x} is outside its {self.size:#x} bytes")

    def bank(self, bank: type[_B], *, at: int = 0) -> _B:
        """A register bank at offset `at`, to be assigned to a name of the class.

        On a device's instance that name is its registers.
        """
        self.holds(bank.__name__, at, bank.size)
        return BankSlot(self, bank, at)  # type: ignore[return-value]

    def ram(self, *, at: int = 0, size: int, mappable: bool = False) -> memoryview:
        """RAM at offset `at`, to be assigned to a name of the class.

        On a device's instance that name is a writable memoryview of it.  `mappable`: the client may map it (sparse
        mmap).  Note that QEMU posts no writes to any BAR of a device that has such an area.
        """
        if mappable and (self.io or (at | size) % PAGE):
            raise RegisterError(f"BAR{self.index}: a mappable area needs a memory BAR and whole pages")
        self.holds("RAM", at, size)
        return RamSlot(self, at, size, mappable)  # type: ignore[return-value]

    @property
    def registers(self) -> int:
        """How many BAR registers it takes."""
        return 2 if self.is_64bit else 1

    def header_bits(self) -> int:
        """The read-only low bits of the register."""
        return 1 if self.io else (4 if self.is_64bit else 0) | (8 if self.prefetchable else 0)

    def address_mask(self) -> int:
        """The writable bits of the register, or of both as 64 bits."""
        width = 64 if self.is_64bit else 32
        return (1 << width) - 1 & ~(self.size - 1) & ~(3 if self.io else 15)


class MmioBar(Bar):
    """A memory BAR; `is_64bit` None means: when it does not fit below 4 GiB."""

    io = False
    least = 16

    def __init__(
        self,
        index: int,
        *,
        size: int,
        is_64bit: bool | None = None,
        prefetchable: bool = False,
        fill: int = 0xFF,
    ) -> None:
        super().__init__(index, size=size, fill=fill)
        self.is_64bit = size > 1 << 31 if is_64bit is None else is_64bit
        self.prefetchable = prefetchable
        if size > 1 << 31 and not self.is_64bit:
            raise RegisterError(f"BAR{index}: {size:#x} bytes need a 64-bit BAR")
        if self.is_64bit and index == 5:
            raise RegisterError("BAR5 cannot be 64-bit: there is no register for its upper half")


class IoBar(Bar):
    """An I/O port BAR, at most 256 ports (PCI 3.0, 6.2.5.1)."""

    io = True
    least = 4

    def __init__(self, index: int, *, size: int, fill: int = 0xFF) -> None:
        super().__init__(index, size=size, fill=fill)
        if size > 256:
            raise RegisterError(f"BAR{index}: an I/O BAR has at most 256 ports, not {size}")
