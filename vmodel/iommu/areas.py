"""The mappings of an address space, independent of the domains that they are mapped in."""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from vmodel.errors import IommuError
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import Mapping, PagingDomain
from vmodel.span import PAGE, Span


class Areas:
    """A sorted set of mappings that do not overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._by_start: dict[int, Mapping] = {}

    def add(self, area: Mapping) -> None:
        """Adds a mapping; the caller has checked that it overlaps no other."""
        self._starts.insert(bisect_left(self._starts, area.span.start), area.span.start)
        self._by_start[area.span.start] = area

    def remove(self, area: Mapping) -> None:
        """Removes a mapping of the set.  KeyError: it is not in the set."""
        del self._starts[bisect_left(self._starts, area.span.start)]
        del self._by_start[area.span.start]

    def over(self, span: Span) -> Iterator[Mapping]:
        """The mappings that overlap `span`, ascending."""
        at = bisect_left(self._starts, span.start)
        if at and self._by_start[self._starts[at - 1]].span.last >= span.start:
            at -= 1
        for start in self._starts[at:]:
            if start > span.last:
                return
            yield self._by_start[start]

    def overlaps(self, span: Span) -> bool:
        """Whether any mapping overlaps `span`."""
        return next(self.over(span), None) is not None

    def __iter__(self) -> Iterator[Mapping]:
        return (self._by_start[start] for start in list(self._starts))

    def __len__(self) -> int:
        return len(self._starts)


def fill(domain: PagingDomain, areas: Iterable[Mapping]) -> None:
    """Maps all areas in a domain, or none.  IommuError as PagingDomain.map."""
    done: list[Mapping] = []
    try:
        for area in areas:
            domain.map(area.span.start, area.gpa, area.span.size, area.access)
            done.append(area)
    except IommuError:
        for area in done:
            domain.unmap(area.span.start, area.span.size)
        raise


def map_in_all(domains: Iterable[PagingDomain], areas: Sequence[Mapping]) -> None:
    """Maps all areas in all domains, or nothing.  IommuError as PagingDomain.map."""
    done: list[PagingDomain] = []
    try:
        for domain in domains:
            fill(domain, areas)
            done.append(domain)
    except IommuError:
        unmap_in_all(done, areas)
        raise


def unmap_in_all(domains: Iterable[PagingDomain], areas: Sequence[Mapping]) -> None:
    """Unmaps areas from all domains, which must have them, with one IOTLB flush for each domain."""
    for domain in domains:
        with domain.gather() as gather:
            for area in areas:
                gather.unmap(area.span.start, area.span.size)


def off_limits(regions: Iterable[ReservedRegion]) -> list[Span]:
    """The spans that a user may not map: all reserved regions except relaxable ones.

    (The kernel uses SW_MSI regions for interrupt doorbells.)
    """
    return [region.span for region in regions if region.type is not RegionType.DIRECT_RELAXABLE]


def holes(usable: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """The parts of `usable` that are not in `taken`, ascending."""
    left = sorted(usable)
    for cut in sorted(taken):
        kept: list[Span] = []
        for span in left:
            if not span.overlaps(cut):
                kept.append(span)
                continue
            if span.start < cut.start:
                kept.append(Span(span.start, cut.start - 1))
            if cut.last < span.last:
                kept.append(Span(cut.last + 1, span.last))
        left = kept
    return left


def common(one: Iterable[Span], other: Iterable[Span]) -> list[Span]:
    """The intersection of two sets of spans, ascending."""
    other = list(other)
    return sorted(Span(max(a.start, b.start), min(a.last, b.last)) for a in one for b in other if a.overlaps(b))


def merged_dirty(domains: Iterable[PagingDomain], span: Span, page_size: int, clear: bool) -> bytes:
    """The union of the domains' dirty bitmaps for `span`, in the form of PagingDomain.read_dirty.

    IommuError(EINVAL): `span` is not made of whole pages of `page_size`.
    """
    if page_size < PAGE or page_size & (page_size - 1) or (span.start | span.size) & (page_size - 1):
        raise IommuError(errno.EINVAL, f"dirty report of {span}: not whole pages of {page_size:#x}")
    total, size = 0, (span.size // page_size + 63) // 64 * 8
    for domain in domains:
        total |= int.from_bytes(domain.read_dirty(span, page_size, clear=clear), "little")
    return total.to_bytes(size, "little")
