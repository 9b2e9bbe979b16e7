"""AMD-Vi (AMD I/O Virtualization Technology specification, 48882)."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from vmodel.iommu.capabilities import X86_MSI, Capabilities
from vmodel.iommu.coherency import Coherency
from vmodel.iommu.domain import AllocFlags, DomainType
from vmodel.iommu.driver import (
    GENERIC_PT,
    Driver,
    KindParams,
    PlatformDevice,
    Refusal,
    Source,
    bdf_text,
    pci_id,
    topmost,
)
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.pci.topology import Bdf
from vmodel.span import KiB

_Address = Annotated[str, AfterValidator(bdf_text)]


class AmdVi(Driver):
    """Each segment has a device table; the IVRS gives the requester id of each device's requests (5.2.2, alias)."""

    kind, title = "amd-vi", "AMD-Vi"
    in_ivrs = nested_by_viommu = True
    formats = frozenset((TableFormat.AMD_V1, TableFormat.X86))
    nested_formats = frozenset((TableFormat.X86,))
    map_errors = GENERIC_PT
    coherency = Coherency(enforces=True, always=True)  # PT_FEAT_AMDV1_FORCE_COHERENCE: each entry has FC
    # Version 1 tables can do these, and version 2 tables PASIDs (amd_iommu_domain_alloc_paging_flags).
    not_for_pasids = AllocFlags.NEST_PARENT | AllocFlags.DIRTY_TRACKING
    # Version 1 tables support every power of two (2.2.3).
    default = Capabilities(
        page_sizes=frozenset(4 * KiB << n for n in range(36)), fault_queue_depth=512, reserved=(X86_MSI,)
    )

    class Params(KindParams):
        """Parameters of AMD-Vi."""

        aliases: dict[_Address, _Address] = Field(
            default_factory=dict, description="device to the address that its requests carry"
        )
        acpi_hid: dict[str, _Address] = Field(
            default_factory=dict, description="ACPI devices: name to the address that their requests carry"
        )
        device_table: int = Field(default=65536, ge=1, le=65536, description="entries of each segment's device table")

        @field_validator("aliases")
        @classmethod
        def _one_segment(cls, aliases: dict[str, str]) -> dict[str, str]:
            for device, alias in aliases.items():
                if Bdf.parse(device).segment != Bdf.parse(alias).segment:
                    raise ValueError(f"{device} to {alias}: each segment has a table of its own")
            return aliases

    def refuses_sva(self, capabilities: Capabilities, table: Table, *, has_ats: bool) -> Refusal | None:
        """Linux amd_iommu_domain_alloc_sva checks nothing, iommu_sva_set_dev_pasid only the PASID."""
        return None

    def requester_id(self, source: Source) -> int | None:
        if isinstance(source, PlatformDevice):
            text = self.params.acpi_hid.get(source.name)
        else:
            seen = topmost(source)
            aliases = self.params.aliases
            text = aliases.get(str(source.bdf)) or aliases.get(str(seen)) or str(seen)
        if text is None:
            return None
        bdf = Bdf.parse(text)
        return pci_id(bdf) if bdf.rid < self.params.device_table else None

    def why_not(self, source: Source) -> str:
        return f"it has no entry in the device table of {self.params.device_table} entries"

    def default_domain_type(self, source: Source, max_pasids: int | None) -> DomainType | None:
        # GPUs with PASIDs; Linux amd_iommu_def_domain_type, without memory encryption.
        return DomainType.IDENTITY if max_pasids else None
