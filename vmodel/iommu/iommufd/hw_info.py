"""`HwInfo`: what IOMMU_GET_HW_INFO returns about a device and its IOMMU."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

from vmodel.errors import IommuError
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.iommufd.registers import HwInfoType, HwRegisters, cmdqv_of, registers_of


class HwCapability(enum.IntFlag):
    """Linux enum iommufd_hw_capabilities."""

    DIRTY_TRACKING = 1
    #: Requests with a PASID may ask for permission to execute, or be privileged; models make no such requests.
    PCI_PASID_EXEC = 2
    PCI_PASID_PRIV = 4
    #: The device, or its IOMMU, has no ATS.
    PCI_ATS_NOT_SUPPORTED = 8


@dataclass(frozen=True)
class HwInfo:
    """A device and its IOMMU, as IOMMU_GET_HW_INFO describes them.

    `type` and `registers`: the kind's own data, None for kinds that have none; `pasid_bits` (out_max_pasid_log2): 0 if
    the device, or the IOMMU, has no PASIDs.  `kind`, `coherent`, `enforce_snoop` and `page_sizes` (in bytes) are not
    in Linux's answer.
    """

    kind: str
    coherent: bool
    enforce_snoop: bool
    dirty_tracking: bool
    pasid_bits: int
    page_sizes: frozenset[int]
    type: int
    registers: HwRegisters | None
    capabilities: HwCapability

    @property
    def data(self) -> bytes:
        """The bytes of `registers`, as Linux writes them to the user's buffer."""
        return b"" if self.registers is None else self.registers.pack()


def hw_info(endpoint: Endpoint, iommu: Iommu, wanted: int = HwInfoType.NONE) -> HwInfo:
    """As Device.get_info."""
    can, registers = iommu.capabilities, registers_of(iommu)
    if registers is not None and wanted not in (HwInfoType.NONE, registers.type):
        registers = cmdqv_of(iommu) if wanted == HwInfoType.TEGRA241_CMDQV else None
        if registers is None:
            raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} has no information of type {wanted:#x}")
    pasids = 1 << can.pasid_bits
    if endpoint.max_pasids is not None:
        pasids = min(pasids, endpoint.max_pasids)
    capabilities = HwCapability(0)
    if can.dirty_tracking:
        capabilities |= HwCapability.DIRTY_TRACKING
    if not (endpoint.has_ats and can.page_requests):
        capabilities |= HwCapability.PCI_ATS_NOT_SUPPORTED
    return HwInfo(
        iommu.driver.kind,
        can.coherent,
        endpoint.can_enforce_snoop,
        can.dirty_tracking,
        max(pasids.bit_length() - 1, 0),
        can.page_sizes,
        HwInfoType.NONE if registers is None else registers.type,
        registers,
        capabilities,
    )
