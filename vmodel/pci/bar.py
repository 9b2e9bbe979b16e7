"""Base address registers, and the register banks and RAM areas in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from vmodel.regs import RegisterBank, RegisterError
from vmodel.span import PAGE, Span

_B = TypeVar("_B", bound=RegisterBank)


@dataclass(frozen=True)
class BankSlot:
    """Declares a register bank at offset `at` of a BAR.  A device's instance has the bank itself in its place."""

    bar: Bar
    bank: type[RegisterBank]
    at: int

    @property
    def span(self) -> Span:
        """The bank's bytes, as offsets in the BAR."""
        return Span.sized(self.at, self.bank.size)


@dataclass(frozen=True)
class RamSlot:
    """Declares plain memory at offset `at` of a BAR.  A device's instance has a writable memoryview in its place.

    `mappable`: the client may map the area; the device does not see accesses through that mapping.
    """

    bar: Bar
    at: int
    size: int
    mappable: bool

    @property
    def span(self) -> Span:
        """The area's bytes, as offsets in the BAR."""
        return Span.sized(self.at, self.size)


class Bar:
    """One BAR, as a value: its banks and RAM areas are kept by the declaring class (`device.declare`).

    `index` 0 to 5; `size` in bytes, a power of two; `fill`: the value of bytes that no bank or RAM area covers.
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
        """Checks that [at, at+size) is inside the BAR.  RegisterError, whose text begins with `what`."""
        if at < 0 or size <= 0 or at + size > self.size:
            raise RegisterError(f"BAR{self.index}: {what} at {at:#x}+{size:#x} is outside its {self.size:#x} bytes")

    def bank(self, bank: type[_B], *, at: int = 0) -> _B:
        """Declares a register bank at offset `at`; assign the result to an attribute of the class.

        On an instance, that attribute is the device's own `bank`.  RegisterError: the bank does not fit the BAR.
        """
        self.holds(bank.__name__, at, bank.size)
        return BankSlot(self, bank, at)  # type: ignore[return-value]

    def ram(self, *, at: int = 0, size: int, mappable: bool = False) -> memoryview:
        """Declares `size` bytes of RAM at offset `at`; assign the result to an attribute of the class.

        On an instance, that attribute is a writable memoryview of the RAM.  `mappable`: the client may map the area
        (sparse mmap).  QEMU posts no writes to any BAR of a device that has a mappable area.  RegisterError: the area
        does not fit the BAR, or is mappable and not in whole pages.
        """
        if mappable and (self.io or (at | size) % PAGE):
            raise RegisterError(f"BAR{self.index}: a mappable area needs a memory BAR and whole pages")
        self.holds("RAM", at, size)
        return RamSlot(self, at, size, mappable)  # type: ignore[return-value]

    @property
    def registers(self) -> int:
        """BAR registers that this BAR occupies: 1, or 2 when it is 64-bit."""
        return 2 if self.is_64bit else 1

    def header_bits(self) -> int:
        """The read-only low bits of the register."""
        return 1 if self.io else (4 if self.is_64bit else 0) | (8 if self.prefetchable else 0)

    def address_mask(self) -> int:
        """The writable bits of the register, or of both as 64 bits."""
        width = 64 if self.is_64bit else 32
        return (1 << width) - 1 & ~(self.size - 1) & ~(3 if self.io else 15)


class MmioBar(Bar):
    """A memory BAR; `is_64bit` None: 64-bit only if `size` is more than 2 GiB (PCI 3.0, 6.2.5.1)."""

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
