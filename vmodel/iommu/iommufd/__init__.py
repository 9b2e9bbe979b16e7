"""The objects of iommufd, which a `Context` has.

errno values are those of Linux (include/uapi/linux/iommufd.h, drivers/iommu/iommufd).
"""

from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.iommufd.device import Device
from vmodel.iommu.iommufd.fault_object import FaultObject
from vmodel.iommu.iommufd.hw_info import HwInfo
from vmodel.iommu.iommufd.hwpt import Hwpt
from vmodel.iommu.iommufd.ioas import Ioas

__all__ = ["Context", "Device", "FaultObject", "HwInfo", "Hwpt", "Ioas", "Object"]
