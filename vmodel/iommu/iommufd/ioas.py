"""`Ioas`: an address space of iommufd (Linux drivers/iommu/iommufd/ioas.c, io_pagetable.c).

errno values are those of Linux.  A mapping leads to a GPA, where Linux has an address of the process.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmodel.errors import Access, IommuError
from vmodel.iommu.areas import Areas, common, fill, holes, joined, map_in_all, merged_dirty, unmap_in_all
from vmodel.iommu.domain import Mapping
from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.locking import locked
from vmodel.span import PAGE, MiB, Span

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.hwpt import Hwpt

_LAST = (1 << 64) - 1
_RW = Access.READ | Access.WRITE
#: Allocated IOVAs are aligned to no more, whatever the GPA is: a huge page of the CPU (Linux iopt_alloc_iova).
_HUGE_PAGE = 2 * MiB
#: Spans that are never allocated automatically (Linux iopt_alloc_iova).
_NEVER_CHOSEN = [Span(0, PAGE - 1), Span(_LAST - PAGE + 1, _LAST)]


class Ioas(Object):
    """An address space: mappings of IOVAs, which all paging HWPTs that are allocated from it contain."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.hwpts: list[Hwpt] = []
        self._areas = Areas()
        self._allowed: list[Span] | None = None
        #: Reserved spans, each with its owner; `unreserve` removes those of an owner.
        self._reserved: list[tuple[Span, object]] = []
        #: Pinned spans, each with its owner: they stay mapped until `unpin`.
        self._pinned: list[tuple[Span, object]] = []

    # ---- addresses -------------------------------------------------------------------------

    @property
    def alignment(self) -> int:
        """The alignment, in bytes, of IOVAs, GPAs and sizes: the largest of the HWPTs' smallest pages.

        Without a HWPT it is 4 KiB (in Linux one byte, as the CPU's page tables divide the memory into pages there).
        """
        return max((min(hwpt.paging.page_sizes) for hwpt in self.hwpts), default=PAGE)

    @locked
    def iova_ranges(self) -> list[Span]:
        """IOMMU_IOAS_IOVA_RANGES: the IOVAs that may be mapped, given the attached devices."""
        ranges = [Span(0, _LAST)]
        for hwpt in self.hwpts:
            ranges = common(ranges, [hwpt.paging.aperture])
        return holes(ranges, [span for span, _ in self._reserved])

    @locked
    def allow_iovas(self, spans: Iterable[Span]) -> None:
        """IOMMU_IOAS_ALLOW_IOVAS: these spans stay mappable, and IOVAs are allocated from them; none: from anywhere.

        IommuError: EINVAL spans overlap, or one is a single byte; EADDRINUSE one is not in `iova_ranges`.
        """
        self.check()
        wanted = sorted(spans)
        if any(a.overlaps(b) for a, b in itertools.pairwise(wanted)) or any(a.start == a.last for a in wanted):
            raise IommuError(errno.EINVAL, f"{self}: allowed ranges overlap, or one has a single byte")
        if beyond := holes(wanted, self.iova_ranges()):
            raise IommuError(errno.EADDRINUSE, f"{self}: {beyond[0]} is reserved for a device")
        self._allowed = wanted or None

    def reserve(self, span: Span, owner: object) -> None:
        """Reserves `span` until `unreserve(owner)`: it cannot be mapped.

        IommuError(EADDRINUSE): it overlaps a mapping or an allowed range.
        """
        self._check_unused(span)
        self._reserved.append((span, owner))

    def _check_unused(self, span: Span) -> None:
        if self._areas.overlaps(span):
            raise IommuError(errno.EADDRINUSE, f"{self}: cannot reserve {span}: it has a mapping")
        if any(allowed.overlaps(span) for allowed in self._allowed or ()):
            raise IommuError(errno.EADDRINUSE, f"{self}: cannot reserve {span}: it overlaps an allowed range")

    def unreserve(self, owner: object) -> None:
        """Frees all spans that `owner` has reserved."""
        self._reserved = [(span, by) for span, by in self._reserved if by is not owner]

    # ---- mappings --------------------------------------------------------------------------

    @locked
    def map(self, gpa: int, size: int, access: Access = _RW, iova: int | None = None) -> int:
        """IOMMU_IOAS_MAP, at `iova`, or at an allocated IOVA; returns the IOVA.

        IommuError: EINVAL not aligned, no access, or reserved; EEXIST overlaps; EOVERFLOW wraps; ENOSPC no free IOVAs,
        or too many mappings; ERANGE the GPA is beyond an IOMMU's output width; ENOENT the IOAS has been destroyed.  On
        an error nothing changes.
        """
        self._check_arguments(size, access, iova)
        self._check_range("gpa", gpa, size)
        return self._insert([(gpa, size, Access.WRITE in access)], access, iova)

    def _check_arguments(self, size: int, access: Access, iova: int | None) -> None:
        """The checks that Linux makes first (iommufd_ioas_map, iommufd_ioas_copy)."""
        self.check()
        if size >= _LAST or not 0 <= (iova or 0) < _LAST:
            raise IommuError(errno.EOVERFLOW, f"{self}: {size:#x} bytes, iova {iova}: past 2**64")
        if not access:
            raise IommuError(errno.EINVAL, f"{self}: a mapping without read or write access")

    def _check_range(self, what: str, start: int, size: int) -> None:
        self.check()
        if not 0 <= start < _LAST or size >= _LAST or start + size - 1 > _LAST:
            raise IommuError(errno.EOVERFLOW, f"{self}: {what} {start:#x}, {size:#x} bytes: past 2**64")
        if size <= 0:
            raise IommuError(errno.EINVAL, f"{self}: {size} bytes")

    def _insert(self, pieces: list[tuple[int, int, bool]], access: Access, iova: int | None) -> int:
        """Maps pieces at consecutive IOVAs, each as a mapping of its own; returns the first IOVA.

        A piece is (gpa, size, writable).  The order of the checks is Linux's (iopt_alloc_area_pages).
        """
        total = sum(size for _, size, _ in pieces)
        if total & (self.alignment - 1):
            raise IommuError(errno.EINVAL, f"{self}: {total:#x} bytes: not aligned to {self.alignment:#x}")
        first = at = self._choose(pieces[0][0], total) if iova is None else self._fixed(iova, total)
        areas = []
        for gpa, size, writable in pieces:
            if Access.WRITE in access and not writable:
                raise IommuError(errno.EPERM, f"{self}: gpa {gpa:#x}, {size:#x} bytes: read-only")
            if (gpa | size) & (self.alignment - 1):
                text = f"{self}: gpa {gpa:#x}, {size:#x} bytes: not aligned to {self.alignment:#x}"
                raise IommuError(errno.EINVAL, text)
            areas.append(Mapping(Span.sized(at, size), gpa, access, writable))
            at += size
        map_in_all([hwpt.paging for hwpt in self.hwpts], areas)
        for area in areas:
            self._areas.add(area)
        return first

    def _fixed(self, iova: int, size: int) -> int:
        if iova & (self.alignment - 1):
            raise IommuError(errno.EINVAL, f"{self}: iova {iova:#x} is not aligned to {self.alignment:#x}")
        self._check_range("iova", iova, size)
        span = Span.sized(iova, size)
        if not any(valid.covers(span) for valid in self.iova_ranges()):
            raise IommuError(errno.EINVAL, f"{self}: {span} is reserved, or beyond the aperture")
        if self._areas.overlaps(span):
            raise IommuError(errno.EEXIST, f"{self}: {span} overlaps a mapping")
        return iova

    def _choose(self, gpa: int, size: int) -> int:
        """Allocates IOVAs: the first fit with the alignment of the GPA, up to 2 MiB, for large pages; never 0."""
        if size >= _LAST // 2:
            raise IommuError(errno.EOVERFLOW, f"{self}: {size:#x} bytes are too many to allocate IOVAs for")
        wanted = 1 << (size - 1).bit_length()
        align = min(wanted, gpa & -gpa or wanted, _HUGE_PAGE)
        if align < self.alignment:
            raise IommuError(errno.EINVAL, f"{self}: gpa {gpa:#x} is not aligned to {self.alignment:#x}")
        room = common(self.iova_ranges(), joined(self._allowed or [Span(0, _LAST)]))
        for hole in holes(room, [*_NEVER_CHOSEN, *self._areas.spans]):
            start = (hole.start + align - 1) & -align
            if start + size - 1 <= hole.last:
                return start
        raise IommuError(errno.ENOSPC, f"{self}: no free IOVAs for {size:#x} bytes")

    @locked
    def unmap(self, iova: int, size: int) -> int:
        """IOMMU_IOAS_UNMAP; returns the bytes removed.  IOVA 0 and 2**64 - 1 bytes: as `unmap_all`.

        IommuError: EINVAL no size; EOVERFLOW wraps; ENOENT nothing is mapped in the range, or a mapping is only partly
        in it, or the IOAS has been destroyed; EBUSY a mapping is pinned.  The mappings before the one that is refused
        are removed, as in Linux.
        """
        if iova == 0 and size == _LAST:
            return self.unmap_all()
        self._check_range("iova", iova, size)
        span = Span.sized(iova, size)
        removed = self._remove_in(span)
        if not removed:
            raise IommuError(errno.ENOENT, f"{self}: nothing is mapped in {span}")
        return removed

    @locked
    def unmap_all(self) -> int:
        """IOMMU_IOAS_UNMAP of everything; returns the bytes removed.

        IommuError: ENOENT it has been destroyed; EBUSY as `unmap`.
        """
        self.check()
        return self._remove_in(Span(0, _LAST))

    def _remove_in(self, span: Span) -> int:
        """Removes all mappings of `span`, up to one that cannot be removed.  (Linux iopt_unmap_iova_range)"""
        found: list[Mapping] = []
        refused: IommuError | None = None
        for area in self._areas.over(span):
            if self._is_pinned(area):
                refused = IommuError(errno.EBUSY, f"{self}: the mapping {area.span} is pinned")
            elif not span.covers(area.span):
                refused = IommuError(errno.ENOENT, f"{self}: unmap of {span} would cut the mapping {area.span}")
            if refused is not None:
                break
            found.append(area)
        removed = self._remove(found)
        if refused is not None:
            raise refused
        return removed

    def pin(self, span: Span, owner: object) -> list[Mapping]:
        """Keeps `span` mapped until `unpin(owner)`: `unmap` of it is EBUSY; returns its mappings, ascending.

        IommuError(ENOENT): a part of it is not mapped.  (Linux iommufd_access_pin_pages)
        """
        areas = list(self._areas.over(span))
        if holes([span], [area.span for area in areas]):
            raise IommuError(errno.ENOENT, f"{self}: a part of {span} is not mapped")
        self._pinned.append((span, owner))
        return areas

    def unpin(self, owner: object) -> None:
        """Frees all spans that `owner` has pinned."""
        self._pinned = [(span, by) for span, by in self._pinned if by is not owner]

    def _is_pinned(self, area: Mapping) -> bool:
        return any(span.overlaps(area.span) for span, _ in self._pinned)

    def _remove(self, areas: list[Mapping]) -> int:
        unmap_in_all((hwpt.paging for hwpt in self.hwpts), areas)
        for area in reversed(areas):
            self._areas.remove(area)
        return sum(area.span.size for area in areas)

    @locked
    def copy(self, source: Ioas, source_iova: int, size: int, access: Access = _RW, iova: int | None = None) -> int:
        """IOMMU_IOAS_COPY: copies the mappings of a range of `source`, at `iova` or allocated IOVAs; returns the IOVA.

        IommuError: ENOENT `source` does not map the whole range, or is of another context; EINVAL no size, or not
        aligned; EOVERFLOW wraps; EPERM `access` has WRITE and a mapping of the source was made without it, at first, if
        it is a copy itself; else as `map`.
        """
        source.check(self.context)
        self._check_arguments(size, access, iova)
        self._check_range("iova", source_iova, size)
        span, at = Span.sized(source_iova, size), source_iova
        pieces: list[tuple[int, int, bool]] = []
        for area in source._areas.over(span):
            if area.span.start > at:
                break
            last = min(area.span.last, span.last)
            pieces.append((area.gpa + (at - area.span.start), last - at + 1, area.writable))
            at = last + 1
        if at <= span.last:
            raise IommuError(errno.ENOENT, f"{source} has no mapping at iova {at:#x}")
        return self._insert(pieces, access, iova)

    @locked
    def mappings(self) -> list[Mapping]:
        """All mappings, ascending, each as it was made."""
        return list(self._areas)

    # ---- dirty tracking --------------------------------------------------------------------

    def check_mapped(self, span: Span) -> None:
        """IommuError(EINVAL): a part of `span` is not mapped (Linux __iommu_read_and_clear_dirty)."""
        if left := holes([span], [area.span for area in self._areas.over(span)]):
            raise IommuError(errno.EINVAL, f"{self}: nothing is mapped at iova {left[0].start:#x}")

    @locked
    def set_dirty_tracking(self, on: bool) -> None:
        """As Hwpt.set_dirty_tracking, for all HWPTs.

        IommuError(EOPNOTSUPP): one does not support it; nothing changes.
        """
        for hwpt in self.hwpts:
            if not hwpt.paging.tracks:
                raise IommuError(errno.EOPNOTSUPP, f"{self}: {hwpt} was allocated without dirty tracking")
        for hwpt in self.hwpts:
            hwpt.paging.set_dirty_tracking(on)

    @locked
    def get_dirty_bitmap(self, span: Span, page_size: int = PAGE, *, clear: bool = True) -> bytes:
        """The pages written to through any HWPT, as PagingDomain.read_dirty.

        IommuError(EINVAL): one HWPT does not track writes, or a part of `span` is not mapped.
        """
        self.check_mapped(span)
        for hwpt in self.hwpts:
            if not hwpt.paging.tracking:
                raise IommuError(errno.EINVAL, f"{self}: {hwpt} does not track writes")
        return merged_dirty([hwpt.paging for hwpt in self.hwpts], span, page_size, clear)

    # ---- HWPTs -----------------------------------------------------------------------------

    def add_hwpt(self, hwpt: Hwpt) -> None:
        """Adds a new paging HWPT, with all mappings in it.

        IommuError: EADDRINUSE a mapping or an allowed range is beyond its aperture, or a mapping is not made of whole
        pages of it; else as map.
        """
        for beyond in holes([Span(0, _LAST)], [hwpt.paging.aperture]):
            self._check_unused(beyond)
        page = min(hwpt.paging.page_sizes)
        if any((area.span.start | area.span.size | area.gpa) & (page - 1) for area in self._areas):
            raise IommuError(errno.EADDRINUSE, f"{self}: a mapping is not made of whole pages of {page:#x}")
        fill(hwpt.paging, self._areas)
        self.hwpts.append(hwpt)
        self.users += 1

    def remove_hwpt(self, hwpt: Hwpt) -> None:
        """Removes a paging HWPT."""
        self.hwpts.remove(hwpt)
        self.users -= 1
