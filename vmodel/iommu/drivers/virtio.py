"""virtio-iommu (VIRTIO 1.3, 5.13)."""

from __future__ import annotations

import errno
from typing import Annotated

from pydantic import Field

from vmodel.iommu.capabilities import X86_MSI, Capabilities
from vmodel.iommu.driver import Driver, KindParams, MapErrors, PlatformDevice, Source, topmost
from vmodel.span import KiB


class VirtioIommu(Driver):
    """Devices have endpoint ids, which VIOT assigns to PCI requester ids and MMIO devices; requests make mappings."""

    kind, title = "virtio-iommu", "virtio-iommu"
    formats = frozenset()
    own_tables = True
    map_errors = MapErrors(overlap=errno.EINVAL)  # the device answers INVAL (virtio 5.13.6.5.2)
    default = Capabilities(
        page_sizes=frozenset(4 * KiB << n for n in range(52)),
        input_bits=48,
        enforce_snoop=False,  # viommu_capable
        isolated_msi=False,  # it remaps no interrupts
        pasid_bits=0,
        nesting=False,
        page_requests=False,
        dirty_tracking=False,  # viommu_ops has no domain_alloc_paging_flags
        reserved=(X86_MSI,),
    )

    class Params(KindParams):
        """Parameters of virtio-iommu."""

        first_endpoint: int = Field(
            default=0, ge=0, lt=1 << 32, description="endpoint id of 0000:00:00.0; others follow"
        )
        mmio: dict[str, Annotated[int, Field(ge=0, lt=1 << 32)]] = Field(
            default_factory=dict, description="devices that are not PCI: their endpoint ids"
        )

    def requester_id(self, source: Source) -> int | None:
        if isinstance(source, PlatformDevice):
            found: int | None = self.params.mmio.get(source.name)
            return found
        seen = topmost(source)
        endpoint = int(self.params.first_endpoint) + (seen.segment << 16 | seen.rid)
        return endpoint if endpoint < 1 << 32 else None

    def why_not(self, source: Source) -> str:
        return "VIOT assigns no endpoint id to it"

    def describe_id(self, requester_id: int) -> str:
        return f"endpoint {requester_id:#x}"
