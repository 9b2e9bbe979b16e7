"""What the models of IOMMUs that a guest drives have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vmodel.device import PciDevice
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.system import System


class IommuDevice(PciDevice):
    """A PCI function by which a guest drives one of the machine's IOMMUs.

    The groups and domains are those of `iommu` and `system`, so whatever the guest does can be looked at there.
    """

    iommu: Iommu
    system: System
    #: All devices of the machine by name; one of them may have to send a message that this function cannot.
    peers: Mapping[str, PciDevice] = {}
    #: VT-d: the address of the registers, which DMAR names and the firmware has to choose.
    base: ClassVar[int] = 0

    def serve(self, iommu: Iommu, system: System) -> None:
        """Called once all endpoints are there, before the device is served.

        ConfigError: its capabilities are none that such an IOMMU can have.
        """
        self.iommu = iommu
        self.system = system

    def covered(self) -> list[Endpoint]:
        """The endpoints behind it; what has no group is not translated, and not for the guest to know of."""
        return [e for e in self.system.endpoints if e.iommu is self.iommu and e.group is not None]
