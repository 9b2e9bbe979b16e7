"""Which vIOMMUs each kind of IOMMU has (Linux get_viommu_size and viommu_init of its driver)."""

from __future__ import annotations

from vmodel.iommu.iommu import Iommu
from vmodel.iommu.iommufd.amd_viommu import AmdViommu
from vmodel.iommu.iommufd.registers import cmdqv_of
from vmodel.iommu.iommufd.smmu_viommu import CmdqvViommu, SmmuV3Viommu
from vmodel.iommu.iommufd.viommu import Viommu, ViommuFinder, ViommuType


def _smmu(iommu: Iommu, kind: int) -> type[Viommu] | None:
    """arm_smmu_get_viommu_size."""
    if not iommu.capabilities.nesting:
        return None
    if kind == ViommuType.ARM_SMMUV3:
        return SmmuV3Viommu
    return CmdqvViommu if kind == ViommuType.TEGRA241_CMDQV and cmdqv_of(iommu) is not None else None


def _amd(iommu: Iommu, kind: int) -> type[Viommu] | None:
    """amd_iommufd_get_viommu_size: whatever the type is."""
    return AmdViommu


#: By kind; others have no vIOMMU.  An experiment may put its own here.
VIOMMUS: dict[str, ViommuFinder] = {"smmu-v3": _smmu, "amd-vi": _amd}
