"""What IOMMU_GET_HW_INFO says of each kind of IOMMU: the values of its capability registers.

Layouts are those of Linux (include/uapi/linux/iommufd.h).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar

from vmodel.fields import Field
from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.drivers.amd_vi import AmdVi
from vmodel.iommu.drivers.intel_vtd import IntelVtd
from vmodel.iommu.drivers.smmu_v3 import SmmuV3
from vmodel.iommu.drivers.vtd_capability import vtd_capability, vtd_extended_capability
from vmodel.iommu.iommu import Iommu
from vmodel.regs import Bit, Bits, Layout
from vmodel.span import KiB


class HwInfoType(enum.IntEnum):
    """Linux enum iommu_hw_info_type."""

    #: The IOMMU reports no registers; as input: whatever there is.
    NONE = 0
    INTEL_VTD = 1
    ARM_SMMUV3 = 2
    TEGRA241_CMDQV = 3
    AMD = 4


#: VtdInfo.flags: a parent of nested domains must have no read-only mappings (Linux reports it for each unit).
ERRATA_772415_SPR17 = 1


@dataclass(frozen=True)
class VtdInfo:
    """struct iommu_hw_info_vtd: CAP (11.4.2) and ECAP (11.4.3)."""

    type: ClassVar[HwInfoType] = HwInfoType.INTEL_VTD
    flags: int
    cap: int
    ecap: int

    def pack(self) -> bytes:
        """The struct's bytes."""
        return struct.pack("<IIQQ", self.flags, 0, self.cap, self.ecap)


@dataclass(frozen=True)
class SmmuV3Info:
    """struct iommu_hw_info_arm_smmuv3: IDR0 to IDR5, IIDR and AIDR (IHI 0070, 6.3.1 to 6.3.6)."""

    type: ClassVar[HwInfoType] = HwInfoType.ARM_SMMUV3
    flags: int
    idr: tuple[int, int, int, int, int, int]
    iidr: int
    aidr: int

    def pack(self) -> bytes:
        """The struct's bytes."""
        return struct.pack("<10I", self.flags, 0, *self.idr, self.iidr, self.aidr)


@dataclass(frozen=True)
class CmdqvInfo:
    """struct iommu_hw_info_tegra241_cmdqv: numbers of a VM's command queues and of its stream ids, as logarithms."""

    type: ClassVar[HwInfoType] = HwInfoType.TEGRA241_CMDQV
    version: int
    log2vcmdqs: int
    log2vsids: int

    def pack(self) -> bytes:
        """The struct's bytes."""
        return struct.pack("<IBBBB", 0, self.version, self.log2vcmdqs, self.log2vsids, 0)


@dataclass(frozen=True)
class AmdInfo:
    """struct iommu_hw_info_amd: the extended feature registers (48882: MMIO 0030h, 01A0h)."""

    type: ClassVar[HwInfoType] = HwInfoType.AMD
    efr: int
    efr2: int

    def pack(self) -> bytes:
        """The struct's bytes."""
        return struct.pack("<QQ", self.efr, self.efr2)


HwRegisters = VtdInfo | SmmuV3Info | CmdqvInfo | AmdInfo


class Idr0(Layout):
    """SMMU_IDR0 (6.3.1)."""

    S2P = Bit(0)
    S1P = Bit(1)
    TTF = Bits(2, 3, doc="formats of tables: 2 is AArch64")
    COHACC = Bit(4)
    HTTU = Bits(6, 7, doc="updates of flags: 2 is accessed and dirty")
    ATS = Bit(10)
    ASID16 = Bit(12)
    PRI = Bit(16)
    VMID16 = Bit(18)
    CD2L = Bit(19, doc="tables of context descriptors may have two levels")
    TTENDIAN = Bits(21, 22, doc="2 is little-endian")
    STALL_MODEL = Bits(24, 25, doc="0: accesses can stall, 1: they cannot")
    TERM_MODEL = Bit(26)
    ST_LEVEL = Bits(27, 28)


class Idr1(Layout):
    """SMMU_IDR1 (6.3.2)."""

    SIDSIZE = Bits(0, 5)
    SSIDSIZE = Bits(6, 10)
    PRIQS = Bits(11, 15)
    EVTQS = Bits(16, 20)
    CMDQS = Bits(21, 25)


class Idr3(Layout):
    """SMMU_IDR3 (6.3.4)."""

    FWB = Bit(8)
    RIL = Bit(10, doc="invalidations by range")


class Idr5(Layout):
    """SMMU_IDR5 (6.3.6)."""

    OAS = Bits(0, 2)
    GRAN4K = Bit(4)
    GRAN16K = Bit(5)
    GRAN64K = Bit(6)
    VAX = Bits(10, 11)
    STALL_MAX = Bits(16, 31)


#: IDR5.OAS: output widths in bits.
OUTPUT_BITS = (32, 36, 40, 42, 44, 48, 52)
#: IDR1.CMDQS: most commands of a queue, as a logarithm.
CMDQS = 19


class Efr(Layout):
    """AMD's extended feature register (MMIO 0030h)."""

    PPRSUP = Bit(1)
    GTSUP = Bit(4)
    IASUP = Bit(6)
    HESUP = Bit(8)
    HATS = Bits(10, 11, doc="levels of host tables, less 4")
    GATS = Bits(12, 13, doc="levels of guest tables, less 4")
    GLXSUP = Bits(14, 15, doc="levels of GCR3 tables, less 1")
    PASMAX = Bits(32, 36)
    GIOSUP = Bit(48)
    HASUP = Bit(49)
    HDSUP = Bit(52)


def registers_of(iommu: Iommu) -> HwRegisters | None:
    """The registers of an IOMMU; None: its kind reports none to users."""
    driver, can = iommu.driver, iommu.capabilities
    if isinstance(driver, IntelVtd):
        # To a user a unit that nests is one in scalable mode, whatever a guest of the machine may use of it.
        scalable = can.nesting or can.pasid_bits > 0
        ats = driver.params.ats or can.page_requests
        return VtdInfo(
            ERRATA_772415_SPR17,
            vtd_capability(can, scalable=scalable, caching_mode=driver.params.caching_mode),
            vtd_extended_capability(can, scalable=scalable, ats=ats),
        )
    if isinstance(driver, SmmuV3):
        return _smmu(can, driver.params.stream_bits, s2fwb=driver.params.s2fwb)
    if isinstance(driver, AmdVi):
        return _amd(can)
    return None


#: Stream ids of a VM, as a logarithm.
_LOG2VSIDS = 4


def cmdqv_of(iommu: Iommu) -> CmdqvInfo | None:
    """The extension of an SMMUv3 that executes commands of VMs; None: it has none."""
    queues = iommu.driver.params.vcmdqs if isinstance(iommu.driver, SmmuV3) else 0
    return CmdqvInfo(1, queues.bit_length() - 1, _LOG2VSIDS) if queues else None


def _smmu(can: Capabilities, stream_bits: int, *, s2fwb: bool) -> SmmuV3Info:
    idr0 = _fields(
        (Idr0.S2P, 1),
        (Idr0.S1P, 1),
        (Idr0.TTF, 2),
        (Idr0.COHACC, can.coherent),
        (Idr0.HTTU, 2 if can.dirty_tracking else 0),
        (Idr0.ATS, can.page_requests),
        (Idr0.ASID16, 1),
        (Idr0.PRI, can.page_requests),
        (Idr0.VMID16, 1),
        (Idr0.CD2L, 1),
        (Idr0.TTENDIAN, 2),
        (Idr0.STALL_MODEL, 0 if can.stall else 1),
        (Idr0.TERM_MODEL, 1),
        (Idr0.ST_LEVEL, 1),
    )
    idr1 = _fields(
        (Idr1.SIDSIZE, stream_bits),
        (Idr1.SSIDSIZE, can.pasid_bits),
        (Idr1.PRIQS, 8 if can.page_requests else 0),
        (Idr1.EVTQS, min((can.fault_queue_depth - 1).bit_length(), 19)),
        (Idr1.CMDQS, CMDQS),
    )
    idr5 = _fields(
        (Idr5.OAS, max(n for n, bits in enumerate(OUTPUT_BITS) if bits <= can.output_bits)),
        (Idr5.GRAN4K, 4 * KiB in can.page_sizes),
        (Idr5.GRAN16K, 16 * KiB in can.page_sizes),
        (Idr5.GRAN64K, 64 * KiB in can.page_sizes),
        (Idr5.VAX, can.input_bits >= 52),
        (Idr5.STALL_MAX, can.fault_queue_depth & 0xFFFF if can.stall else 0),
    )
    return SmmuV3Info(0, (idr0, idr1, 0, _fields((Idr3.FWB, s2fwb), (Idr3.RIL, 1)), 0, idr5), 0, 2)  # SMMUv3.2


def _amd(can: Capabilities) -> AmdInfo:
    guest = can.nesting or can.pasid_bits > 0
    efr = _fields(
        (Efr.PPRSUP, can.page_requests),
        (Efr.GTSUP, guest),
        (Efr.IASUP, 1),
        (Efr.HESUP, 1),
        (Efr.HATS, (can.input_bits > 48) + (can.input_bits > 57)),
        (Efr.GATS, guest and can.input_bits >= 57),
        (Efr.GLXSUP, (can.pasid_bits > 9) + (can.pasid_bits > 18)),
        (Efr.PASMAX, max(can.pasid_bits - 1, 0)),
        (Efr.GIOSUP, guest),
        (Efr.HASUP, can.dirty_tracking),
        (Efr.HDSUP, can.dirty_tracking),
    )
    return AmdInfo(efr, 0)


def _fields(*pairs: tuple[Field, int]) -> int:
    value = 0
    for field, number in pairs:
        value = field.put(value, int(number))
    return value
