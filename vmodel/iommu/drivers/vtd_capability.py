"""The capability registers of a VT-d unit (11.4.2, 11.4.3), from its capabilities."""

from __future__ import annotations

from vmodel.iommu.capabilities import Capabilities
from vmodel.regs import Bit, Bits, Layout
from vmodel.span import GiB, MiB

#: Offsets of the IOTLB registers and of the fault recording registers, and the most of the latter.
IOTLB_AT, RECORDS_AT, MOST_RECORDS = 0x100, 0x200, 8
#: A page-selective invalidation covers at most 2**18 pages.
MOST_ADDRESS_MASK = 18


class VtdCap(Layout):
    """Capability register (11.4.2)."""

    ND = Bits(0, 2, doc="domain-ids of 4 + 2 ND bits")
    AFL = Bit(3)
    RWBF = Bit(4)
    PLMR = Bit(5, doc="there is a low protected memory region")
    PHMR = Bit(6)
    CM = Bit(7, doc="caching mode: entries that are not present may be cached")
    SAGAW = Bits(8, 12, doc="widths of second-stage tables: bit 1 is 39 (3 levels), bit 2 48, bit 3 57")
    MGAW = Bits(16, 21, doc="widest IOVA in bits, less 1")
    ZLR = Bit(22)
    FRO = Bits(24, 33, doc="offset of the fault recording registers, in 16 bytes")
    SLLPS = Bits(34, 37, doc="large pages: 2 MiB, 1 GiB")
    PSI = Bit(39)
    NFR = Bits(40, 47, doc="number of fault recording registers, less 1")
    MAMV = Bits(48, 53)
    DWD = Bit(54)
    DRD = Bit(55)
    FS1GP = Bit(56, doc="first-stage tables have pages of 1 GiB")
    FS5LP = Bit(60, doc="first-stage tables may have 5 levels")


class Ecap(Layout):
    """Extended capability register (11.4.3)."""

    C = Bit(0, doc="tables are read from the CPU's caches")
    QI = Bit(1)
    DT = Bit(2, doc="devices may have TLBs")
    IR = Bit(3)
    PT = Bit(6, doc="pass-through")
    SC = Bit(7, doc="SNP in tables")
    IRO = Bits(8, 17, doc="offset of the IOTLB registers, in 16 bytes")
    NEST = Bit(26, doc="nested translation")
    PRS = Bit(29, doc="page requests")
    PSS = Bits(35, 39, doc="bits of PASIDs, less 1")
    PASID = Bit(40, doc="requests may have PASIDs")
    PDS = Bit(42, doc="page requests can be drained")
    SMTS = Bit(43, doc="scalable mode")
    SSADS = Bit(45, doc="accessed and dirty flags in second-stage tables")
    SSTS = Bit(46, doc="second-stage tables in scalable mode")
    FSTS = Bit(47, doc="first-stage tables")
    SMPWCS = Bit(48, doc="like C, for tables that PASID table entries point to")
    RPS = Bit(49, doc="RID_PASID may be chosen")


def record_count(can: Capabilities) -> int:
    """Number of fault recording registers."""
    return min(can.fault_queue_depth, MOST_RECORDS)


def vtd_capability(can: Capabilities, *, scalable: bool, caching_mode: bool) -> int:
    """CAP.  SAGAW has all table widths up to the one that MGAW needs."""
    bits = max(min(can.input_bits, 57 if scalable else 48), 31)
    value = 0
    for field, number in (
        (VtdCap.ND, 6),
        (VtdCap.PLMR, 1),
        (VtdCap.PHMR, 1),
        (VtdCap.CM, int(caching_mode)),
        (VtdCap.SAGAW, 0b0010 | (bits > 39) << 2 | (bits > 48) << 3),
        (VtdCap.MGAW, bits - 1),
        (VtdCap.ZLR, 1),
        (VtdCap.FRO, RECORDS_AT // 16),
        (VtdCap.SLLPS, (2 * MiB in can.page_sizes) | (GiB in can.page_sizes) << 1),
        (VtdCap.PSI, 1),
        (VtdCap.NFR, record_count(can) - 1),
        (VtdCap.MAMV, MOST_ADDRESS_MASK),
        (VtdCap.DWD, 1),
        (VtdCap.DRD, 1),
        (VtdCap.FS1GP, int(scalable)),
        (VtdCap.FS5LP, int(scalable and bits == 57)),
    ):
        value = field.put(value, number)
    return value


def vtd_extended_capability(can: Capabilities, *, scalable: bool, ats: bool) -> int:
    """ECAP.  `ats`: devices may have TLBs."""
    pasids = scalable and can.pasid_bits > 0
    requests = ats and pasids and can.page_requests
    value = 0
    for field, number in (
        (Ecap.C, can.coherent),
        (Ecap.QI, True),
        (Ecap.DT, ats),
        (Ecap.PT, True),
        (Ecap.SC, can.enforce_snoop),
        (Ecap.IRO, IOTLB_AT // 16),
        (Ecap.NEST, scalable and can.nesting),
        (Ecap.PRS, requests),
        (Ecap.PDS, requests),
        (Ecap.PSS, can.pasid_bits - 1 if pasids else 0),
        (Ecap.PASID, pasids),
        (Ecap.SMTS, scalable),
        (Ecap.SSADS, scalable and can.dirty_tracking),
        (Ecap.SSTS, scalable),
        (Ecap.FSTS, scalable),
        (Ecap.SMPWCS, scalable and can.coherent),
        (Ecap.RPS, scalable),
    ):
        value = field.put(value, int(number))
    return value
