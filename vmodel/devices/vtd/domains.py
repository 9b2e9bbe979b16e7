"""The domains that entries in guest memory describe."""

from __future__ import annotations

from collections.abc import Iterable

from vmodel.devices.vtd.tables import Entry
from vmodel.iommu.allocate import walked_domain_alloc
from vmodel.iommu.domain import AllocFlags, Domain, DomainType, PagingDomain, TableDomain
from vmodel.iommu.drivers.vtd_capability import Ecap, VtdCap
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat
from vmodel.memory import GuestMemory
from vmodel.span import PAGE, Span


def walked_domain(
    endpoint: Endpoint, memory: GuestMemory, entry: Entry, cap: VtdCap, ecap: Ecap, output_bits: int
) -> TableDomain:
    """A domain that walks the tables of an entry that does not pass through.  IommuError as walked_domain_alloc."""
    domain = None
    if entry.second_levels:
        bits = min(12 + 9 * entry.second_levels, cap.MGAW + 1)
        flags = _flags(entry, cap, ecap)
        table = Table(TableFormat.VTD_SECOND, entry.second_levels, entry.second, bits, output_bits, flags)
        domain = walked_domain_alloc(endpoint, memory, table)
    if entry.first_levels:
        bits = 12 + 9 * entry.first_levels
        table = Table(TableFormat.X86, entry.first_levels, entry.first, bits, output_bits)
        domain = walked_domain_alloc(endpoint, memory, table, domain)
    assert domain is not None
    domain.name = f"domain-id {entry.domain_id}"
    if entry.pasid is not None:
        domain.name += f", {entry.stage.name.lower()} stage, pasid {entry.pasid}"
    return domain


def _flags(entry: Entry, cap: VtdCap, ecap: Ecap) -> TableFlag:
    flags = TableFlag(0)
    for flag, there in (
        (TableFlag.PAGES_2M, cap.SLLPS & 1),
        (TableFlag.PAGES_1G, cap.SLLPS & 2),
        (TableFlag.SNOOP, ecap.SC),
        (TableFlag.SET_ACCESSED | TableFlag.SET_DIRTY, entry.sets_flags),
    ):
        flags |= flag if there else 0
    return flags


def identity_without(iommu: Iommu, spans: Iterable[Span]) -> Domain:
    """An identity domain without `spans`."""
    holes = sorted(spans)
    if not holes:
        return iommu.identity
    domain = PagingDomain(DomainType.UNMANAGED, iommu, AllocFlags.NONE, "identity but protected memory")
    at = (domain.aperture.start + PAGE - 1) // PAGE * PAGE
    end = (min(domain.aperture.last, (1 << domain.output_bits) - 1) + 1) // PAGE * PAGE
    for hole in [*holes, Span(end, end)]:
        if at < min(hole.start, end):
            domain.map(at, at, min(hole.start, end) - at)
        at = max(at, hole.last + 1)
    return domain
