"""Base address registers and what lies behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from vmodel.regs import RegisterBank, RegisterError
from vmodel.span import PAGE, Span

_B = TypeVar("_B", bound=RegisterBank)


@dataclass(frozen=True)
class BankAt:
    """A register bank inside a BAR."""

    bank: type[RegisterBank]
    at: int


@dataclass(frozen=True)
class Ram:
    """Plain memory inside a BAR; `mappable` by the client, whose accesses then never reach the device."""

    at: int
    size: int
    mappable: bool


class BankSlot:
    """Where a device finds its bank: declared on the class, replaced on the instance by the bank itself."""

    def __init__(self, bar: Bar, bank: type[RegisterBank]) -> None:
        self.bar = bar
        self.bank = bank


class RamSlot:
    """Likewise for RAM: replaced on the instance by a writable memoryview."""

    def __init__(self, bar: Bar, ram: Ram) -> None:
        self.bar = bar
        self.ram = ram


class Bar:
    """One BAR.  `fill` is what bytes read as that nothing is behind."""

    io: ClassVar[bool]
    least: ClassVar[int]

    def __init__(self, index: int, *, size: int, fill: int = 0xFF) -> None:
        self.index = index
        self.size = size
        self.fill = fill
        self.is_64bit = False
        self.prefetchable = False
        self.banks: list[BankAt] = []
        self.rams: list[Ram] = []
        self._taken: list[Span] = []
        if not 0 <= index <= 5:
            raise RegisterError(f"BAR index {index} is not 0..5")
        if size < self.least or size & (size - 1):
            # QEMU aborts on any other size.
            raise RegisterError(f"BAR{index}: size {size:#x} is no power of two of at least {self.least}")

    def reserve(self, what: str, at: int, size: int) -> None:
        """Takes [at, at+size); RegisterError when it is outside the BAR or taken already."""
        if at < 0 or size <= 0 or at + size > self.size:
            raise RegisterError(f"BAR{self.index}: {what} at {at:#x}+{size:#x} is outside its {self.size:#x} bytes")
        span = Span.sized(at, size)
        if any(span.overlaps(other) for other in self._taken):
            raise RegisterError(f"BAR{self.index}: {what} at {at:#x}+{size:#x} overlaps what is there")
        self._taken.append(span)

    def bank(self, bank: type[_B], *, at: int = 0) -> _B:
        """Puts a register bank at offset `at`.  On a device's instance the result is its registers."""
        self.reserve(bank.__name__, at, bank.size)
        self.banks.append(BankAt(bank, at))
        return BankSlot(self, bank)  # type: ignore[return-value]

    def ram(self, *, at: int = 0, size: int, mappable: bool = False) -> memoryview:
        """Puts RAM at offset `at`.  On a device's instance the result is a writable memoryview of it.

        `mappable`: the client may map it (sparse mmap).  Note that QEMU posts no writes to any BAR of a device
        that has such an area.
        """
        if mappable and (self.io or (at | size) % PAGE):
            raise RegisterError(f"BAR{self.index}: a mappable area needs a memory BAR and whole pages")
        self.reserve("RAM", at, size)
        ram = Ram(at, size, mappable)
        self.rams.append(ram)
        return RamSlot(self, ram)  # type: ignore[return-value]

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
