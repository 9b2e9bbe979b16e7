"""The registers of a remapping unit (11.4), and what its capabilities say."""

from __future__ import annotations

from vmodel.errors import ConfigError
from vmodel.iommu.capabilities import Capabilities
from vmodel.regs import RO, RW, W1C, WO, Bit, Bits, Layout, Reg32, Reg64, RegisterBank
from vmodel.span import PAGE, GiB, MiB

#: Where the IOTLB registers and the fault recording registers are, and how many of these there are at most.
IOTLB_AT, RECORDS_AT, MOST_RECORDS = 0x100, 0x200, 8
#: Page-selective invalidations are of at most 2**18 pages.
MOST_ADDRESS_MASK = 18
#: Addresses of protected memory have this granule, in bits.
PROTECTED_BITS = 21


class Cap(Layout):
    """Capability register (11.4.2)."""

    ND = Bits(0, 2, doc="domain-ids of 4 + 2 ND bits")
    AFL = Bit(3)
    RWBF = Bit(4)
    PLMR = Bit(5, doc="there is a low protected memory region")
    PHMR = Bit(6)
    CM = Bit(7, doc="what is not present may be cached, too")
    SAGAW = Bits(8, 12, doc="widths of tables: bit 1 is 39 (3 levels), bit 2 48 (4 levels)")
    MGAW = Bits(16, 21, doc="widest IOVA in bits, less 1")
    ZLR = Bit(22)
    FRO = Bits(24, 33, doc="where the fault recording registers are, in 16 bytes")
    SLLPS = Bits(34, 37, doc="large pages: 2 MiB, 1 GiB")
    PSI = Bit(39)
    NFR = Bits(40, 47, doc="how many fault recording registers there are, less 1")
    MAMV = Bits(48, 53)
    DWD = Bit(54)
    DRD = Bit(55)


class Ecap(Layout):
    """Extended capability register (11.4.3)."""

    C = Bit(0, doc="tables are read from the CPU's caches")
    QI = Bit(1)
    DT = Bit(2)
    IR = Bit(3)
    PT = Bit(6, doc="pass-through")
    SC = Bit(7, doc="SNP in tables")
    IRO = Bits(8, 17, doc="where the IOTLB registers are, in 16 bytes")


class Global(Layout):
    """Global command and status (11.4.4): what is written, and what has been done."""

    QI = Bit(26, doc="queued invalidation")
    ROOT = Bit(30, doc="the root table's address has been taken over")
    TRANSLATION = Bit(31)


class RootAddress(Layout):
    """Root table address (11.4.5); other modes than legacy are not there, so bits 11:10 stay 0."""

    RTA = Bits(12, 63, RW)


class ContextCommand(Layout):
    """Context command (11.4.6.1)."""

    DID = Bits(0, 15)
    SID = Bits(16, 31)
    FM = Bits(32, 33)
    CAIG = Bits(59, 60, RO, doc="what has been invalidated, as CIRG; 0: nothing")
    CIRG = Bits(61, 62, doc="1 all, 2 a domain, 3 a device")
    ICC = Bit(63)


class FaultStatus(Layout):
    """Fault status (11.4.8.1)."""

    PFO = Bit(0, W1C, doc="a fault was not recorded")
    PPF = Bit(1, doc="a record has its F bit set")
    IQE = Bit(4, W1C, doc="invalidation queue error")
    ICE = Bit(5, W1C)
    ITE = Bit(6, W1C)
    FRI = Bits(8, 15, doc="the oldest record, if PPF is set")


class EventControl(Layout):
    """Fault or invalidation event control (11.4.8.2, 11.4.9.5)."""

    IP = Bit(30, RO, doc="an interrupt waits for the mask")
    IM = Bit(31, RW)


class MessageAddress(Layout):
    """Lower half of a message's address."""

    ADDRESS = Bits(2, 31, RW)


class ProtectedEnable(Layout):
    """Protected memory enable (11.4.7.1)."""

    PRS = Bit(0, RO)
    EPM = Bit(31, RW)


class ProtectedLow(Layout):
    """An address of the low protected region; the limit's lower bits count as ones."""

    ADDRESS = Bits(PROTECTED_BITS, 31, RW)


class ProtectedHigh(Layout):
    """An address of the high protected region."""

    ADDRESS = Bits(PROTECTED_BITS, 63, RW)


class QueueOffset(Layout):
    """Head or tail of the invalidation queue, in bytes."""

    OFFSET = Bits(4, 18, RW)


class QueueAddress(Layout):
    """Invalidation queue address (11.4.9.3); descriptors of 256 bits are not there, so bit 11 stays 0."""

    QS = Bits(0, 2, RW, doc="2**QS pages")
    IQA = Bits(12, 63, RW)


class CompletionStatus(Layout):
    """Invalidation completion status (11.4.9.4)."""

    IWC = Bit(0, W1C)


class QueueError(Layout):
    """Invalidation queue error record (11.4.9.9)."""

    IQEI = Bits(0, 3)


class InvalidateAddress(Layout):
    """Invalidate address (11.4.6.4)."""

    AM = Bits(0, 5, doc="2**AM pages")
    IH = Bit(6)
    ADDR = Bits(12, 63)


class IotlbInvalidate(Layout):
    """IOTLB invalidate (11.4.6.3)."""

    DID = Bits(32, 47)
    DW = Bit(48)
    DR = Bit(49)
    IAIG = Bits(57, 58, RO, doc="what has been invalidated, as IIRG; 0: nothing")
    IIRG = Bits(60, 61, doc="1 all, 2 a domain, 3 pages of a domain")
    IVT = Bit(63)


class VtdRegs(RegisterBank, size=0x200):
    """Registers of the unit, at the start of BAR0."""

    VER = Reg32(0x00, RO, reset=0x10, doc="version 1.0")
    CAP = Reg64(0x08, RO, layout=Cap)
    ECAP = Reg64(0x10, RO, layout=Ecap)
    GCMD = Reg32(0x18, WO, layout=Global)
    GSTS = Reg32(0x1C, RO, layout=Global)
    RTADDR = Reg64(0x20, RO, layout=RootAddress)
    CCMD = Reg64(0x28, layout=ContextCommand)
    FSTS = Reg32(0x34, RO, layout=FaultStatus)
    FECTL = Reg32(0x38, RO, reset=EventControl.IM.mask, layout=EventControl)
    FEDATA = Reg32(0x3C)
    FEADDR = Reg32(0x40, RO, layout=MessageAddress)
    FEUADDR = Reg32(0x44)
    PMEN = Reg32(0x64, RO, layout=ProtectedEnable)
    PLMBASE = Reg32(0x68, RO, layout=ProtectedLow)
    PLMLIMIT = Reg32(0x6C, RO, layout=ProtectedLow)
    PHMBASE = Reg64(0x70, RO, layout=ProtectedHigh)
    PHMLIMIT = Reg64(0x78, RO, layout=ProtectedHigh)
    IQH = Reg64(0x80, RO, doc="where the next descriptor is read, in bytes")
    IQT = Reg64(0x88, RO, layout=QueueOffset)
    IQA = Reg64(0x90, RO, layout=QueueAddress)
    ICS = Reg32(0x9C, RO, layout=CompletionStatus)
    IECTL = Reg32(0xA0, RO, reset=EventControl.IM.mask, layout=EventControl)
    IEDATA = Reg32(0xA4)
    IEADDR = Reg32(0xA8, RO, layout=MessageAddress)
    IEUADDR = Reg32(0xAC)
    IQER = Reg64(0xB0, RO, layout=QueueError)
    IVA = Reg64(IOTLB_AT, layout=InvalidateAddress)
    IOTLB = Reg64(IOTLB_AT + 8, layout=IotlbInvalidate)


class FaultInfo(Layout):
    """Upper half of a fault record (11.4.8.6)."""

    SID = Bits(0, 15)
    FR = Bits(32, 39, doc="the reason")
    T = Bit(62, doc="0: a write, 1: a read")
    F = Bit(63, W1C)


class RecordRegs(RegisterBank, size=16 * MOST_RECORDS):
    """Fault recording registers: the page, and what happened there.  Clearing F needs no hook: FSTS looks."""

    PAGE0 = Reg64(0x00, RO)
    INFO0 = Reg64(0x08, RO, layout=FaultInfo)
    PAGE1 = Reg64(0x10, RO)
    INFO1 = Reg64(0x18, RO, layout=FaultInfo)
    PAGE2 = Reg64(0x20, RO)
    INFO2 = Reg64(0x28, RO, layout=FaultInfo)
    PAGE3 = Reg64(0x30, RO)
    INFO3 = Reg64(0x38, RO, layout=FaultInfo)
    PAGE4 = Reg64(0x40, RO)
    INFO4 = Reg64(0x48, RO, layout=FaultInfo)
    PAGE5 = Reg64(0x50, RO)
    INFO5 = Reg64(0x58, RO, layout=FaultInfo)
    PAGE6 = Reg64(0x60, RO)
    INFO6 = Reg64(0x68, RO, layout=FaultInfo)
    PAGE7 = Reg64(0x70, RO)
    INFO7 = Reg64(0x78, RO, layout=FaultInfo)


def widest(can: Capabilities) -> int:
    """MGAW in bits.  ConfigError: no such unit can be."""
    if can.input_bits <= 30:  # a table of three levels translates more
        raise ConfigError(f"input_bits {can.input_bits}: a VT-d unit that a guest drives needs at least 31")
    if PAGE not in can.page_sizes:
        raise ConfigError("page_sizes: a VT-d unit that a guest drives has pages of 4 KiB in any case")
    return min(can.input_bits, 48)


def record_count(can: Capabilities) -> int:
    """How many faults the registers keep."""
    return min(can.fault_queue_depth, MOST_RECORDS)


def capability(can: Capabilities) -> int:
    """CAP.  A width of tables is there when it is needed for MGAW, or less is."""
    value = 0
    for field, number in (
        (Cap.ND, 6),
        (Cap.PLMR, 1),
        (Cap.PHMR, 1),
        (Cap.SAGAW, 0b110 if widest(can) > 39 else 0b010),
        (Cap.MGAW, widest(can) - 1),
        (Cap.ZLR, 1),
        (Cap.FRO, RECORDS_AT // 16),
        (Cap.SLLPS, (2 * MiB in can.page_sizes) | (GiB in can.page_sizes) << 1),
        (Cap.PSI, 1),
        (Cap.NFR, record_count(can) - 1),
        (Cap.MAMV, MOST_ADDRESS_MASK),
        (Cap.DWD, 1),
        (Cap.DRD, 1),
    ):
        value = field.put(value, number)
    return value


def extended_capability(can: Capabilities) -> int:
    """ECAP: legacy mode with queued invalidation and pass-through."""
    value = 0
    for field, number in (
        (Ecap.C, int(can.coherent)),
        (Ecap.QI, 1),
        (Ecap.PT, 1),
        (Ecap.SC, int(can.enforce_snoop)),
        (Ecap.IRO, IOTLB_AT // 16),
    ):
        value = field.put(value, number)
    return value
