"""`Container`: an address space as VFIO type 1 has it (Linux drivers/vfio/vfio_iommu_type1.c, type1v2 rules).

Several groups, of any bus, share one map; behind it is a domain for each kind of IOMMU that they need.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence

from vmodel.errors import Access, IommuError
from vmodel.iommu.areas import Areas, common, fill, holes, map_in_all, merged_dirty
from vmodel.iommu.capabilities import RegionType
from vmodel.iommu.core import paging_domain_alloc
from vmodel.iommu.domain import AllocFlags, Mapping, PagingDomain
from vmodel.iommu.group import Group, can_attach
from vmodel.span import PAGE, Span

#: Mappings that one container may have (the module's dma_entry_limit).
DMA_LIMIT = 65535
_EVERYTHING = Span(0, (1 << 64) - 1)

_numbers = itertools.count(1)


class Container:
    """Groups, and what all of them see."""

    def __init__(self, name: str = "", dma_limit: int = DMA_LIMIT) -> None:
        self.name = name or f"container{next(_numbers)}"
        self.dma_limit = dma_limit
        self._groups: dict[Group, PagingDomain] = {}
        self._areas = Areas()
        self._tracking = False

    def __str__(self) -> str:
        return self.name

    # ---- groups ----------------------------------------------------------------------------

    @property
    def groups(self) -> list[Group]:
        """In the order in which they came."""
        return list(self._groups)

    @property
    def domains(self) -> list[PagingDomain]:
        """Each once."""
        return list(dict.fromkeys(self._groups.values()))

    def add_group(self, group: Group) -> None:
        """Claims a group and shows it the map: through a domain that fits it, or a new one with all mappings in it.

        IommuError: EBUSY it is here already; EPERM, EBUSY, EINVAL as Group.claim_dma_owner; EINVAL a mapping is where
        the group has a reserved region, or does not fit its IOMMU; then nothing has changed.
        """
        if group in self._groups:
            raise IommuError(errno.EBUSY, f"{group} is in {self.name} already")
        group.claim_dma_owner(self)
        try:
            for region in _forbidden(group):
                if self._areas.overlaps(region):
                    raise IommuError(
                        errno.EINVAL, f"{self.name}: a mapping is in a reserved region of {group}, {region}"
                    )
            domain = self._compatible(group) or self._fresh(group)
            group.attach(domain)
        except IommuError:
            group.release_dma_owner(self)
            raise
        self._groups[group] = domain

    def _compatible(self, group: Group) -> PagingDomain | None:
        for domain in self.domains:
            # Tables are shared only where the other IOMMU would have made the very same.
            made_for = domain.made_for
            if made_for is None or made_for.capabilities != group.iommu.capabilities:
                continue
            if all(can_attach(domain, endpoint) is None for endpoint in group.endpoints):
                return domain
        return None

    def _fresh(self, group: Group) -> PagingDomain:
        can, flags = group.iommu.capabilities, AllocFlags.NONE
        if can.dirty_tracking:
            flags |= AllocFlags.DIRTY_TRACKING
        if can.enforce_snoop:
            flags |= AllocFlags.ENFORCE_SNOOP
        domain = paging_domain_alloc(group.endpoints[0], flags)
        try:
            fill(domain, self._areas)
        except IommuError as error:
            text = f"{self.name}: its mappings do not fit {group.iommu.name}: {error.strerror}"
            raise IommuError(errno.EINVAL, text) from None
        if self._tracking:
            domain.set_dirty_tracking(True)  # EOPNOTSUPP: then it stays out
        return domain

    def remove_group(self, group: Group) -> None:
        """Gives a group back; with the last one all mappings go.  IommuError(ENODEV): it is not here."""
        if group not in self._groups:
            raise IommuError(errno.ENODEV, f"{group} is not in {self.name}")
        group.detach()
        group.release_dma_owner(self)
        del self._groups[group]
        if not self._groups:
            self._areas = Areas()
            self._tracking = False

    # ---- what it can do --------------------------------------------------------------------

    @property
    def page_sizes(self) -> frozenset[int]:
        """Those that all domains have; the kernel's own while there is none."""
        sizes = [domain.page_sizes for domain in self.domains]
        return frozenset.intersection(*sizes) if sizes else frozenset((PAGE,))

    @property
    def coherent(self) -> bool:
        """Whether DMA of all members snoops the caches (VFIO_DMA_CC_IOMMU)."""
        return bool(self._groups) and all(domain.enforces_snoop for domain in self.domains)

    @property
    def iova_ranges(self) -> list[Span]:
        """IOVAs that may be mapped: in every aperture, and in no reserved region."""
        ranges: Sequence[Span] = [_EVERYTHING]
        for domain in self.domains:
            ranges = common(ranges, [domain.aperture])
        return holes(ranges, [span for group in self._groups for span in _forbidden(group)])

    @property
    def dma_avail(self) -> int:
        """How many mappings may come still."""
        return self.dma_limit - len(self._areas)

    def mappings(self) -> list[Mapping]:
        """Ascending, as they were made."""
        return list(self._areas)

    # ---- the map ---------------------------------------------------------------------------

    def map(self, iova: int, gpa: int, size: int, access: Access = Access.READ | Access.WRITE) -> None:
        """VFIO_IOMMU_MAP_DMA, with guest memory in place of a process's.

        IommuError: EINVAL not whole pages, no access, wraps, or outside of `iova_ranges`; EEXIST overlaps; ENOSPC too
        many.
        """
        span = self._checked(iova, size, gpa)
        if not access:
            raise IommuError(errno.EINVAL, f"{self.name}: a mapping without read or write access")
        if self._areas.overlaps(span):
            raise IommuError(errno.EEXIST, f"{self.name}: {span} overlaps a mapping")
        if not any(valid.covers(span) for valid in self.iova_ranges):
            raise IommuError(errno.EINVAL, f"{self.name}: {span} is not in the valid IOVA ranges")
        if self.dma_avail <= 0:
            raise IommuError(errno.ENOSPC, f"{self.name} has {self.dma_limit} mappings, which is all it may")
        area = Mapping(span, gpa, access)
        map_in_all(self.domains, area)
        self._areas.add(area)

    def _checked(self, iova: int, size: int, gpa: int = 0) -> Span:
        page = min(self.page_sizes, default=0)
        if not page:
            raise IommuError(errno.EINVAL, f"{self.name}: its IOMMUs have no page size in common")
        if size <= 0 or (iova | gpa | size) & (page - 1) or not 0 <= iova <= iova + size - 1 < 1 << 64:
            raise IommuError(
                errno.EINVAL, f"{self.name}: iova {iova:#x}, {size:#x} bytes: not whole pages of {page:#x}"
            )
        return Span.sized(iova, size)

    def unmap(self, iova: int, size: int) -> int:
        """VFIO_IOMMU_UNMAP_DMA: removes all mappings in the range; bytes removed, 0 when there are none.

        IommuError(EINVAL): not whole pages, or a mapping would be cut; then nothing has changed.
        """
        span = self._checked(iova, size)
        found = list(self._areas.over(span))
        for area in found:
            if not span.covers(area.span):
                raise IommuError(errno.EINVAL, f"{self.name}: unmap of {span} would cut the mapping {area.span}")
        return self._remove(found)

    def unmap_all(self) -> int:
        """VFIO_DMA_UNMAP_FLAG_ALL; bytes removed."""
        return self._remove(list(self._areas))

    def _remove(self, areas: list[Mapping]) -> int:
        for domain in self.domains:
            with domain.gather() as gather:
                for area in areas:
                    gather.unmap(area.span.start, area.span.size)
        for area in areas:
            self._areas.remove(area)
        return sum(area.span.size for area in areas)

    # ---- dirty tracking --------------------------------------------------------------------

    def set_dirty_tracking(self, on: bool) -> None:
        """VFIO_IOMMU_DIRTY_PAGES, start and stop, on all domains.  IommuError(EOPNOTSUPP): one of them cannot."""
        if on and not all(domain.tracks for domain in self.domains):
            raise IommuError(errno.EOPNOTSUPP, f"{self.name}: an IOMMU of it cannot track writes")
        for domain in self.domains:
            if domain.tracks:
                domain.set_dirty_tracking(on)
        self._tracking = on

    def read_dirty(self, span: Span, page_size: int = PAGE) -> bytes:
        """Reads and clears: what any member has written to, as PagingDomain.read_dirty.  IommuError(EINVAL)."""
        if not self._tracking:
            raise IommuError(errno.EINVAL, f"{self.name}: dirty tracking is off")
        return merged_dirty(self.domains, span, page_size, True)


def _forbidden(group: Group) -> list[Span]:
    """Where a user may not map; relaxable regions go when a user comes, and doorbells are placed by software."""
    free = (RegionType.DIRECT_RELAXABLE, RegionType.SW_MSI)
    return [region.span for region in group.reserved_regions if region.type not in free]
