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


def map_direct(domain: Domain, endpoint: Endpoint) -> list[Span]:
    """Maps the regions that a device uses without its driver, or none; returns what was not mapped before.

    IommuError: EEXIST something else is mapped there; else as PagingDomain.map.  (Linux
    iommu_create_device_direct_mappings)
    """
    done: list[Span] = []
    try:
        _map(domain, endpoint, done)
    except IommuError:
        unmap_direct(domain, done)
        raise
    return done


def unmap_direct(domain: Domain, spans: list[Span]) -> None:
    """Takes back what `map_direct` has mapped."""
    if isinstance(domain, PagingDomain):
        for span in spans:
            domain.clear(span)


def _map(domain: Domain, endpoint: Endpoint, done: list[Span]) -> None:
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
                done.append(Span(at, there.span.start - 1))
            at = there.span.last + 1
        if at <= span.last:
            domain.map(at, at, span.last - at + 1, region.access)
            done.append(Span(at, span.last))
