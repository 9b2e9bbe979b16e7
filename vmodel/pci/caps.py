"""Capabilities in the first 256 bytes of config space: PM, MSI, MSI-X, vendor-specific; PCI Express is in `express`.

A capability is declared on the device's class and bound to each instance.  Its registers are a bank in config space;
`written()` runs after the guest has written one of the registers in `hooked`.
"""

from __future__ import annotations

import copy
import enum
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, cast, overload

from vmodel.pci.bar import Bar, MmioBar
from vmodel.pci.irq import Irqs, IrqType, Vector
from vmodel.regs import RO, RW, W1C, Bit, Bits, Layout, Reg8, Reg16, Reg32, Register, RegisterBank, RegisterError
from vmodel.span import Span
from vmodel.vfio_user.wire import Irq

_R = TypeVar("_R", bound=RegisterBank)


class ResetKind(enum.Enum):
    """What has reset a function."""

    #: Function Level Reset, requested in PCI Express Device Control.
    FUNCTION = "FLR"
    #: The transition from D3hot to D0 without No_Soft_Reset.
    POWER = "D3hot to D0"
    #: VFIO_USER_DEVICE_RESET, which the client sends when the machine is reset.
    DEVICE = "DEVICE_RESET"


class CapabilityOwner(Protocol):
    """What a capability needs of its device."""

    irqs: Irqs

    def reset(self, kind: ResetKind) -> None:
        """Resets the function."""

    def update_enables(self) -> None:
        """Applies a change of the Command register or the power state."""

    def update_interrupts(self) -> None:
        """Updates which interrupt types may be signalled, after a change of Command, power state or MSI(-X) enable."""

    def detected(self, errors: int) -> None:
        """Errors for PCI Express Device Status, by its bits."""

    def config_written(self) -> None:
        """Called last after a config space write that exits: all its side effects have been applied."""

    def region_read(self, region: int, offset: int, count: int) -> int | bytes:
        """Reads as the guest does: an int, or bytes when count > 8."""

    def region_write(self, region: int, offset: int, count: int, value: int | bytes) -> None:
        """Writes as the guest does."""


class Capability:
    """Base of all capabilities, standard and extended."""

    id: ClassVar[int]
    bank: type[RegisterBank]
    #: Registers whose writes call `written()`.
    hooked: tuple[Register, ...] = ()
    #: Registers before whose reads `reading()` is called.
    read_hooked: tuple[Register, ...] = ()
    name = "?"

    owner: CapabilityOwner
    regs: RegisterBank

    def __set_name__(self, cls: type, name: str) -> None:
        self.name = name

    def bind(self, owner: CapabilityOwner, view: memoryview) -> Self:
        """A copy of the capability for one device, with its registers in `view`."""
        bound = copy.copy(self)
        bound.owner = owner
        bound.regs = bound.bank(view)
        bound.regs.load_reset(everything=True)
        bound.bound()
        return bound

    def bound(self) -> None:
        """Sets up the state of an instance; `owner` and `regs` are set."""

    def reset(self, kind: ResetKind) -> None:
        """Stores the reset values; the config space itself writes id and next pointer."""
        self.regs.load_reset()
        self.fill()

    def fill(self) -> None:
        """Stores the read-only values that depend on parameters."""

    def written(self) -> None:
        """Called after a write of a register in `hooked`."""

    def reading(self) -> None:
        """Called before a read of a register in `read_hooked`."""

    def restored(self) -> None:
        """Called after the registers were loaded from a saved state."""


# ---- Power Management (PCI Bus Power Management 1.2, 3.2) -----------------------------------------


class Pmcsr(Layout):
    """Power Management Control/Status."""

    POWER_STATE = Bits(0, 1, RW)
    NO_SOFT_RESET = Bit(3, RO)
    PME_ENABLE = Bit(8, RW)
    PME_STATUS = Bit(15, W1C)


class PmRegs(RegisterBank, size=8):
    """PM capability."""

    PMC = Reg16(2, RO, reset=0x0003, doc="version 1.2, no D1, no D2, no PME")
    PMCSR = Reg16(4, RO, layout=Pmcsr)


class Pm(Capability):
    """Power management: D0 and D3hot.  Without `no_soft_reset`, the return to D0 resets the function."""

    id = 0x01
    bank = PmRegs
    hooked = (PmRegs.PMCSR,)
    regs: PmRegs

    def __init__(self, *, no_soft_reset: bool = False) -> None:
        self.no_soft_reset = no_soft_reset
        self.state = 0

    def fill(self) -> None:
        self.state = 0
        self.regs.PMCSR = Pmcsr.NO_SOFT_RESET.put(0, int(self.no_soft_reset))

    def written(self) -> None:
        value = self.regs.PMCSR
        state = Pmcsr(value).POWER_STATE
        if state in (1, 2):  # D1 and D2 are not supported: the write of the field is ignored (3.2.4)
            self.regs.PMCSR = Pmcsr.POWER_STATE.put(value, self.state)
            return
        before, self.state = self.state, state
        if before == 3 and state == 0 and not self.no_soft_reset:
            self.owner.reset(ResetKind.POWER)
        self.owner.update_enables()

    def restored(self) -> None:
        self.state = Pmcsr(self.regs.PMCSR).POWER_STATE


# ---- interrupts in general -----------------------------------------------------------------------


class _MessageInterrupts(Capability):
    """What MSI and MSI-X share: a vector that may not be signalled stays pending (PCIe 5.0, 6.1.4).

    A message is a memory write, so it needs Command.BusMaster and D0 as well (7.5.1.1.3, 5.3.1.4).
    """

    irq: ClassVar[Irq]
    vectors: int
    _type: IrqType

    def bound(self) -> None:
        self._type = self.owner.irqs.types[self.irq]
        self._type.vectors = [Vector() for _ in range(self.vectors)]
        self._type.changed = self._deliver

    @property
    def enabled(self) -> bool:
        """Whether the guest has enabled the capability; if not, the device uses INTx."""
        raise NotImplementedError

    @property
    def allocated(self) -> int:
        """How many of `vectors` the guest has allocated, from vector 0 on."""
        return self.vectors

    def _masked(self, n: int) -> bool:
        raise NotImplementedError

    def _store_pending(self, n: int, pending: bool) -> None:
        """Stores a vector's pending bit in the guest-visible register, if there is one."""

    def fire(self, n: int = 0) -> None:
        """Raises vector `n`; does nothing while the capability is disabled.

        The vector stays pending while it is masked, is not allocated (MSI's Multiple Message Enable) or has no
        eventfd, and while bus mastering is off or the function is in D3hot.  ValueError: there is no such vector.
        """
        if not 0 <= n < self.vectors:
            raise ValueError(f"{type(self).__name__} has no vector {n}: it has 0 to {self.vectors - 1}")
        tap = self.owner.irqs.tap
        if tap is None:
            self.fire_untapped(n)
        else:
            tap(self.fire_untapped, self.irq.name.lower(), n)

    def fire_untapped(self, n: int) -> None:
        """Raises vector `n` without passing the tap of an experiment."""
        kind = self._type
        vector = kind.vectors[n]
        if not (vector.pending or vector.masked or self._masked(n)) and self.owner.irqs.signal(kind, vector):
            return  # signalled at once: the pending bit was never set
        if self.enabled:
            vector.pending = True
            self._store_pending(n, True)

    def pending(self, n: int = 0) -> bool:
        """Whether vector `n` was raised and has not been signalled yet."""
        return self._type.vectors[n].pending

    def withdraw(self, n: int = 0) -> None:
        """Clears vector `n`'s pending bit, as the cause of the interrupt is gone (PCIe 5.0, 6.1.4.5).

        Otherwise the driver would get a spurious interrupt when it unmasks the vector.
        """
        self._type.vectors[n].pending = False
        self._store_pending(n, False)

    def _deliver(self, n: int) -> None:
        vector = self._type.vectors[n]
        if not (vector.pending and not vector.masked and not self._masked(n)):
            return
        if self.owner.irqs.signal(self._type, vector):
            self.withdraw(n)

    def written(self) -> None:
        self.owner.update_interrupts()
        for n in range(self.vectors):
            self._deliver(n)

    def reset(self, kind: ResetKind) -> None:
        super().reset(kind)
        for vector in self._type.vectors:
            vector.pending = False

    def restored(self) -> None:
        for n, vector in enumerate(self._type.vectors):
            self._store_pending(n, vector.pending)


# ---- MSI (PCI 3.0, 6.8.1) ------------------------------------------------------------------------


class MsiControl(Layout):
    """Message Control."""

    ENABLE = Bit(0, RW)
    CAPABLE = Bits(1, 3, RO)
    MULTIPLE = Bits(4, 6, RW)
    ADDRESS_64 = Bit(7, RO)
    PER_VECTOR_MASK = Bit(8, RO)


class MsiAddress(Layout):
    """Message Address: of a doubleword (PCIe 5.0, 7.7.1.3)."""

    ADDRESS = Bits(2, 31, RW)


class MsiRegs32(RegisterBank, size=12):
    """MSI capability with 32-bit addresses."""

    CONTROL = Reg16(2, RO, layout=MsiControl)
    ADDRESS = Reg32(4, RO, layout=MsiAddress)
    DATA = Reg16(8)


class MsiRegs64(RegisterBank, size=16):
    """MSI capability with 64-bit addresses."""

    CONTROL = Reg16(2, RO, layout=MsiControl)
    ADDRESS = Reg32(4, RO, layout=MsiAddress)
    ADDRESS_HIGH = Reg32(8)
    DATA = Reg16(12)


class MsiRegs32Mask(RegisterBank, size=20):
    """MSI capability with 32-bit addresses and per-vector masks."""

    CONTROL = Reg16(2, RO, layout=MsiControl)
    ADDRESS = Reg32(4, RO, layout=MsiAddress)
    DATA = Reg16(8)
    MASK = Reg32(12)
    PENDING = Reg32(16, RO)


class MsiRegs64Mask(RegisterBank, size=24):
    """MSI capability with 64-bit addresses and per-vector masks."""

    CONTROL = Reg16(2, RO, layout=MsiControl)
    ADDRESS = Reg32(4, RO, layout=MsiAddress)
    ADDRESS_HIGH = Reg32(8)
    DATA = Reg16(12)
    MASK = Reg32(16)
    PENDING = Reg32(20, RO)


MsiRegs = MsiRegs32 | MsiRegs64 | MsiRegs32Mask | MsiRegs64Mask


class Msi(_MessageInterrupts):
    """Message signalled interrupts, 1 to 32 vectors."""

    id = 0x05
    irq = Irq.MSI
    regs: MsiRegs

    def __init__(self, *, vectors: int = 1, address_64: bool = True, per_vector_mask: bool = False) -> None:
        if vectors not in (1, 2, 4, 8, 16, 32):
            raise RegisterError(f"MSI has 1, 2, 4, 8, 16 or 32 vectors, not {vectors}")
        self.vectors = vectors
        self.address_64 = address_64
        self.per_vector_mask = per_vector_mask
        bank: type[MsiRegs]
        if per_vector_mask:
            bank = MsiRegs64Mask if address_64 else MsiRegs32Mask
            self.hooked = (bank.CONTROL, bank.MASK)
        else:
            bank = MsiRegs64 if address_64 else MsiRegs32
            self.hooked = (bank.CONTROL,)
        self.bank = bank

    def fill(self) -> None:
        control = MsiControl.CAPABLE.put(0, self.vectors.bit_length() - 1)
        control = MsiControl.ADDRESS_64.put(control, int(self.address_64))
        self.regs.CONTROL = MsiControl.PER_VECTOR_MASK.put(control, int(self.per_vector_mask))

    @property
    def enabled(self) -> bool:
        return bool(MsiControl(self.regs.CONTROL).ENABLE)

    @property
    def allocated(self) -> int:
        """The vectors that Multiple Message Enable allows."""
        return min(1 << MsiControl(self.regs.CONTROL).MULTIPLE, self.vectors)

    def written(self) -> None:
        regs = self.regs
        if isinstance(regs, MsiRegs32Mask | MsiRegs64Mask):
            regs.MASK &= (1 << self.vectors) - 1  # those of vectors that are not there are reserved
        super().written()

    def _masked(self, n: int) -> bool:
        regs = self.regs
        if n >= self.allocated:
            return True
        return isinstance(regs, MsiRegs32Mask | MsiRegs64Mask) and bool(regs.MASK >> n & 1)

    def _store_pending(self, n: int, pending: bool) -> None:
        regs = self.regs
        if isinstance(regs, MsiRegs32Mask | MsiRegs64Mask):
            regs.PENDING = regs.PENDING & ~(1 << n) | pending << n


# ---- MSI-X (PCI 3.0, 6.8.2) ----------------------------------------------------------------------


class MsixControl(Layout):
    """Message Control."""

    TABLE_SIZE = Bits(0, 10, RO)
    FUNCTION_MASK = Bit(14, RW)
    ENABLE = Bit(15, RW)


_MSIX_ENABLE, _MSIX_FUNCTION_MASK = MsixControl.ENABLE.mask, MsixControl.FUNCTION_MASK.mask


class MsixRegs(RegisterBank, size=12):
    """MSI-X capability."""

    CONTROL = Reg16(2, RO, layout=MsixControl)
    TABLE = Reg32(4, RO, doc="offset, and the BAR in bits 0..2")
    PBA = Reg32(8, RO, doc="offset, and the BAR in bits 0..2")


class Msix(_MessageInterrupts):
    """MSI-X with 1 to 2048 `vectors`; table and pending bit array (PBA) are in `bar` at the given offsets.

    `pba_offset` None: the first page after the table.  `bar` None: MSI-X gets its own BAR with index `own_bar`.
    """

    id = 0x11
    irq = Irq.MSIX
    bank = MsixRegs
    hooked = (MsixRegs.CONTROL,)
    regs: MsixRegs

    def __init__(
        self,
        *,
        vectors: int,
        bar: Bar | None = None,
        table_offset: int = 0,
        pba_offset: int | None = None,
        own_bar: int = 4,
    ) -> None:
        if not 1 <= vectors <= 2048:
            raise RegisterError(f"MSI-X has 1 to 2048 vectors, not {vectors}")
        self.vectors = vectors
        table, pba = vectors * 16, (vectors + 63) // 64 * 8
        self.table_offset = table_offset
        self.pba_offset = -(-(table_offset + table) // 4096) * 4096 if pba_offset is None else pba_offset
        self.owns_bar = bar is None
        if bar is None:
            end = max(table_offset + table, self.pba_offset + pba)
            bar = MmioBar(own_bar, size=max(4096, 1 << (end - 1).bit_length()))
        if bar.io:
            raise RegisterError("the MSI-X table cannot be in an I/O BAR")
        if self.table_offset % 8 or self.pba_offset % 8:
            raise RegisterError("MSI-X table and PBA are 8-byte aligned")
        bar.holds("the MSI-X table", self.table_offset, table)
        bar.holds("the MSI-X PBA", self.pba_offset, pba)
        if Span.sized(self.table_offset, table).overlaps(Span.sized(self.pba_offset, pba)):
            raise RegisterError("the MSI-X PBA overlaps the table")
        self.bar = bar
        self.table_size, self.pba_size = table, pba
        #: The pending bits; `VfioBackend` replaces this by the bytes in the BAR.
        self.pba = memoryview(b"")

    def bound(self) -> None:
        super().bound()
        #: The table, then a byte that is 1 once the client has written the table.  Only then its mask bits count:
        #: QEMU never writes it, as it emulates the guest's table itself.
        self.store = memoryview(bytearray(self.table_size + 1))
        self.table, self._used = self.store[:-1], self.store[-1:]

    def fill(self) -> None:
        self.regs.CONTROL = self.vectors - 1
        self.regs.TABLE = self.table_offset | self.bar.index
        self.regs.PBA = self.pba_offset | self.bar.index
        for n in range(self.vectors):
            self.table[16 * n : 16 * n + 16] = bytes(12) + b"\x01\0\0\0"  # masked
        self.pba[:] = bytes(self.pba_size)
        self._used[0] = 0

    @property
    def enabled(self) -> bool:
        return bool(self.regs.CONTROL & _MSIX_ENABLE)

    def _masked(self, n: int) -> bool:
        if self.regs.CONTROL & _MSIX_FUNCTION_MASK:
            return True
        return bool(self._used[0]) and bool(self.table[16 * n + 12] & 1)

    def _store_pending(self, n: int, pending: bool) -> None:
        self.pba[n // 8] = self.pba[n // 8] & ~(1 << n % 8) | pending << n % 8

    def table_read(self, offset: int, count: int) -> bytes:
        """Reads `count` bytes of the table, `offset` from its start."""
        return bytes(self.table[offset : offset + count])

    def table_write(self, offset: int, data: bytes) -> None:
        """Writes the table, `offset` from its start; the reserved bits of Vector Control stay 0."""
        self._used[0] = 1
        for at, byte in enumerate(data, offset):
            self.table[at] = byte & 1 if at % 16 == 12 else 0 if at % 16 > 12 else byte
        for n in range(offset // 16, (offset + len(data) - 1) // 16 + 1):
            self._deliver(n)


# ---- vendor-specific (PCI 3.0, appendix H) -------------------------------------------------------


class VendorSpecific(Capability, Generic[_R]):
    """A capability of the model's own: a register bank, or plain bytes.

    ```python
    class CardCap(RegisterBank, size=8):
        VERSION = Reg8(3, RO, reset=1)
        QUOTA = Reg16(4)

    cap = VendorSpecific(CardCap)             # in the model: self.cap.regs.QUOTA, @on_write(CardCap.QUOTA)
    ```

    The bank covers the whole capability: its registers begin at offset 3, after id, next pointer and length, which
    are filled in.  Bytes follow those three, read-only unless `writable`.
    """

    id = 0x09
    bank: type[_R]
    regs: _R

    @overload
    def __init__(self: VendorSpecific[RegisterBank], content: bytes, *, writable: bool = False) -> None: ...
    @overload
    def __init__(self, content: type[_R]) -> None: ...
    def __init__(self, content: bytes | type[Any], *, writable: bool = False) -> None:
        """RegisterError: more than 200 bytes, or none; registers of the bank where the first three bytes are."""
        self.data = content if isinstance(content, bytes) else b""
        if isinstance(content, bytes):
            if not 1 <= len(content) <= 200:
                raise RegisterError(f"a vendor-specific capability holds 1 to 200 bytes, not {len(content)}")
            names = {f"BYTE{n}": Reg8(3 + n, *(() if writable else (RO,))) for n in range(len(content))}
            # A bank made on the spot: its size is known only here.
            size = -(-(3 + len(content)) // 4) * 4
            content = cast(type[Any], type("VendorSpecificRegs", (RegisterBank,), names, size=size))
        elif content.size > 203 or any(register.offset < 3 for register in content.registers):
            raise RegisterError(
                f"{content.__name__}: a vendor-specific capability has at most 203 bytes, registers from offset 3 on"
            )
        self.bank = content

    def fill(self) -> None:
        self.regs.view[2] = 3 + len(self.data) if self.data else self.bank.size
        self.regs.view[3 : 3 + len(self.data)] = self.data
