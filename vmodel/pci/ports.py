"""Kinds of ports, and the controls of ACS."""

from __future__ import annotations

import enum


class PortType(enum.Enum):
    """What a function is on the fabric (PCIe 7.5.3.2, Device/Port Type)."""

    ENDPOINT = "PCIe endpoint"
    INTEGRATED = "root complex integrated endpoint"
    CONVENTIONAL = "conventional PCI device"
    ROOT_PORT = "root port"
    UPSTREAM = "switch upstream port"
    DOWNSTREAM = "switch downstream port"
    PCIE_TO_PCI = "PCIe-to-PCI bridge"
    PCI_TO_PCIE = "PCI-to-PCIe bridge"
    PCI_BRIDGE = "conventional PCI bridge"

    @property
    def is_bridge(self) -> bool:
        """Whether there is a secondary bus."""
        return self not in (PortType.ENDPOINT, PortType.INTEGRATED, PortType.CONVENTIONAL)


class AcsFlags(enum.IntFlag):
    """Bits of the ACS control register (PCIe 7.7.11.3)."""

    NONE = 0
    SOURCE_VALIDATION = 1
    TRANSLATION_BLOCKING = 2
    REQUEST_REDIRECT = 4
    COMPLETION_REDIRECT = 8
    UPSTREAM_FORWARDING = 16
    EGRESS_CONTROL = 32
    DIRECT_TRANSLATED = 64


#: The controls that isolation needs, as far as the port supports them; Linux's REQ_ACS_FLAGS.
ISOLATION = (
    AcsFlags.SOURCE_VALIDATION | AcsFlags.REQUEST_REDIRECT | AcsFlags.COMPLETION_REDIRECT | AcsFlags.UPSTREAM_FORWARDING
)
