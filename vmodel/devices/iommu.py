"""The base class of the models of IOMMUs that a guest drives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vmodel.device import PciDevice
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.system import System


class IommuDevice(PciDevice):
    """A PCI function by which a guest drives one of the machine's IOMMUs.

    The guest's requests change the groups and domains of `iommu` and `system`, where tests can inspect them.
    """

    iommu: Iommu
    system: System
    #: All devices of the machine by name; VT-d sends its interrupt messages through one of them.
    peers: Mapping[str, PciDevice] = {}
    #: VT-d: the address of the registers that DMAR gives, at which the firmware has to place BAR0.
    base: ClassVar[int] = 0

    def serve(self, iommu: Iommu, system: System) -> None:
        """Connects the function to its IOMMU: called once all endpoints exist, before the device is served.

        ConfigError: such an IOMMU cannot have these capabilities.
        """
        self.iommu = iommu
        self.system = system

    def covered(self) -> list[Endpoint]:
        """The endpoints behind this IOMMU, without those that have no group: they are not translated."""
        return [e for e in self.system.endpoints if e.iommu is self.iommu and e.group is not None]
