"""Stage 1 of an SMMUv3 by a guest's stream table entry and context descriptors (IHI 0070, 5.2, 5.4)."""

from __future__ import annotations

import enum
import errno

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


class SmmuNested(Stage1):
    """Stage 1 by an STE.  The context descriptor is read when a device is attached, and after CFGI_CD.

    (Hardware reads it at the first access after those.)
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
        #: The ASID of the descriptor that was read last.
        self.asid: int | None = None
        #: Whether faults of the tables are reported (CD.R).
        self.reports = False
        #: What an access that the domain blocks is reported as; None: it is not.
        self.event: SmmuEvent | None = None

    def read(self) -> Domain:
        self.asid, self.event, self.reports = None, None, False
        if self.config is SteConfig.BYPASS:
            return self._parent
        if self.config is SteConfig.ABORT:
            return Aborting("abort")
        if self._ste.S1CDMAX and self._more.S1DSS != 2:
            if self._more.S1DSS == 1:
                return self._parent
            self.event = SmmuEvent.F_STREAM_DISABLED
            return Aborting("no substream")
        try:
            return self._descriptor(GuestTables(self._parent, self._memory))
        except DmaFault:  # F_CD_FETCH, or a fault of stage 2: not the guest's
            return Aborting("context descriptor cannot be read")

    def _descriptor(self, tables: GuestTables) -> Domain:
        at = self._ste.S1CONTEXTPTR << Ste0.S1CONTEXTPTR.lo
        self.event = SmmuEvent.C_BAD_CD
        if self._ste.S1CDMAX and self._ste.S1FMT:
            if self._ste.S1FMT not in _SPLIT:
                return Aborting("bad table of context descriptors")
            (first,) = tables.words(at, 1)
            if not first & 1:
                self.event = SmmuEvent.C_BAD_SUBSTREAMID
                return Aborting("no context descriptor")
            at = first & _L2PTR
        words = tables.words(at, _CD_SIZE // 8)
        cd = Cd0(words[0])
        table = self._table(cd, words[1])
        if table is None:
            return Aborting("bad context descriptor")
        self.asid, self.event, self.reports = int(cd.ASID), None, bool(cd.R)
        if cd.EPD0:  # no walks: each access is a translation fault
            self.event = SmmuEvent.F_TRANSLATION if cd.R else None
            return Aborting("walks are disabled")
        return TableDomain(DomainType.NESTED, self._iommu, self._memory, table, self._parent)

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
