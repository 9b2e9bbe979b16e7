"""The mappings of an address space, independent of the domains that they are mapped in."""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from vmodel.errors import Access, IommuError
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import PagingDomain, check_report
from vmodel.iommu.runs import Runs
from vmodel.span import Span

#: The most pages of one mapping without large pages, 4 GiB: each is an entry of its own, which takes time.
MOST_SMALL_PAGES = 1 << 20


class Mapped(Protocol):
    """A mapping of an address space."""

    @property
    def span(self) -> Span:
        """The IOVAs."""

    @property
    def gpa(self) -> int:
        """The GPA of the first."""

    @property
    def access(self) -> Access:
        """What DMA may do."""

    @property
    def cache(self) -> bool:
        """Whether it is mapped with IOMMU_CACHE."""


_M = TypeVar("_M", bound=Mapped)


class Areas(Generic[_M]):
    """A sorted set of mappings that do not overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._by_start: dict[int, _M] = {}
        #: What is mapped: neighbours are one run.
        self.runs = Runs()

    def add(self, area: _M) -> None:
        """Adds a mapping; the caller has checked that it overlaps no other."""
        self._starts.insert(bisect_left(self._starts, area.span.start), area.span.start)
        self._by_start[area.span.start] = area
        self.runs.add(area.span)

    def remove(self, area: _M) -> None:
        """Removes a mapping of the set.  KeyError: it is not in the set."""
        del self._by_start[area.span.start]
        del self._starts[bisect_left(self._starts, area.span.start)]
        self.runs.remove(area.span)

    def over(self, span: Span) -> Iterator[_M]:
        """The mappings that overlap `span`, ascending."""
        at = bisect_left(self._starts, span.start)
        if at and self._by_start[self._starts[at - 1]].span.last >= span.start:
            at -= 1
        while at < len(self._starts) and self._starts[at] <= span.last:  # a copy would take time by what is behind it
            yield self._by_start[self._starts[at]]
            at += 1

    def overlaps(self, span: Span) -> bool:
        """Whether any mapping overlaps `span`."""
        return next(self.over(span), None) is not None

    def __iter__(self) -> Iterator[_M]:
        return (self._by_start[start] for start in list(self._starts))

    def __len__(self) -> int:
        return len(self._starts)


def fill(domain: PagingDomain, areas: Iterable[Mapped]) -> None:
    """Maps all areas in a domain, or none.  IommuError as PagingDomain.map; ENOMEM too many small pages."""
    done: list[Span] = []
    try:
        for area in areas:
            if domain.large_pages:
                domain.map(area.span.start, area.gpa, area.span.size, area.access, cache=area.cache)
            else:
                _fill_small(domain, area)
            done.append(area.span)
    except IommuError:
        for span in done:
            domain.unmap(span.start, span.size)
        raise


def _fill_small(domain: PagingDomain, area: Mapped) -> None:
    """Maps an area page by page, so that any of them can be unmapped alone (Linux batch_iommu_map_small)."""
    page, at = min(domain.page_sizes), 0
    if area.span.size // page > MOST_SMALL_PAGES:
        raise IommuError(errno.ENOMEM, f"{area.span}: more than {MOST_SMALL_PAGES:,} small pages: {domain.name}")
    try:
        for at in range(0, area.span.size, page):
            domain.map(area.span.start + at, area.gpa + at, page, area.access, cache=area.cache)
    except IommuError:
        if at:
            domain.unmap(area.span.start, at)
        raise


def map_in_all(domains: Iterable[PagingDomain], areas: Sequence[Mapped]) -> None:
    """Maps all areas in all domains, or nothing.  IommuError as PagingDomain.map."""
    done: list[PagingDomain] = []
    try:
        for domain in domains:
            fill(domain, areas)
            done.append(domain)
    except IommuError:
        unmap_in_all(done, areas)
        raise


def unmap_in_all(domains: Iterable[PagingDomain], areas: Sequence[Mapped]) -> None:
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
    """The parts of `usable`, which do not overlap, that are not in `taken`, ascending."""
    cuts = sorted(taken)
    found, at = [], 0
    for span in sorted(usable):
        start = span.start
        while start <= span.last and at < len(cuts) and cuts[at].start <= span.last:
            if start < cuts[at].start:
                found.append(Span(start, cuts[at].start - 1))
            start = max(start, cuts[at].last + 1)
            if start <= span.last:  # else it may cut the next one, too
                at += 1
        if start <= span.last:
            found.append(Span(start, span.last))
    return found


def common(one: Iterable[Span], other: Iterable[Span]) -> list[Span]:
    """The intersection of two sets of spans that do not overlap in themselves, ascending."""
    left, right = sorted(one), sorted(other)
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i].overlaps(right[j]):
            found.append(Span(max(left[i].start, right[j].start), min(left[i].last, right[j].last)))
        if left[i].last < right[j].last:
            i += 1
        else:
            j += 1
    return found


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same addresses, ascending, where neighbours are one span."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and found[-1].last + 1 >= span.start:
            span = Span(found[-1].start, max(found.pop().last, span.last))
        found.append(span)
    return found


def merged_dirty(domains: Iterable[PagingDomain], span: Span, page_size: int, clear: bool) -> bytes:
    """The union of the domains' dirty bitmaps for `span`, in the form of PagingDomain.read_dirty.

    IommuError as PagingDomain.read_dirty.
    """
    check_report(span, page_size)
    total, size = 0, (span.size // page_size + 63) // 64 * 8
    for domain in domains:
        total |= int.from_bytes(domain.read_dirty(span, page_size, clear=clear), "little")
    return total.to_bytes(size, "little")
