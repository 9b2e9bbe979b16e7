"""The kinds of IOMMUs: `KINDS` has them by their names in machine files."""

from vmodel.iommu.driver import Driver
from vmodel.iommu.drivers.amd_vi import AmdVi
from vmodel.iommu.drivers.intel_vtd import IntelVtd
from vmodel.iommu.drivers.pamu import Pamu
from vmodel.iommu.drivers.power_pe import PowerPe
from vmodel.iommu.drivers.riscv import RiscV
from vmodel.iommu.drivers.smmu_v3 import SmmuV3
from vmodel.iommu.drivers.virtio import VirtioIommu

KINDS: dict[str, type[Driver]] = {
    driver.kind: driver for driver in (IntelVtd, AmdVi, SmmuV3, RiscV, PowerPe, Pamu, VirtioIommu)
}
