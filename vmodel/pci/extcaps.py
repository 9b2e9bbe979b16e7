"""Extended capabilities, from offset 0x100 of config space on (PCIe 5.0, 7.8 and 7.9).

Each begins with 4 bytes of id, version and next pointer, which `ConfigSpace` writes.
"""

from __future__ import annotations

from typing import ClassVar

from vmodel.pci.caps import Capability
from vmodel.pci.express import DevSta
from vmodel.regs import RO, RW, W1C, Bit, Bits, Layout, Reg16, Reg32, RegisterBank, RegisterError


class ExtendedCapability(Capability):
    """Base of the extended capabilities."""

    version: ClassVar[int] = 1


# ---- Advanced Error Reporting (7.8.4) -------------------------------------------------------------


class Uncorrectable(Layout):
    """Uncorrectable errors; the same bits in status, mask and severity."""

    DATA_LINK = Bit(4)
    SURPRISE_DOWN = Bit(5)
    POISONED_TLP = Bit(12)
    FLOW_CONTROL = Bit(13)
    COMPLETION_TIMEOUT = Bit(14)
    COMPLETER_ABORT = Bit(15)
    UNEXPECTED_COMPLETION = Bit(16)
    RECEIVER_OVERFLOW = Bit(17)
    MALFORMED_TLP = Bit(18)
    ECRC = Bit(19)
    UNSUPPORTED_REQUEST = Bit(20)


class Correctable(Layout):
    """Correctable errors."""

    RECEIVER = Bit(0)
    BAD_TLP = Bit(6)
    BAD_DLLP = Bit(7)
    REPLAY_ROLLOVER = Bit(8)
    REPLAY_TIMER = Bit(12)
    ADVISORY_NON_FATAL = Bit(13)


def _all(layout: type[Layout]) -> int:
    return sum(field.mask for field in layout.fields)


class UncorrectableStatus(Layout):
    """Uncorrectable error status: exactly the bits of `Uncorrectable`, each cleared by writing 1."""

    LOW = Bits(4, 5, W1C)
    HIGH = Bits(12, 20, W1C)


class UncorrectableSet(Layout):
    """Uncorrectable error mask and severity: exactly the bits of `Uncorrectable`, writable."""

    LOW = Bits(4, 5, RW)
    HIGH = Bits(12, 20, RW)


class CorrectableStatus(Layout):
    """Correctable error status: exactly the bits of `Correctable`, each cleared by writing 1."""

    RECEIVER = Bit(0, W1C)
    MIDDLE = Bits(6, 8, W1C)
    HIGH = Bits(12, 13, W1C)


class CorrectableSet(Layout):
    """Correctable error mask: exactly the bits of `Correctable`, writable."""

    RECEIVER = Bit(0, RW)
    MIDDLE = Bits(6, 8, RW)
    HIGH = Bits(12, 13, RW)


class AerRegs(RegisterBank, size=0x2C):
    """Advanced Error Reporting.  Status and log survive a reset, as sticky registers do."""

    UNCORRECTABLE = Reg32(0x04, RO, layout=UncorrectableStatus, sticky=True)
    UNCORRECTABLE_MASK = Reg32(0x08, RO, layout=UncorrectableSet, sticky=True)
    SEVERITY = Reg32(0x0C, RO, layout=UncorrectableSet, reset=0x0046_2030 & 0x001F_F030, sticky=True)
    CORRECTABLE = Reg32(0x10, RO, layout=CorrectableStatus, sticky=True)
    CORRECTABLE_MASK = Reg32(0x14, RO, layout=CorrectableSet, reset=1 << 13, sticky=True)
    CONTROL = Reg32(0x18, RO, doc="first error pointer", sticky=True)
    LOG0 = Reg32(0x1C, RO, sticky=True)
    LOG1 = Reg32(0x20, RO, sticky=True)
    LOG2 = Reg32(0x24, RO, sticky=True)
    LOG3 = Reg32(0x28, RO, sticky=True)


class Aer(ExtendedCapability):
    """Advanced Error Reporting: a model sets the status with `report`.

    vfio-user has no error messages, so nothing is sent to the root complex.
    """

    id = 0x0001
    version = 2
    bank = AerRegs
    regs: AerRegs

    def report(self, *, uncorrectable: int = 0, correctable: int = 0, header: tuple[int, ...] = ()) -> None:
        """Sets bits of the status registers, as in `Uncorrectable` and `Correctable`, and of Device Status.

        The first unmasked uncorrectable error also sets the first error pointer and logs `header`, four 32-bit words
        of a TLP; the log keeps it until its status bit is cleared (6.2.4.2).  A masked error sets its status bit only
        (6.2.3.2.2).
        """
        regs = self.regs
        uncorrectable &= _all(Uncorrectable)
        correctable &= _all(Correctable)
        fresh = uncorrectable & ~regs.UNCORRECTABLE_MASK
        if fresh and not regs.UNCORRECTABLE >> (regs.CONTROL & 0x1F) & 1:
            regs.CONTROL = regs.CONTROL & ~0x1F | (fresh & -fresh).bit_length() - 1
            regs.LOG0, regs.LOG1, regs.LOG2, regs.LOG3 = (*header, 0, 0, 0, 0)[:4]
        regs.UNCORRECTABLE |= uncorrectable
        regs.CORRECTABLE |= correctable
        fatal = uncorrectable & regs.SEVERITY
        status = DevSta.CORRECTABLE.put(0, int(correctable != 0))
        status = DevSta.NON_FATAL.put(status, int(uncorrectable != fatal))
        status = DevSta.FATAL.put(status, int(fatal != 0))
        self.owner.detected(DevSta.UNSUPPORTED.put(status, Uncorrectable.UNSUPPORTED_REQUEST.of(uncorrectable)))


# ---- Device Serial Number (7.9.3) -----------------------------------------------------------------


class DsnRegs(RegisterBank, size=12):
    """Device Serial Number."""

    LOW = Reg32(4, RO)
    HIGH = Reg32(8, RO)


class Dsn(ExtendedCapability):
    """Device Serial Number; `serial` is an EUI-64."""

    id = 0x0003
    bank = DsnRegs
    regs: DsnRegs

    def __init__(self, serial: int) -> None:
        if not 0 <= serial < 1 << 64:
            raise RegisterError(f"serial number {serial:#x} is wider than 64 bits")
        self.serial = serial

    def fill(self) -> None:
        self.regs.LOW, self.regs.HIGH = self.serial & 0xFFFF_FFFF, self.serial >> 32


# ---- Access Control Services (7.7.8) --------------------------------------------------------------


class AcsBits(Layout):
    """ACS Control of an endpoint: the other bits are of ports (7.7.8.2).  The bits of ACS Capability are the same."""

    REQUEST_REDIRECT = Bit(2, RW)
    COMPLETION_REDIRECT = Bit(3, RW)
    DIRECT_TRANSLATED = Bit(6, RW)


class AcsRegs(RegisterBank, size=8):
    """Access Control Services."""

    CAPABILITY = Reg16(4, RO)
    CONTROL = Reg16(6, RO, layout=AcsBits)


class Acs(ExtendedCapability):
    """Access Control Services; `capability`: the supported controls, as bits of AcsBits, without egress control."""

    id = 0x000D
    bank = AcsRegs
    hooked = (AcsRegs.CONTROL,)
    regs: AcsRegs

    def __init__(self, capability: int = 0x4C) -> None:
        if capability & ~_all(AcsBits):
            raise RegisterError(f"ACS capability {capability:#x}: bits of an endpoint are 0x4c (no egress control)")
        self.capability = capability

    def fill(self) -> None:
        self.regs.CAPABILITY = self.capability

    def written(self) -> None:
        self.regs.CONTROL &= self.capability


# ---- Address Translation Services (10.5.1) --------------------------------------------------------


class AtsCap(Layout):
    """ATS Capability."""

    QUEUE_DEPTH = Bits(0, 4)
    PAGE_ALIGNED = Bit(5)
    GLOBAL_INVALIDATE = Bit(6)


class AtsCtl(Layout):
    """ATS Control."""

    SMALLEST_UNIT = Bits(0, 4, RW)
    ENABLE = Bit(15, RW)


class AtsRegs(RegisterBank, size=8):
    """Address Translation Services."""

    CAPABILITY = Reg16(4, RO, layout=AtsCap)
    CONTROL = Reg16(6, RO, layout=AtsCtl)


class Ats(ExtendedCapability):
    """Address Translation Services; `queue_depth`: outstanding invalidations that the function accepts, 1 to 32."""

    id = 0x000F
    bank = AtsRegs
    regs: AtsRegs

    def __init__(self, *, queue_depth: int = 32) -> None:
        if not 1 <= queue_depth <= 32:
            raise RegisterError(f"an ATS invalidate queue is 1 to 32 deep, not {queue_depth}")
        self.queue_depth = queue_depth

    def fill(self) -> None:
        self.regs.CAPABILITY = AtsCap.PAGE_ALIGNED.mask | self.queue_depth % 32

    @property
    def enabled(self) -> bool:
        """Whether the guest has enabled ATS."""
        return bool(AtsCtl(self.regs.CONTROL).ENABLE)


# ---- PASID (7.8.8) --------------------------------------------------------------------------------


class PasidCap(Layout):
    """PASID Capability."""

    EXECUTE = Bit(1)
    PRIVILEGED = Bit(2)
    WIDTH = Bits(8, 12)


class PasidCtl(Layout):
    """PASID Control."""

    ENABLE = Bit(0, RW)
    EXECUTE = Bit(1, RW)
    PRIVILEGED = Bit(2, RW)


class PasidRegs(RegisterBank, size=8):
    """Process Address Space ID."""

    CAPABILITY = Reg16(4, RO, layout=PasidCap)
    CONTROL = Reg16(6, RO, layout=PasidCtl)


class Pasid(ExtendedCapability):
    """PASID capability; `width`: bits of a PASID, 1 to 20."""

    id = 0x001B
    bank = PasidRegs
    hooked = (PasidRegs.CONTROL,)
    regs: PasidRegs

    def __init__(self, *, width: int = 20, execute: bool = False, privileged: bool = False) -> None:
        if not 1 <= width <= 20:
            raise RegisterError(f"a PASID has 1 to 20 bits, not {width}")
        self.width = width
        self.capability = width << 8 | execute << 1 | privileged << 2

    def fill(self) -> None:
        self.regs.CAPABILITY = self.capability

    def written(self) -> None:
        self.regs.CONTROL &= 1 | self.capability & 6

    @property
    def enabled(self) -> bool:
        """Whether the guest has enabled PASIDs."""
        return bool(PasidCtl(self.regs.CONTROL).ENABLE)


# ---- Page Request Interface (10.5.2) --------------------------------------------------------------


class PriCtl(Layout):
    """Page Request Control."""

    ENABLE = Bit(0, RW)
    RESET = Bit(1, RW)


class PriSta(Layout):
    """Page Request Status."""

    RESPONSE_FAILURE = Bit(0, W1C)
    UNEXPECTED_INDEX = Bit(1, W1C)
    STOPPED = Bit(8)
    PASID_REQUIRED = Bit(15)


class PriRegs(RegisterBank, size=16):
    """Page Request Interface."""

    CONTROL = Reg16(4, RO, layout=PriCtl)
    STATUS = Reg16(6, RO, layout=PriSta, reset=PriSta.STOPPED.mask)
    CAPACITY = Reg32(8, RO, doc="outstanding page requests that the device supports")
    ALLOCATION = Reg32(12, doc="outstanding page requests that software allows")


class Pri(ExtendedCapability):
    """Page Request Interface; `capacity`: outstanding page requests; `pasid`: whether responses carry the PASID."""

    id = 0x0013
    bank = PriRegs
    hooked = (PriRegs.CONTROL,)
    regs: PriRegs

    def __init__(self, *, capacity: int = 32, pasid: bool = False) -> None:
        if not 1 <= capacity < 1 << 32:
            raise RegisterError(f"PRI capacity {capacity} is not a positive 32-bit number")
        self.capacity = capacity
        self.pasid = pasid

    def fill(self) -> None:
        self.regs.CAPACITY = self.capacity
        self.regs.STATUS = PriSta.PASID_REQUIRED.put(self.regs.STATUS, int(self.pasid))

    def written(self) -> None:
        control = self.regs.CONTROL
        if PriCtl(control).RESET:  # reads as 0; clears the status, but only while the interface is disabled
            self.regs.CONTROL = control & ~PriCtl.RESET.mask
            if not PriCtl(control).ENABLE:
                self.regs.STATUS = PriSta.STOPPED.put(self.regs.STATUS & ~3, 1)
        self.regs.STATUS = PriSta.STOPPED.put(self.regs.STATUS, int(not PriCtl(control).ENABLE))

    @property
    def enabled(self) -> bool:
        """Whether the guest has enabled page requests."""
        return bool(PriCtl(self.regs.CONTROL).ENABLE)
