"""RISC-V IOMMU (RISC-V IOMMU Architecture Specification 1.0; Linux drivers/iommu/riscv)."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.coherency import Coherency
from vmodel.iommu.driver import GENERIC_PT, Driver, KindParams, PlatformDevice, Source, topmost
from vmodel.iommu.pgtable import TableFormat, page_bits
from vmodel.span import KiB, Span

#: Levels of tables by the width of virtual addresses: Sv39, Sv48 and Sv57 (privileged specification, 12.4 to 12.6).
_LEVELS = {39: 3, 48: 4, 57: 5}
#: How many bits of a device id each level of the directory resolves; the extended format has larger leaves (2.1).
_DIRECTORY_BITS = {False: (7, 9, 8), True: (6, 9, 9)}


def _usable(input_bits: int) -> Span:
    """The lower half, as Linux uses it: addresses are signed (generic_pt, PT_FEAT_SIGN_EXTEND)."""
    return Span(0, (1 << (input_bits - 1)) - 1)


def _page_sizes(input_bits: int) -> frozenset[int]:
    """Each level has pages, and 16 entries of the lowest level make 64 KiB (Svnapot, which an IOMMU must have: 6.4)."""
    return frozenset((64 * KiB, *(1 << page_bits(level) for level in range(1, _LEVELS[input_bits] + 1))))


class DeviceMap(KindParams):
    """An id mapping of the RIMT, or an `iommu-map` of a device tree: from requester ids of a segment to device ids."""

    segment: int = Field(default=0, ge=0, lt=1 << 16, description="the PCI segment")
    first_rid: int = Field(default=0, ge=0, lt=1 << 16, description="the first requester id")
    count: int = Field(default=1 << 16, ge=1, le=1 << 16, description="number of requester ids")
    first_device: int = Field(ge=0, lt=1 << 24, description="device id of the first one; the others follow")


class RiscV(Driver):
    """Each device has a device id, of which the levels of the device directory limit the width (2.1).

    Linux 7.3 has paging, identity and blocked domains for it, without flags; no PASIDs, ATS or page requests.
    """

    kind, title = "riscv", "RISC-V IOMMU"
    formats = frozenset((TableFormat.RISCV_S1, TableFormat.RISCV_S2))
    nested_formats = frozenset((TableFormat.RISCV_S1,))
    map_errors = GENERIC_PT
    coherency = Coherency(by_mapping=True)  # Svpbmt: without IOMMU_CACHE entries have NC (riscvpt_iommu_set_prot)
    misfit = errno.ENODEV  # Linux riscv_iommu_attach_paging_domain
    default = Capabilities(
        page_sizes=_page_sizes(57),
        input_bits=57,
        output_bits=56,
        enforce_snoop=False,
        isolated_msi=False,  # in Linux only Intel, AMD and Arm declare it
        dirty_tracking=False,
        pasid_bits=0,
        nesting=False,
        page_requests=False,
        fault_queue_depth=4096,  # Linux RISCV_IOMMU_DEF_FQ_COUNT
    )

    class Params(KindParams):
        """Parameters of a RISC-V IOMMU."""

        devices: list[DeviceMap] | None = Field(
            default=None, description="requester ids to device ids; without it, segment << 16 | requester id"
        )
        platform: dict[str, Annotated[int, Field(ge=0, lt=1 << 32)]] = Field(
            default_factory=dict, description="devices that are not PCI: their device ids"
        )
        directory_levels: int = Field(default=3, ge=1, le=3, description="levels of the device directory")
        extended: bool = Field(
            default=True, description="extended device contexts (MSI_FLAT): 6, 15 or 24 bits of ids, else 7, 16 or 24"
        )
        cache_coherency: bool = Field(
            default=False, description="as if Linux declared IOMMU_CAP_CACHE_COHERENCY: VFIO and iommufd accept devices"
        )

    @property
    def id_bits(self) -> int:
        """The width of device ids (Linux riscv_iommu_get_dc)."""
        return sum(_DIRECTORY_BITS[self.params.extended][: self.params.directory_levels])

    def fit(self, capabilities: Capabilities) -> Capabilities:
        width = capabilities.input_bits
        if width not in _LEVELS:
            raise ValueError(f"input_bits must be 39, 48 or 57 (Sv39, Sv48, Sv57), not {width}")
        if capabilities.page_sizes == self.default.page_sizes:
            capabilities = replace(capabilities, page_sizes=_page_sizes(width))
        usable = _usable(width)
        if not usable.covers(capabilities.aperture or usable):
            raise ValueError(f"the aperture {capabilities.aperture} is not in the lower half, {usable}")
        return replace(capabilities, aperture=capabilities.aperture or usable)

    def cache_coherency(self, capabilities: Capabilities) -> bool:
        """Linux's driver has no `capable`, so that device_iommu_capable() is false for everything."""
        return bool(self.params.cache_coherency)

    def requester_id(self, source: Source) -> int | None:
        device = self._device(source)
        return device if device is not None and 0 <= device < 1 << self.id_bits else None

    def _device(self, source: Source) -> int | None:
        if isinstance(source, PlatformDevice):
            found: int | None = self.params.platform.get(source.name)
            return found
        seen = topmost(source)
        if self.params.devices is None:
            return seen.segment << 16 | seen.rid
        for entry in self.params.devices:
            if entry.segment == seen.segment and entry.first_rid <= seen.rid < entry.first_rid + entry.count:
                return int(entry.first_device + seen.rid - entry.first_rid)
        return None

    def why_not(self, source: Source) -> str:
        return f"it has no device id of {self.id_bits} bits"

    def describe_id(self, requester_id: int) -> str:
        return f"device id {requester_id:#x}"
