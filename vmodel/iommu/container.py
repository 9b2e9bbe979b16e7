"""`Container`: an address space of VFIO type 1 (Linux drivers/vfio/vfio_iommu_type1.c, type1v2 rules).

Several groups, of any bus, share one set of mappings, in one domain for each kind of IOMMU among them.

A container without a group has no IOMMU, and operations that need one are EINVAL, as in Linux
(drivers/vfio/container.c).  Adding the first group is VFIO_GROUP_SET_CONTAINER and VFIO_SET_IOMMU in one; removing the
last group removes the IOMMU.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Sequence

from vmodel.closing import Closing
from vmodel.errors import Access, IommuError
from vmodel.iommu.allocate import paging_domain_alloc
from vmodel.iommu.areas import Areas, common, fill, holes, map_in_all, off_limits, unmap_in_all
from vmodel.iommu.domain import AllocFlags, Mapping, PagingDomain
from vmodel.iommu.group import Group, shares_tables
from vmodel.iommu.locking import locked
from vmodel.span import PAGE, Span

#: The default limit of mappings in one container (parameter dma_entry_limit of the Linux module).
DMA_LIMIT = 65535
#: The most pages of a dirty report (Linux DIRTY_BITMAP_PAGES_MAX).
_MOST_DIRTY = (1 << 31) - 1
_EVERYTHING = Span(0, (1 << 64) - 1)

_numbers = itertools.count(1)


class Container(Closing):
    """Groups with a common set of mappings.  `dma_limit`: the most mappings.

    Any thread may call it.  A context manager: `close` gives the groups back.
    """

    def __init__(
        self,
        name: str = "",
        dma_limit: int = DMA_LIMIT,
        *,
        allow_unsafe_interrupts: bool = False,
        enforce_snoop: bool = True,
    ) -> None:
        """`allow_unsafe_interrupts`: also groups whose MSIs are not isolated (the parameter of vfio_iommu_type1).

        `enforce_snoop`: DMA is made to snoop where that is possible, as Linux always does it; False shows what happens
        without.
        """
        self.allow_unsafe_interrupts = allow_unsafe_interrupts
        self.enforce_snoop = enforce_snoop
        self.lock = threading.RLock()
        self._closed = False
        self.name = name or f"container{next(_numbers)}"
        self.dma_limit = dma_limit
        self._groups: dict[Group, PagingDomain] = {}
        self._areas = Areas[Mapping]()
        self._tracking = False

    def __str__(self) -> str:
        return self.name

    # ---- groups ----------------------------------------------------------------------------

    @property
    @locked
    def groups(self) -> list[Group]:
        """The groups, in the order in which they were added."""
        return list(self._groups)

    @property
    @locked
    def domains(self) -> list[PagingDomain]:
        """The domains of the groups, each once."""
        return list(dict.fromkeys(self._groups.values()))

    @locked
    def add_group(self, group: Group) -> None:
        """Claims a group, and attaches it to a domain that fits it, or to a new one with all mappings.

        IommuError: EINVAL the group is already in this or another container, its DMA is not coherent with caches
        (IOMMU_CAP_CACHE_COHERENCY), a mapping overlaps one of its reserved regions or is beyond its aperture, or it has
        no address or page size in common with the others; EPERM its MSIs are not isolated; EBUSY, EPERM as
        Group.claim_dma_owner; else as PagingDomain.map of the existing mappings.  On an error nothing changes.
        """
        if self._closed:
            raise IommuError(errno.EBADF, f"{self.name} is closed")
        if group in self._groups:
            raise IommuError(errno.EINVAL, f"{group} is already in {self.name}")
        if not group.iommu.cache_coherency:
            raise IommuError(errno.EINVAL, f"{self.name}: {group}: {group.iommu.name} cannot make DMA coherent")
        if isinstance(group.owner, Container):
            raise IommuError(errno.EINVAL, f"{group} is already in {group.owner}")
        group.claim_dma_owner(self)
        try:
            self._check(group)
            if not group.iommu.capabilities.isolated_msi and not self.allow_unsafe_interrupts:
                text = f"{self.name}: {group}: {group.iommu.name} does not isolate MSIs: allow_unsafe_interrupts"
                raise IommuError(errno.EPERM, text)
            enforce = self._enforces(group)
            alike = (d for d in self.domains if d.enforces_snoop == enforce)
            domain = next((d for d in alike if shares_tables(d, group)), None)
            if domain is None:  # `or` would be wrong: a domain without mappings is falsy
                domain = self._fresh(group, enforce)
            group.attach(domain)
        except OSError:  # IommuError is one
            group.release_dma_owner(self)
            raise
        self._groups[group] = domain

    def _check(self, group: Group) -> None:
        can = group.iommu.capabilities
        usable = holes([can.usable], off_limits(group.reserved_regions))
        for area in self._areas:
            if not any(span.covers(area.span) for span in usable):
                text = (
                    f"{self.name}: the mapping {area.span} is beyond the aperture of {group}, or in a reserved region"
                )
                raise IommuError(errno.EINVAL, text)
        if not common(self._apertures(), [can.usable]):
            raise IommuError(errno.EINVAL, f"{self.name}: {group} has no IOVA in common with the others")
        if self._groups and not self.page_sizes & can.page_sizes:
            raise IommuError(errno.EINVAL, f"{self.name}: {group} has no page size in common with the others")

    def _enforces(self, group: Group) -> bool:
        """Whether a domain for the group enforces snooping (Linux vfio_iommu_type1_attach_group: wherever it can)."""
        return self.enforce_snoop and all(endpoint.can_enforce_snoop for endpoint in group.endpoints)

    def _fresh(self, group: Group, enforce: bool) -> PagingDomain:
        flags = AllocFlags.ENFORCE_SNOOP if enforce else AllocFlags.NONE
        domain = paging_domain_alloc(group.endpoints[0], flags)
        fill(domain, self._areas)
        return domain

    @locked
    def remove_group(self, group: Group) -> None:
        """Releases a group; removing the last group removes all mappings.

        IommuError(EINVAL): the group is not in this container.
        """
        if group not in self._groups:
            raise IommuError(errno.EINVAL, f"{group} is not in {self.name}")
        group.detach()
        group.release_dma_owner(self)
        del self._groups[group]
        if not self._groups:
            self._areas = Areas[Mapping]()
            self._tracking = False

    @locked
    def close(self) -> None:
        """Releases all groups, and so removes all mappings.  No group can be added any more (EBADF)."""
        self._closed = True
        for group in self.groups:
            self.remove_group(group)

    # ---- capabilities ----------------------------------------------------------------------

    @property
    @locked
    def page_sizes(self) -> frozenset[int]:
        """The page sizes, in bytes, that all domains support.  IommuError(EINVAL): there is no group."""
        self._set_up()
        return frozenset.intersection(*(domain.page_sizes for domain in self.domains))

    @property
    @locked
    def coherent(self) -> bool:
        """Whether DMA of all members snoops the caches (VFIO_DMA_CC_IOMMU)."""
        return bool(self._groups) and all(domain.enforces_snoop for domain in self.domains)

    @property
    @locked
    def iova_ranges(self) -> list[Span]:
        """The IOVAs that may be mapped: in every aperture, and in no reserved region.

        IommuError(EINVAL): there is no group.
        """
        self._set_up()
        return holes(self._apertures(), [span for group in self._groups for span in off_limits(group.reserved_regions)])

    def _apertures(self) -> Sequence[Span]:
        ranges: Sequence[Span] = [_EVERYTHING]
        for domain in self.domains:
            ranges = common(ranges, [domain.aperture])
        return ranges

    @property
    @locked
    def dma_avail(self) -> int:
        """How many more mappings the limit allows.  IommuError(EINVAL): there is no group."""
        self._set_up()
        return self.dma_limit - len(self._areas)

    @locked
    def mappings(self) -> list[Mapping]:
        """All mappings, ascending, each as it was made."""
        return list(self._areas)

    # ---- the map ---------------------------------------------------------------------------

    @locked
    def map(self, iova: int, gpa: int, size: int, access: Access = Access.READ | Access.WRITE) -> None:
        """VFIO_IOMMU_MAP_DMA, with a GPA instead of a process's address.

        IommuError: EINVAL no group, not whole pages, no access, or outside of `iova_ranges`; EOVERFLOW wraps; EEXIST
        overlaps; ENOSPC too many; ERANGE the GPA is beyond an IOMMU's output width.
        """
        self._set_up()
        span = self._checked(iova, size, gpa)
        if not access:
            raise IommuError(errno.EINVAL, f"{self.name}: a mapping without read or write access")
        if self._areas.overlaps(span):
            raise IommuError(errno.EEXIST, f"{self.name}: {span} overlaps a mapping")
        if self.dma_avail <= 0:
            raise IommuError(errno.ENOSPC, f"{self.name} has reached its limit of {self.dma_limit} mappings")
        if not any(valid.covers(span) for valid in self.iova_ranges):
            raise IommuError(errno.EINVAL, f"{self.name}: {span} is not in the valid IOVA ranges")
        area = Mapping(span, gpa, access)
        map_in_all(self.domains, [area])
        self._areas.add(area)

    def _set_up(self) -> None:
        """IommuError(EINVAL): VFIO_SET_IOMMU has not been done."""
        if not self._groups:
            raise IommuError(errno.EINVAL, f"{self.name} has no group, so no IOMMU: add one first (VFIO_SET_IOMMU)")

    def _checked(self, iova: int, size: int, gpa: int = 0) -> Span:
        what = f"{self.name}: iova {iova:#x}, gpa {gpa:#x}, {size:#x} bytes"
        if size > 0 and (min(iova, gpa) < 0 or max(iova, gpa) + size > 1 << 64):
            raise IommuError(errno.EOVERFLOW, f"{what}: past 2**64")
        page = min(self.page_sizes)
        if size <= 0 or (iova | gpa | size) & (page - 1):
            raise IommuError(errno.EINVAL, f"{what}: not whole pages of {page:#x}")
        return Span.sized(iova, size)

    @locked
    def unmap(self, iova: int, size: int) -> int:
        """VFIO_IOMMU_UNMAP_DMA: removes all mappings in the range; returns the bytes removed, 0 if there are none.

        IommuError: EINVAL no group, not whole pages, or a mapping is only partly in the range; EOVERFLOW wraps.  On an
        error nothing changes.
        """
        self._set_up()
        if (iova | size) & (min(self.page_sizes) - 1):  # before the end, which a map checks first
            raise IommuError(errno.EINVAL, f"{self.name}: iova {iova:#x}, {size:#x} bytes: not whole pages")
        span = self._checked(iova, size)
        found = list(self._areas.over(span))
        for area in found:
            if not span.covers(area.span):
                raise IommuError(errno.EINVAL, f"{self.name}: unmap of {span} would cut the mapping {area.span}")
        return self._remove(found)

    @locked
    def unmap_dirty(self, iova: int, size: int, page_size: int = PAGE) -> tuple[int, bytes]:
        """VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP: as `unmap`, and what `read_dirty` returned before it.

        IommuError as both.  On an error nothing changes.
        """
        self._set_up()
        bitmap = self.read_dirty(self._checked(iova, size), page_size)
        return self.unmap(iova, size), bitmap

    @locked
    def unmap_all(self) -> int:
        """VFIO_DMA_UNMAP_FLAG_ALL; returns the bytes removed.  IommuError(EINVAL): there is no group."""
        self._set_up()
        return self._remove(list(self._areas))

    def _remove(self, areas: list[Mapping]) -> int:
        unmap_in_all(self.domains, areas)
        for area in reversed(areas):
            self._areas.remove(area)
        return sum(area.span.size for area in areas)

    # ---- dirty tracking --------------------------------------------------------------------

    @locked
    def set_dirty_tracking(self, on: bool) -> None:
        """VFIO_IOMMU_DIRTY_PAGES, start and stop.  IommuError(EINVAL): there is no group."""
        self._set_up()
        self._tracking = on

    @locked
    def read_dirty(self, span: Span, page_size: int = PAGE) -> bytes:
        """VFIO_IOMMU_DIRTY_PAGES, get bitmap: each page of `span` that is mapped is dirty, whatever was written.

        VFIO asks no IOMMU: its devices may write to what is mapped (vfio_iommu_type1.c, update_user_bitmap); iommufd's
        HWPTs know better.  The result has the form of PagingDomain.read_dirty.  IommuError(EINVAL): no group, tracking
        is off, `page_size` is not the smallest of all domains, or `span` has too many pages, or parts of one, or cuts a
        mapping.
        """
        self._set_up()
        page = min(self.page_sizes)
        if page_size != page or (span.start | span.size) & (page - 1) or span.size // page > _MOST_DIRTY:
            raise IommuError(errno.EINVAL, f"{self.name}: dirty report of {span}: not in pages of {page:#x}")
        if not self._tracking:
            raise IommuError(errno.EINVAL, f"{self.name}: dirty tracking is off")
        bitmap = bytearray((span.size // page + 63) // 64 * 8)
        for area in self._areas.over(span):
            if not span.covers(area.span):
                raise IommuError(errno.EINVAL, f"{self.name}: {span} cuts the mapping {area.span}")
            # Only the bytes of this mapping are touched: there may be many, and the bitmap may be large.
            first = (area.span.start - span.start) // page
            end = first + area.span.size // page
            part = slice(first // 8, (end + 7) // 8)
            bits = ((1 << end - first) - 1) << first % 8 | int.from_bytes(bitmap[part], "little")
            bitmap[part] = bits.to_bytes(part.stop - part.start, "little")
        return bytes(bitmap)
