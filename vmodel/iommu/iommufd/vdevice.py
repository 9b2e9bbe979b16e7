"""`Vdevice`: a device of a VM behind a vIOMMU (Linux drivers/iommu/iommufd/viommu.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmodel.iommu.iommufd.context import Object

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.device import Device
    from vmodel.iommu.iommufd.viommu import Viommu


class Vdevice(Object):
    """The id that a VM knows a device by (IOMMU_VDEVICE_ALLOC); `Viommu.vdevice_alloc` makes it.

    If its device is destroyed first, it goes with it: its id is never used again (Linux: a tombstone).
    """

    def __init__(self, viommu: Viommu, device: Device, virt_id: int) -> None:
        super().__init__(viommu.context)
        self.viommu = viommu
        self.device = device
        self.virt_id = virt_id
        viommu.users += 1
        device.vdevice = self
        viommu.vdevices[virt_id] = self

    def release(self) -> None:
        del self.viommu.vdevices[self.virt_id]
        self.viommu.users -= 1
        self.device.vdevice = None
