"""The registers of a remapping unit (11.4)."""

from __future__ import annotations

import enum

from vmodel.errors import ConfigError
from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.drivers.intel_vtd import IntelVtd
from vmodel.iommu.drivers.vtd_capability import IOTLB_AT, MOST_RECORDS, Ecap, VtdCap
from vmodel.regs import RO, RW, W1C, WO, Bit, Bits, Layout, Reg32, Reg64, RegisterBank
from vmodel.span import PAGE

#: Granularity of protected memory: 1 << PROTECTED_BITS bytes.
PROTECTED_BITS = 21


class Global(Layout):
    """Global command and status (11.4.4)."""

    QI = Bit(26, doc="queued invalidation")
    ROOT = Bit(30, doc="the root table's address has been taken over")
    TRANSLATION = Bit(31)


class TranslationTableMode(enum.IntEnum):
    """RTADDR.TTM."""

    LEGACY = 0
    SCALABLE = 1


class RootAddress(Layout):
    """Root table address (11.4.5)."""

    TTM = Bits(10, 11, RW, doc="a Mode; stays 0 without ECAP.SMTS")
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
    """Fault, invalidation or page request event control (11.4.8.2, 11.4.9.5, 11.4.11.5)."""

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
    """Invalidation queue address (11.4.9.3)."""

    QS = Bits(0, 2, RW, doc="2**QS pages")
    DW = Bit(11, RW, doc="descriptors have 256 bits; stays 0 without ECAP.SMTS")
    IQA = Bits(12, 63, RW)


class CompletionStatus(Layout):
    """Invalidation completion status (11.4.9.4)."""

    IWC = Bit(0, W1C)


class QueueErrorRecord(Layout):
    """Invalidation queue error record (11.4.9.9)."""

    IQEI = Bits(0, 3)


class PageOffset(Layout):
    """Head or tail of the page request queue, in bytes (11.4.11.1, 11.4.11.2)."""

    OFFSET = Bits(5, 18, RW)


class PageAddress(Layout):
    """Page request queue address (11.4.11.3)."""

    PQS = Bits(0, 2, RW, doc="2**PQS pages")
    PQA = Bits(12, 63, RW)


class PageStatus(Layout):
    """Page request status (11.4.11.4)."""

    PPR = Bit(0, W1C, doc="there is a request")
    PRO = Bit(1, W1C, doc="a request found no room")


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
    CAP = Reg64(0x08, RO, layout=VtdCap)
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
    IQER = Reg64(0xB0, RO, layout=QueueErrorRecord)
    PQH = Reg64(0xC0, RO, layout=PageOffset)
    PQT = Reg64(0xC8, RO, layout=PageOffset)
    PQA = Reg64(0xD0, RO, layout=PageAddress)
    PRS = Reg32(0xDC, RO, layout=PageStatus)
    PECTL = Reg32(0xE0, RO, reset=EventControl.IM.mask, layout=EventControl)
    PEDATA = Reg32(0xE4)
    PEADDR = Reg32(0xE8, RO, layout=MessageAddress)
    PEUADDR = Reg32(0xEC)
    IVA = Reg64(IOTLB_AT, layout=InvalidateAddress)
    IOTLB = Reg64(IOTLB_AT + 8, layout=IotlbInvalidate)


class FaultInfo(Layout):
    """Upper half of a fault record (11.4.8.6)."""

    SID = Bits(0, 15)
    PP = Bit(31, doc="PV is there")
    FR = Bits(32, 39, doc="the reason")
    PV = Bits(40, 59, doc="the PASID")
    T = Bit(62, doc="0: a write, 1: a read")
    F = Bit(63, W1C)


class RecordRegs(RegisterBank, size=16 * MOST_RECORDS):
    """Fault recording registers (11.4.8.6).  Clearing F needs no hook, as a read of FSTS checks all F bits."""

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


def check(can: Capabilities, kind: IntelVtd.Params) -> None:
    """ConfigError: a unit that a guest drives cannot have these capabilities."""
    if can.input_bits <= 30:  # a table of three levels translates more
        raise ConfigError(f"input_bits {can.input_bits}: a VT-d unit that a guest drives needs at least 31")
    if PAGE not in can.page_sizes:
        raise ConfigError("page_sizes: a VT-d unit that a guest drives has pages of 4 KiB in any case")
    if kind.scalable and can.input_bits < 48:  # first-stage tables have four levels
        raise ConfigError(f"input_bits {can.input_bits}: a VT-d unit with scalable mode needs at least 48")
