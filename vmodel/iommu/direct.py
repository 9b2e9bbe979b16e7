"""`map_direct`: the 1:1 mappings of regions that a device uses without its driver."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vmodel.errors import IommuError
from vmodel.iommu.capabilities import RegionType
from vmodel.iommu.domain import Domain, PagingDomain
from vmodel.span import Span

if TYPE_CHECKING:
    from vmodel.iommu.endpoint import Endpoint


def map_direct(domain: Domain, endpoint: Endpoint) -> None:
    """Maps the regions that a device uses without its driver (Linux iommu_create_device_direct_mappings)."""
    if not isinstance(domain, PagingDomain):
        return
    page = min(domain.page_sizes)
    for region in endpoint.reserved:
        if region.type not in (RegionType.DIRECT, RegionType.DIRECT_RELAXABLE):
            continue
        span = Span(region.span.start // page * page, region.span.last // page * page + page - 1)
        at = span.start
        # Another member may have mapped the region, or a part of it, before.
        for there in [m for m in domain.mappings() if m.span.overlaps(span)]:
            if there.span.start != there.gpa:
                text = f"{endpoint.name} must have {span} mapped 1:1, but {there.span} is mapped to {there.gpa:#x}"
                raise IommuError(errno.EEXIST, text)
            if at < there.span.start:
                domain.map(at, at, there.span.start - at, region.access)
            at = there.span.last + 1
        if at <= span.last:
            domain.map(at, at, span.last - at + 1, region.access)
