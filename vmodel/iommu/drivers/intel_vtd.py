"""Intel VT-d (specification 4.1)."""

from __future__ import annotations

import errno
from typing import Annotated

from pydantic import AfterValidator, Field

from vmodel.iommu.capabilities import X86_MSI, Capabilities
from vmodel.iommu.coherency import Coherency
from vmodel.iommu.domain import AllocFlags
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


class IntelVtd(Driver):
    """Requests carry a source-id (3.4.1): bus, device and function nearest to the root; a DRHD covers one segment."""

    kind, title = "vt-d", "Intel VT-d"
    formats = frozenset((TableFormat.VTD_SECOND, TableFormat.X86))
    nested_formats = frozenset((TableFormat.X86,))
    map_errors = GENERIC_PT
    coherency = Coherency(enforces=True)
    parent_writable = True
    served_params = frozenset(("scalable", "ats", "caching_mode"))
    default = Capabilities(input_bits=48, fault_queue_depth=8, reserved=(X86_MSI,))

    class Params(KindParams):
        """Parameters of VT-d."""

        namespace: dict[Annotated[str, Field(pattern=r"^[!-~]{1,255}$")], Annotated[str, AfterValidator(bdf_text)]] = (
            Field(
                default_factory=dict,
                max_length=255,
                description="ACPI namespace devices (DMAR ANDD): name to the address that their requests carry",
            )
        )
        scalable: bool = Field(
            False, description="a guest may use scalable mode: PASIDs, first-stage and nested tables"
        )
        ats: bool = Field(False, description="a guest may enable ATS for devices, and in scalable mode page requests")
        caching_mode: bool = Field(
            False, description="CAP.CM: the guest invalidates what it maps, too, and entries are read ahead of accesses"
        )
        report_stale: bool = Field(False, description="log and count each use of a stale translation")

    def snoop_by_entry(self, flags: AllocFlags) -> bool:
        # Second-stage entries have SNP; with first-stage tables PGSNP of the PASID entry is for all of them.  Linux
        # takes first-stage ones where it can (intel_iommu_domain_alloc_first_stage).
        return not self.params.scalable or bool(flags & (AllocFlags.NEST_PARENT | AllocFlags.DIRTY_TRACKING))

    def refuses_sva(self, capabilities: Capabilities, table: Table, *, has_ats: bool) -> Refusal | None:
        """Linux intel_svm_check, intel_iommu_sva_supported: the unit can do it, and the device has PASIDs and ATS."""
        if not capabilities.coherent:
            return Refusal("coherency: walks do not snoop the CPU's caches", errno.ENODEV)
        if table.levels == 5 and capabilities.input_bits < 57:
            return Refusal("paging mode: it does not walk 5 levels", errno.ENODEV)
        return None if has_ats else Refusal("ATS: the device has none", errno.EINVAL)

    def requester_id(self, source: Source) -> int | None:
        if isinstance(source, PlatformDevice):
            text = self.params.namespace.get(source.name)
            return None if text is None else pci_id(Bdf.parse(text))
        return pci_id(topmost(source))
