"""Stage 1 of an SMMUv3 by a guest's stream table entry and context descriptors (IHI 0070, 5.2, 5.4)."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

from vmodel.errors import DmaFault, IommuError
from vmodel.iommu.domain import Domain, DomainType, PagingDomain, TableDomain
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.iommufd.nested import Aborting, GuestTables, SmmuV3Ste, Stage1
from vmodel.iommu.iommufd.registers import OUTPUT_BITS
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat
from vmodel.memory import GuestMemory
from vmodel.regs import Bit, Bits, Layout


class Ste0(Layout):
    """Word 0 of a stream table entry."""

    V = Bit(0)
    CONFIG = Bits(1, 3)
    S1FMT = Bits(4, 5, doc="table of context descriptors: 0 linear, 1 and 2 two levels with leaves of 4 and 64 KiB")
    S1CONTEXTPTR = Bits(6, 51)
    S1CDMAX = Bits(59, 63, doc="2**S1CDMAX context descriptors")


class Ste1(Layout):
    """Word 1 of a stream table entry."""

    S1DSS = Bits(0, 1, doc="of requests without a substream: 0 abort, 1 bypass, 2 descriptor 0")
    S1CIR = Bits(2, 3)
    S1COR = Bits(4, 5)
    S1CSH = Bits(6, 7)
    S1STALLD = Bit(27)
    EATS = Bits(28, 29)


class Cd0(Layout):
    """Word 0 of a context descriptor."""

    T0SZ = Bits(0, 5)
    TG0 = Bits(6, 7)
    EPD0 = Bit(14)
    ENDI = Bit(15)
    V = Bit(31)
    IPS = Bits(32, 34)
    AA64 = Bit(41)
    HD = Bit(42)
    HA = Bit(43)
    S = Bit(44)
    R = Bit(45, doc="faults are reported")
    ASID = Bits(48, 63)


class SteConfig(enum.IntEnum):
    """Configurations of an STE that a user may ask for."""

    ABORT = 0
    BYPASS = 4
    TRANSLATE = 5


class SmmuEvent(enum.IntEnum):
    """Events of the event queue (7.3) that Linux reports to users (arm_smmu_handle_event)."""

    C_BAD_STE = 0x04
    F_STREAM_DISABLED = 0x06
    C_BAD_SUBSTREAMID = 0x08
    C_BAD_CD = 0x0A
    F_TRANSLATION = 0x10
    F_ADDR_SIZE = 0x11
    F_ACCESS = 0x12
    F_PERMISSION = 0x13


_ALLOWED0 = sum(f.mask for f in (Ste0.V, Ste0.CONFIG, Ste0.S1FMT, Ste0.S1CONTEXTPTR, Ste0.S1CDMAX))
_ALLOWED1 = sum(f.mask for f in (Ste1.S1DSS, Ste1.S1CIR, Ste1.S1COR, Ste1.S1CSH, Ste1.S1STALLD, Ste1.EATS))
#: Bytes of a context descriptor, and entries of a table's leaf as a logarithm, by S1FMT.
_CD_SIZE, _SPLIT = 64, {1: 6, 2: 10}
_TTB = 0x000F_FFFF_FFFF_FFF0
_L2PTR = 0x000F_FFFF_FFFF_F000


@dataclass(frozen=True)
class ReadDescriptor:
    """What the SMMU keeps of a context descriptor.

    `domain` of the accesses; `event`: what one that it blocks is reported as, None: it is not; `reports`: whether
    faults of the tables are (CD.R).
    """

    domain: Domain
    event: SmmuEvent | None = None
    asid: int | None = None
    reports: bool = False


class SmmuNested(Stage1):
    """Stage 1 by an STE.

    The context descriptor of requests without a substream is read when a device is attached, and after CFGI_CD, those
    of substreams (PASIDs) at the first access after that.  (Hardware does so with all of them.)
    """

    def __init__(self, iommu: Iommu, parent: PagingDomain, memory: GuestMemory, ste: SmmuV3Ste) -> None:
        """IommuError(EIO): the STE has fields or values that a user must not set (Linux arm_smmu_validate_vste)."""
        self._iommu, self._parent, self._memory = iommu, parent, memory
        if not ste.word0 & Ste0.V.mask:
            ste = SmmuV3Ste(0, 0)
        self._ste, self._more = Ste0(ste.word0), Ste1(ste.word1)
        config, eats = int(self._ste.CONFIG), int(self._more.EATS)
        if ste.word0 & ~_ALLOWED0 or ste.word1 & ~_ALLOWED1 or config not in set(SteConfig) or eats > 1:
            raise IommuError(errno.EIO, f"stream table entry {ste.word0:#x} {ste.word1:#x} is not legal")
        self.config = SteConfig(config)
        self.needs_vdevice = self.config is SteConfig.TRANSLATE
        #: Whether devices may use ATS: the VM invalidates their TLBs then.
        self.ats = self.needs_vdevice and eats == 1
        #: What has been read, by substream; None: of requests without one.
        self.descriptors: dict[int | None, ReadDescriptor] = {}

    def read(self) -> Domain:
        self.descriptors[None] = found = self._plain()
        return found.domain

    def read_pasid(self, pasid: int) -> Domain | None:
        """Substream `pasid`.  None: the STE has no table of descriptors."""
        if self.config is not SteConfig.TRANSLATE or not self._ste.S1CDMAX:
            return None
        if pasid not in self.descriptors:
            self.descriptors[pasid] = self._substream(pasid)
        return self.descriptors[pasid].domain

    def drop_pasids(self) -> None:
        self.descriptors = {key: value for key, value in self.descriptors.items() if key is None}

    def event_of(self, pasid: int | None) -> SmmuEvent | None:
        """What an access that is blocked is reported as; None: it is not."""
        if pasid is not None and self.needs_vdevice and pasid not in self.descriptors:
            return SmmuEvent.C_BAD_SUBSTREAMID
        found = self.descriptors.get(pasid)
        return None if found is None else found.event

    def _plain(self) -> ReadDescriptor:
        if self.config is SteConfig.BYPASS:
            return ReadDescriptor(self._parent)
        if self.config is SteConfig.ABORT:
            return ReadDescriptor(Aborting("abort"))
        if self._ste.S1CDMAX and self._more.S1DSS != 2:
            if self._more.S1DSS == 1:
                return ReadDescriptor(self._parent)
            return ReadDescriptor(Aborting("no substream"), SmmuEvent.F_STREAM_DISABLED)
        return self._substream(0)

    def _substream(self, number: int) -> ReadDescriptor:
        if number >> self._ste.S1CDMAX:
            return ReadDescriptor(Aborting(f"no substream {number}"), SmmuEvent.C_BAD_SUBSTREAMID)
        try:
            return self._descriptor(GuestTables(self._parent, self._memory), number)
        except DmaFault:  # F_CD_FETCH, or a fault of stage 2: not the guest's
            return ReadDescriptor(Aborting("context descriptor cannot be read"))

    def _descriptor(self, tables: GuestTables, number: int) -> ReadDescriptor:
        at = self._ste.S1CONTEXTPTR << Ste0.S1CONTEXTPTR.lo
        if self._ste.S1CDMAX and self._ste.S1FMT:
            if self._ste.S1FMT not in _SPLIT:
                return ReadDescriptor(Aborting("bad table of context descriptors"), SmmuEvent.C_BAD_CD)
            split = _SPLIT[self._ste.S1FMT]
            (leaf,) = tables.words(at + 8 * (number >> split), 1)
            if not leaf & 1:
                return ReadDescriptor(Aborting("no context descriptor"), SmmuEvent.C_BAD_SUBSTREAMID)
            at, number = leaf & _L2PTR, number & (1 << split) - 1
        words = tables.words(at + _CD_SIZE * number, _CD_SIZE // 8)
        cd = Cd0(words[0])
        table = self._table(cd, words[1])
        if table is None:
            return ReadDescriptor(Aborting("bad context descriptor"), SmmuEvent.C_BAD_CD)
        reports, asid = bool(cd.R), int(cd.ASID)
        if cd.EPD0:  # no walks: each access is a translation fault
            event = SmmuEvent.F_TRANSLATION if reports else None
            return ReadDescriptor(Aborting("walks are disabled"), event, asid, reports)
        domain = TableDomain(DomainType.NESTED, self._iommu, self._memory, table, self._parent)
        return ReadDescriptor(domain, None, asid, reports)

    def _table(self, cd: Cd0, ttb: int) -> Table | None:
        """The table of a descriptor; None: it is illegal, or has what the SMMU lacks."""
        can = self._iommu.capabilities
        if not cd.V or not cd.AA64 or cd.ENDI or cd.TG0 or (cd.S and not can.stall) or cd.T0SZ > 39:
            return None
        bits = 64 - cd.T0SZ
        flags = TableFlag(0)
        if can.dirty_tracking:
            flags |= TableFlag.SET_ACCESSED if cd.HA else TableFlag(0)
            flags |= TableFlag.SET_DIRTY if cd.HA and cd.HD else TableFlag(0)
        output = min(OUTPUT_BITS[min(cd.IPS, 5)], max(can.output_bits, 32), 48)
        try:
            return Table(TableFormat.ARM_S1, (bits - 4) // 9, ttb & _TTB, bits, output, flags)
        except ValueError:
            return None
