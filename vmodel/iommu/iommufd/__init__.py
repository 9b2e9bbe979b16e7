"""The objects of iommufd, which a `Context` has.

errno values are those of Linux (include/uapi/linux/iommufd.h, drivers/iommu/iommufd).
"""

from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.iommufd.device import Device
from vmodel.iommu.iommufd.fault_object import FaultObject
from vmodel.iommu.iommufd.hw_info import HwCapability, HwInfo
from vmodel.iommu.iommufd.hwpt import Hwpt
from vmodel.iommu.iommufd.ioas import Ioas
from vmodel.iommu.iommufd.registers import AmdInfo, CmdqvInfo, HwInfoType, HwRegisters, SmmuV3Info, VtdInfo

__all__ = [
    "AmdInfo",
    "CmdqvInfo",
    "Context",
    "Device",
    "FaultObject",
    "HwCapability",
    "HwInfo",
    "HwInfoType",
    "HwRegisters",
    "Hwpt",
    "Ioas",
    "Object",
    "SmmuV3Info",
    "VtdInfo",
]
