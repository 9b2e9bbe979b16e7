"""The vIOMMU of an AMD-Vi (Linux drivers/iommu/amd/iommufd.c, nested.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vmodel.errors import DmaFault, IommuError
from vmodel.iommu.domain import AllocFlags, Domain, DomainType, PagingDomain, TableDomain
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.iommufd.nested import Aborting, AmdGuestDte, GuestTables, NestedData, Stage1
from vmodel.iommu.iommufd.viommu import Viommu
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.memory import GuestMemory
from vmodel.regs import Bit, Bits, Layout

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.device import Device

_ADDRESS = 0x000F_FFFF_FFFF_F000


class Dte0(Layout):
    """Word 0 of a device table entry (48882, 2.2.2.1)."""

    V = Bit(0)
    TV = Bit(1)
    MODE = Bits(9, 11)
    HOST_TRP = Bits(12, 51)
    GIOV = Bit(54, doc="requests without a PASID use guest tables, as PASID 0")
    GV = Bit(55)
    GLX = Bits(56, 57, doc="levels of GCR3 tables, less 1")
    GCR3_14_12 = Bits(58, 60)


class Dte1(Layout):
    """Word 1 of a device table entry."""

    DOMID = Bits(0, 15)
    GCR3_30_15 = Bits(16, 31)
    GCR3_51_31 = Bits(43, 63)


class Dte2(Layout):
    """Word 2 of a device table entry."""

    GPT_LEVEL = Bits(54, 55, doc="levels of guest tables, less 4")


class AmdNested(Stage1):
    """Stage 1 by a guest's device table entry.

    The GCR3 table is read when a device is attached, and at the first access with a PASID.
    """

    def __init__(self, iommu: Iommu, parent: PagingDomain, memory: GuestMemory, data: AmdGuestDte) -> None:
        """IommuError: EINVAL an illegal entry; EOPNOTSUPP five levels that the IOMMU has not (validate_gdte_nested)."""
        self._iommu, self._parent, self._memory = iommu, parent, memory
        self._dte = Dte0(data.words[0])
        more, level = Dte1(data.words[1]), int(Dte2(data.words[2]).GPT_LEVEL)
        self._gcr3 = self._dte.GCR3_14_12 << 12 | more.GCR3_30_15 << 15 | more.GCR3_51_31 << 31
        dte = self._dte
        if dte.MODE or dte.HOST_TRP or (dte.V and dte.GV and not self._gcr3) or level > 1 or dte.GLX == 3:
            raise IommuError(errno.EINVAL, f"device table entry {data.words[0]:#x} is not legal")
        if level and iommu.capabilities.input_bits < 57:
            raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} has no guest tables of five levels")
        self._levels = 4 + level

    def read(self) -> Domain:
        # Without GIOV requests without a PASID are translated by the parent alone (2.2.5).
        return self._tables(0) if self._dte.GIOV and self._dte.GV else self._parent

    def read_pasid(self, pasid: int) -> Domain | None:
        return self._tables(pasid) if self._dte.GV else None

    def _tables(self, pasid: int) -> Domain:
        if pasid >> 9 * (self._dte.GLX + 1):
            return Aborting("no GCR3 entry")
        try:
            tables, at = GuestTables(self._parent, self._memory), self._gcr3
            for level in range(self._dte.GLX, -1, -1):
                (entry,) = tables.words(at + 8 * (pasid >> 9 * level & 0x1FF), 1)
                if not entry & 1:
                    return Aborting("no GCR3 entry")
                at = entry & _ADDRESS
            output = min(self._iommu.capabilities.output_bits, 52)
            table = Table(TableFormat.X86, self._levels, at, 12 + 9 * self._levels, output)
        except DmaFault:
            return Aborting("GCR3 table cannot be read")
        return TableDomain(DomainType.NESTED, self._iommu, self._memory, table, self._parent)


class AmdViommu(Viommu):
    """The vIOMMU of an AMD-Vi, which has no invalidations.

    Nested HWPTs are those of Linux's amd_iommu_alloc_domain_nested, which no version up to 7.3 makes available.
    """

    def stage1(self, device: Device, flags: AllocFlags, data: NestedData | Table, memory: GuestMemory) -> AmdNested:
        """IommuError(EOPNOTSUPP): other data than a device table entry, or flags; else as AmdNested."""
        if not isinstance(data, AmdGuestDte) or flags:
            raise IommuError(errno.EOPNOTSUPP, f"{self}: a nested HWPT of {type(data).__name__} with {flags!r}")
        return AmdNested(self.iommu, self.hwpt.paging, memory, data)
