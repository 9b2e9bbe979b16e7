"""The objects of iommufd, which a `Context` has.

errno values are those of Linux (include/uapi/linux/iommufd.h, drivers/iommu/iommufd).
"""

from vmodel.iommu.iommufd.context import Context, Object, Option
from vmodel.iommu.iommufd.device import Device
from vmodel.iommu.iommufd.fault_object import FaultObject, PageFault
from vmodel.iommu.iommufd.file import DmaBuf, MemoryFile
from vmodel.iommu.iommufd.hw_info import HwCapability, HwInfo
from vmodel.iommu.iommufd.hw_queue import HwQueue, HwQueueType
from vmodel.iommu.iommufd.hwpt import Hwpt
from vmodel.iommu.iommufd.invalidate import InvalidationError, VtdS1Invalidate
from vmodel.iommu.iommufd.ioas import Ioas
from vmodel.iommu.iommufd.kernel_access import KernelAccess
from vmodel.iommu.iommufd.nested import AmdGuestDte, NestedData, SmmuV3Ste, Stage1, VtdStage1
from vmodel.iommu.iommufd.process import AccountMode, Process, User
from vmodel.iommu.iommufd.registers import AmdInfo, CmdqvInfo, HwInfoType, HwRegisters, SmmuV3Info, VtdInfo
from vmodel.iommu.iommufd.vdevice import Vdevice
from vmodel.iommu.iommufd.veventq import Vevent, Veventq, VeventqType
from vmodel.iommu.iommufd.vfio_compat import VfioCompat
from vmodel.iommu.iommufd.viommu import Viommu, ViommuType
from vmodel.iommu.iommufd.viommu_types import VIOMMUS

__all__ = [
    "VIOMMUS",
    "AccountMode",
    "AmdGuestDte",
    "AmdInfo",
    "CmdqvInfo",
    "Context",
    "Device",
    "DmaBuf",
    "FaultObject",
    "HwCapability",
    "HwInfo",
    "HwInfoType",
    "HwQueue",
    "HwQueueType",
    "HwRegisters",
    "Hwpt",
    "InvalidationError",
    "Ioas",
    "KernelAccess",
    "MemoryFile",
    "NestedData",
    "Object",
    "Option",
    "PageFault",
    "Process",
    "SmmuV3Info",
    "SmmuV3Ste",
    "Stage1",
    "User",
    "Vdevice",
    "Vevent",
    "Veventq",
    "VeventqType",
    "VfioCompat",
    "Viommu",
    "ViommuType",
    "VtdInfo",
    "VtdS1Invalidate",
    "VtdStage1",
]
