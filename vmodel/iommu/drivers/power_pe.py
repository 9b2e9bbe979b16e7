"""POWER: partitionable endpoints (PAPR; Linux arch/powerpc/platforms/powernv/pci-ioda.c)."""

from __future__ import annotations

from collections.abc import Hashable

from pydantic import Field

from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.domain import DomainType
from vmodel.iommu.driver import Driver, KindParams, PlatformDevice, Source, topmost
from vmodel.span import GiB, KiB, MiB


class PowerPe(Driver):
    """A host bridge isolates partitionable endpoints (PEs), here one for each bus; without PEs it is a single group.

    A device whose requests carry a bridge's id is in the PE of that id's bus.  The tables (TCEs) are the host's own: no
    guest format is walked.
    """

    kind, title = "power-pe", "POWER PE"
    formats = frozenset()
    default = Capabilities(
        page_sizes=frozenset((4 * KiB, 64 * KiB, 16 * MiB)),
        input_bits=60,
        enforce_snoop=False,  # spapr_tce_iommu_capable
        isolated_msi=False,  # in Linux only Intel, AMD and Arm declare it
        dirty_tracking=False,
        pasid_bits=0,
        nesting=False,
        page_requests=False,
        strict=True,
    )

    class Params(KindParams):
        """Parameters of POWER PEs."""

        without_pe: list[int] = Field(default_factory=list, description="segments whose host bridge has no PEs")
        window32: int = Field(
            default=2 * GiB, ge=0, le=4 * GiB, description="bytes of the default DMA window, which begins at 0"
        )

    def requester_id(self, source: Source) -> int | None:
        if isinstance(source, PlatformDevice):
            return None
        bus = 0 if source.bdf.segment in self.params.without_pe else topmost(source).bus
        return source.bdf.segment << 16 | bus

    def why_not(self, source: Source) -> str:
        return "it is not behind a host bridge"

    def describe_id(self, requester_id: int) -> str:
        return f"PE {requester_id >> 16:04x}:{requester_id & 0xFFFF:02x}"

    def default_domain_type(self, source: Source, max_pasids: int | None) -> DomainType | None:
        return DomainType.IDENTITY

    def partition(self, source: Source) -> tuple[Hashable, str] | None:
        assert not isinstance(source, PlatformDevice)  # it has no id
        segment, bus = source.bdf.segment, topmost(source).bus
        if segment in self.params.without_pe:
            return ("host bridge", segment), f"the host bridge of segment {segment:04x} has no PEs"
        return ("pe", segment, bus), f"bus {segment:04x}:{bus:02x} is one PE"
