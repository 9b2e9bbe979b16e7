"""Arm SMMUv3 (IHI 0070)."""

from __future__ import annotations

import errno
from typing import Annotated, Literal

from pydantic import Field

from vmodel.iommu.capabilities import ARM_MSI, Capabilities
from vmodel.iommu.coherency import Coherency
from vmodel.iommu.domain import DomainType
from vmodel.iommu.driver import Driver, KindParams, PlatformDevice, Refusal, Source, topmost
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.span import KiB

#: Vendor and device id of HiSilicon's tuning and trace device, which must be mapped 1:1 (Linux IS_HISI_PTT_DEVICE).
_HISI_PTT = (0x19E5, 0xA12E)


class StreamMap(KindParams):
    """An id mapping of the IORT: from requester ids of one segment to stream ids."""

    segment: int = Field(default=0, ge=0, lt=1 << 16, description="the PCI segment")
    first_rid: int = Field(default=0, ge=0, lt=1 << 16, description="the first requester id")
    count: int = Field(default=1 << 16, ge=1, le=1 << 16, description="number of requester ids")
    first_stream: int = Field(ge=0, lt=1 << 32, description="stream id of the first one; the others follow")


class SmmuV3(Driver):
    """Each device has a stream id; tables are stage 1, stage 2, or stage 1 over stage 2 (3.2, 3.3)."""

    kind, title = "smmu-v3", "Arm SMMUv3"
    formats = frozenset((TableFormat.ARM_S1, TableFormat.ARM_S2))
    nested_formats = frozenset((TableFormat.ARM_S1,))
    own_tables = parent_alone = nested_by_viommu = True
    coherency = Coherency(enforces=True, by_mapping=True)  # the entry's memory type; `enforce_snoop` is CANWBS
    default = Capabilities(
        input_bits=48, output_bits=48, enforce_snoop=False, stall=True, fault_queue_depth=128, reserved=(ARM_MSI,)
    )

    class Params(KindParams):
        """Parameters of SMMUv3."""

        streams: list[StreamMap] | None = Field(
            default=None, description="requester ids to stream ids; without it, segment << 16 | requester id"
        )
        platform: dict[str, Annotated[int, Field(ge=0, lt=1 << 32)]] = Field(
            default_factory=dict, description="devices that are not PCI: their stream ids"
        )
        vcmdqs: Literal[0, 1, 2, 4, 8, 16, 32, 64, 128] = Field(
            default=0, description="command queues for each VM, by NVIDIA's CMDQ-V (iommufd's HW_QUEUE); 0: no CMDQ-V"
        )
        s2fwb: bool = Field(
            default=True, description="stage 2 forces memory to be cached; without it a device needs CANWBS for vIOMMUs"
        )
        stream_bits: int = Field(default=32, ge=1, le=32, description="width of stream ids")

    @property
    def stage1_bypasses(self) -> bool:
        return not self.params.s2fwb

    def cache_coherency(self, capabilities: Capabilities) -> bool:
        """Linux ARM_SMMU_FEAT_COHERENCY: DMA is coherent with caches if walks are."""
        return capabilities.coherent

    def refuses_sva(self, capabilities: Capabilities, table: Table, *, has_ats: bool) -> Refusal | None:
        """Linux arm_smmu_sva_supported: the SMMU walks coherently, and has the CPU's pages and widths."""
        wanted = (
            (capabilities.coherent, "coherency: walks do not snoop the CPU's caches"),
            (4 * KiB in capabilities.page_sizes, "page sizes: there are none of 4 KiB"),
            (table.output_bits <= capabilities.output_bits, "output width: the CPU's is larger"),
        )
        return next((Refusal(text, errno.EOPNOTSUPP) for good, text in wanted if not good), None)

    def requester_id(self, source: Source) -> int | None:
        stream = self._stream(source)
        return stream if stream is not None and 0 <= stream < 1 << self.params.stream_bits else None

    def _stream(self, source: Source) -> int | None:
        if isinstance(source, PlatformDevice):
            found: int | None = self.params.platform.get(source.name)
            return found
        seen = topmost(source)
        if self.params.streams is None:
            return seen.segment << 16 | seen.rid
        for entry in self.params.streams:
            if entry.segment == seen.segment and entry.first_rid <= seen.rid < entry.first_rid + entry.count:
                return int(entry.first_stream + seen.rid - entry.first_rid)
        return None

    def why_not(self, source: Source) -> str:
        return f"it has no stream id of {self.params.stream_bits} bits"

    def describe_id(self, requester_id: int) -> str:
        return f"stream {requester_id:#x}"

    def default_domain_type(self, source: Source, max_pasids: int | None) -> DomainType | None:
        identity = None if isinstance(source, PlatformDevice) else source.identity
        found = identity is not None and (identity.vendor_id, identity.device_id) == _HISI_PTT
        return DomainType.IDENTITY if found else None
