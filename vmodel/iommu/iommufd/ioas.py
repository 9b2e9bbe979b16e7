"""`Ioas`: an address space of iommufd (Linux drivers/iommu/iommufd/ioas.c, io_pagetable.c).

errno values are those of Linux.  A mapping leads to a GPA, where Linux has an address of the process.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from vmodel.closing import call_all
from vmodel.errors import Access, IommuError
from vmodel.iommu.areas import Areas, common, holes, joined, map_in_all, merged_dirty, unmap_in_all
from vmodel.iommu.domain import Mapping
from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.iommufd.iova_alloc import allocate_iova
from vmodel.iommu.iommufd.pages import MappedArea, Pages
from vmodel.iommu.locking import locked
from vmodel.span import PAGE, KiB, Span

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.file import MemoryFile
    from vmodel.iommu.iommufd.hwpt import Hwpt
    from vmodel.iommu.iommufd.kernel_access import KernelAccess

_LAST = (1 << 64) - 1
_RW = Access.READ | Access.WRITE
#: The largest PAGE_SIZE that kernels have: an IOMMU must have pages of the CPU's, or smaller (iopt_table_add_domain).
_LARGEST_PAGE = 64 * KiB
#: How often an unmap notifies kernel accesses to unpin a mapping (Linux iopt_unmap_iova_range).
_TRIES = 100


class Ioas(Object):
    """An address space: mappings of IOVAs, which all paging HWPTs that are allocated from it contain."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        context.spaces.append(self)
        self.hwpts: list[Hwpt] = []
        #: The kernel accesses that are attached.
        self.accesses: list[KernelAccess] = []
        #: Whether HWPTs may use large pages; without, any mapping can be cut.
        self.large_pages = True
        self._areas = Areas[MappedArea]()
        self._allowed: list[Span] | None = None
        #: Reserved spans, each with its owner; `unreserve` removes those of an owner.
        self._reserved: list[tuple[Span, object]] = []

    def release(self) -> None:
        self.context.spaces.remove(self)

    # ---- addresses -------------------------------------------------------------------------

    @property
    def alignment(self) -> int:
        """The alignment, in bytes, of IOVAs, GPAs and sizes: the largest of the HWPTs' smallest pages.

        It is 4 KiB, or more, while a kernel access can pin pages, and without large pages; or one byte without a HWPT.
        (iopt_calculate_iova_alignment)
        """
        pages = [min(hwpt.paging.page_sizes) for hwpt in self.hwpts]
        least = 1 if self.large_pages else PAGE
        return max([least, *pages, *(access.alignment for access in self.accesses)])

    @locked
    def iova_ranges(self) -> list[Span]:
        """IOMMU_IOAS_IOVA_RANGES: the IOVAs that may be mapped, given the attached devices.

        IommuError(ENOENT): it has been destroyed.
        """
        self.check()
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
        self._check_size(size)
        pages = Pages(self.context.process, self.context.account_mode, gpa, writable=Access.WRITE in access)
        return self._insert([(pages, gpa % PAGE, size)], access, iova)

    @locked
    def map_file(self, file: MemoryFile, offset: int, size: int, access: Access = _RW, iova: int | None = None) -> int:
        """IOMMU_IOAS_MAP_FILE: as `map`, of `size` bytes of a file from `offset` on; returns the IOVA.

        IommuError: EINVAL no size, or not in the file: of a MemoryFile only when it is pinned, that is with a HWPT;
        EOVERFLOW wraps; ENODEV a dma-buf is revoked; else as `map`.
        """
        self._check_arguments(size, access, iova)
        self._check_range("offset", offset, size)
        self._check_size(size)
        pages = file.pages(self.context, offset, size, writable=Access.WRITE in access)
        return self._insert([(pages, offset % PAGE, size)], access, iova)

    def _check_size(self, size: int) -> None:
        """Linux iopt_alloc_pages."""
        if size > _LAST - PAGE:
            raise IommuError(errno.EINVAL, f"{self}: {size:#x} bytes")

    def _check_arguments(self, size: int, access: Access, iova: int | None) -> None:
        """The checks that Linux makes first (iommufd_ioas_map, iommufd_ioas_copy)."""
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

    def _insert(self, pieces: list[tuple[Pages, int, int]], access: Access, iova: int | None) -> int:
        """Maps pieces at consecutive IOVAs, each as a mapping of its own; returns the first IOVA.

        A piece is (pages, first byte of them, size).  The order of the checks is Linux's (iopt_alloc_area_pages).
        """
        total = sum(size for _, _, size in pieces)
        if total & (self.alignment - 1):
            raise IommuError(errno.EINVAL, f"{self}: {total:#x} bytes: not aligned to {self.alignment:#x}")
        first = at = (
            self._choose(pieces[0][0].address + pieces[0][1], total) if iova is None else self._fixed(iova, total)
        )
        areas = []
        for pages, start, size in pieces:
            if Access.WRITE in access and not pages.writable:
                raise IommuError(errno.EPERM, f"{self}: gpa {pages.gpa + start:#x}, {size:#x} bytes: read-only")
            if (pages.gpa + start) & (self.alignment - 1):
                text = f"{self}: gpa {pages.gpa + start:#x}: not aligned to {self.alignment:#x}"
                raise IommuError(errno.EINVAL, text)
            areas.append(MappedArea(Span.sized(at, size), access, pages, start))
            at += size
        self._fill(areas, self.hwpts)
        for area in areas:
            self._areas.add(area)
        return first

    def _fill(self, areas: Iterable[MappedArea], hwpts: list[Hwpt]) -> None:
        """Maps and pins areas in HWPTs, or none of them (iopt_area_fill_domains)."""
        done: list[MappedArea] = []
        domains = [hwpt.paging for hwpt in hwpts]
        try:
            for area in areas if hwpts else ():
                if area.pages.revoked:
                    continue
                area.check()
                map_in_all(domains, [area])
                try:
                    area.pin()
                except IommuError:
                    unmap_in_all(domains, [area])
                    raise
                done.append(area)
        except IommuError:
            unmap_in_all(domains, done)
            for area in done:
                area.unpin()
            raise

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

    def _choose(self, address: int, size: int) -> int:
        room = common(self.iova_ranges(), joined(self._allowed or [Span(0, _LAST)]))
        try:
            return allocate_iova(room, self._areas.runs, address, size, self.alignment)
        except IommuError as error:
            raise IommuError(error.errno or errno.EINVAL, f"{self}: {error.strerror}") from None

    def unmap(self, iova: int, size: int) -> int:
        """IOMMU_IOAS_UNMAP; returns the bytes removed.  IOVA 0 and 2**64 - 1 bytes: as `unmap_all`.

        What a kernel access has pinned is unmapped when it has unpinned it: all accesses are notified, up to 101
        times for each mapping that there is at first.  IommuError: EINVAL no size; EOVERFLOW wraps; ENOENT nothing is
        mapped in the range, or a mapping is only partly in it, or the IOAS has been destroyed; EBUSY a HwQueue uses a
        mapping; EDEADLOCK a mapping is still pinned, and cannot be pinned or accessed any more, or one is pinned and an
        access that would be notified is being notified on this thread.  The mappings before the one that an error is
        about are removed, as in Linux.  What an access's `unmap` raises is raised after all were notified.
        """
        if iova == 0 and size == _LAST:
            return self.unmap_all()
        with self.lock:
            self._check_range("iova", iova, size)
        removed = self._unmap_range(Span.sized(iova, size))
        if not removed:
            raise IommuError(errno.ENOENT, f"{self}: nothing is mapped in {iova:#x}, {size:#x} bytes")
        return removed

    def unmap_all(self) -> int:
        """IOMMU_IOAS_UNMAP of everything; returns the bytes removed.

        IommuError: ENOENT it has been destroyed; EDEADLOCK as `unmap`.
        """
        return self._unmap_range(Span(0, _LAST))

    def _unmap_range(self, span: Span) -> int:
        """Linux iopt_unmap_iova_range; the lock is not held while kernel accesses are notified."""
        removed = tries = calls = 0
        most: int | None = None
        while True:
            with self.lock:
                self.check()
                whole, stop = self._until_pinned(span)
                removed += self._remove(whole)
                if stop is None:
                    return removed
                if stop.locks:
                    raise IommuError(errno.EBUSY, f"{self}: the mapping {stop.span} is in use by a HW_QUEUE")
                if not span.covers(stop.span):
                    raise IommuError(errno.ENOENT, f"{self}: unmap of {span} would cut the mapping {stop.span}")
                accesses = list(self.accesses)
                if any(access.notified for access in accesses):  # in Linux no driver can unmap
                    raise IommuError(errno.EDEADLOCK, f"{self}: {stop.span} is pinned: unmapped by an `unmap` callback")
                if most is None:
                    most = (_TRIES + 1) * sum(1 for _ in self._areas.over(span))
                if (whole[-1].span.last + 1 if whole else span.start) != stop.span.start:
                    tries = 0
                stop.leaving = True
                span = Span(stop.span.start, span.last)
            self._notify(accesses, stop.span)
            tries, calls = tries + 1, calls + 1
            if tries > _TRIES or calls >= most:  # the latter: more is mapped and pinned meanwhile
                raise IommuError(errno.EDEADLOCK, f"{self}: {stop.span} is still pinned")

    def _notify(self, accesses: list[KernelAccess], span: Span) -> None:
        """Calls `unmap` of all accesses; raises what they raise at the end."""
        call_all([partial(self._notify_one, access, span) for access in accesses])

    def _notify_one(self, access: KernelAccess, span: Span) -> None:
        if access in self.accesses and not access.ending:
            access.notify(span.start, span.size)

    def _until_pinned(self, span: Span) -> tuple[list[MappedArea], MappedArea | None]:
        """The areas of `span` up to the first that is pinned by an access, or cut by the span; and that one."""
        whole: list[MappedArea] = []
        for area in self._areas.over(span):
            if area.accesses or not span.covers(area.span):
                return whole, area
            whole.append(area)
        return whole, None

    def _remove(self, areas: list[MappedArea]) -> int:
        self._unmap_domains(areas)
        for area in reversed(areas):
            self._areas.remove(area)
            if self.hwpts:
                area.unpin()
        return sum(area.span.size for area in areas)

    def _unmap_domains(self, areas: list[MappedArea]) -> None:
        unmap_in_all([hwpt.paging for hwpt in self.hwpts], [area for area in areas if not area.pages.revoked])

    def revoke(self, pages: Pages) -> None:
        """Unmaps all of `pages` from the HWPTs."""
        self._unmap_domains([area for area in self._areas if area.pages is pages])

    @locked
    def cut(self, iova: int, size: int) -> None:
        """Cuts the mappings at the ends of a range, without large pages; DMA does not see it.

        IommuError: EINVAL not at a page, or a kernel access has pinned a part; EBUSY it is being unmapped; EOPNOTSUPP
        it is of a dma-buf.  (Linux iopt_cut_iova, iopt_area_split)
        """
        for last in ((iova + size - 1) & _LAST, *([(iova - 1) & _LAST] if iova else [])):
            area = next(self._areas.over(Span(last, last)), None)
            if area is None or last in (area.span.start, area.span.last):
                continue
            if area.leaving:
                raise IommuError(errno.EBUSY, f"{self}: {area.span} is being unmapped")
            if area.pages.of_device:
                raise IommuError(errno.EOPNOTSUPP, f"{self}: a cut of {area.span}, which is of a dma-buf")
            if (last + 1) & (self.alignment - 1):
                raise IommuError(errno.EINVAL, f"{self}: a cut at {last + 1:#x}: not aligned to {self.alignment:#x}")
            if area.accesses:
                raise IommuError(errno.EINVAL, f"{self}: a cut of {area.span}, which is pinned")
            self._areas.remove(area)
            for span in (Span(area.span.start, last), Span(last + 1, area.span.last)):
                self._areas.add(MappedArea(span, area.access, area.pages, area.byte(span.start)))

    @locked
    def copy(self, source: Ioas, source_iova: int, size: int, access: Access = _RW, iova: int | None = None) -> int:
        """IOMMU_IOAS_COPY: copies the mappings of a range of `source`, at `iova` or allocated IOVAs; returns the IOVA.

        IommuError: ENOENT `source` does not map the whole range, or is of another context; EINVAL no size, or not
        aligned; EOVERFLOW wraps; EPERM `access` has WRITE and a mapping of the source was made without it, at first, if
        it is a copy itself; else as `map`.
        """
        self._check_arguments(size, access, iova)
        source.check(self.context)
        self._check_range("iova", source_iova, size)
        span = Span.sized(source_iova, size)
        found = list(source.contiguous(span))
        return self._insert([(area.pages, area.byte(part.start), part.size) for area, part in found], access, iova)

    def contiguous(self, span: Span) -> Iterator[tuple[MappedArea, Span]]:
        """The areas of `span`, ascending, and the part of it that each has.

        IommuError(ENOENT), after those before it: a part is not mapped.  (Linux iopt_for_each_contig_area)
        """
        at = span.start
        for area in self._areas.over(span):
            if area.span.start > at:
                break
            last = min(area.span.last, span.last)
            yield area, Span(at, last)
            at = last + 1
        if at <= span.last:
            raise IommuError(errno.ENOENT, f"{self} has no mapping at iova {at:#x}")

    @locked
    def mappings(self) -> list[Mapping]:
        """All mappings, ascending, each as it was made."""
        return [area.mapping for area in self._areas]

    def memory(self) -> list[Pages]:
        """The memory of each mapping."""
        return [area.pages for area in self._areas]

    @locked
    def set_large_pages(self, on: bool) -> None:
        """On: tables have the largest entries that they can from now on; off: only the smallest.

        IommuError: EINVAL off, and there are mappings in a HWPT; EADDRINUSE off, and one is not made of pages.  (Linux
        iopt_disable_large_pages, iopt_enable_large_pages)
        """
        self.check()
        if self.large_pages and not on:
            if self.hwpts and len(self._areas):
                raise IommuError(errno.EINVAL, f"{self}: there are mappings already, maybe with large pages")
            self._check_aligned(PAGE)
        self.large_pages = on
        for hwpt in self.hwpts:
            hwpt.paging.large_pages = on

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

        IommuError: EINVAL it has no pages of 64 KiB or less; EADDRINUSE a mapping or an allowed range is beyond its
        aperture, or a mapping is not made of whole pages of it; else as map.  (Linux iopt_table_add_domain)
        """
        if min(hwpt.paging.page_sizes) > _LARGEST_PAGE:
            raise IommuError(errno.EINVAL, f"{self}: {hwpt} has no pages as small as those of a CPU")
        for beyond in holes([Span(0, _LAST)], [hwpt.paging.aperture]):
            self._check_unused(beyond)
        self._check_aligned(min(hwpt.paging.page_sizes))
        hwpt.paging.large_pages = self.large_pages
        self._fill(self._areas, [hwpt])
        if self.hwpts:
            # An area is pinned for all HWPTs together.
            for area in self._areas:
                area.unpin()
        self.hwpts.append(hwpt)
        self.users += 1

    def _check_aligned(self, alignment: int) -> None:
        """IommuError(EADDRINUSE): a mapping is not aligned (Linux iopt_check_iova_alignment)."""
        if any((area.span.start | area.span.size | area.gpa) & (alignment - 1) for area in self._areas):
            raise IommuError(errno.EADDRINUSE, f"{self}: a mapping is not made of whole pages of {alignment:#x}")

    def remove_hwpt(self, hwpt: Hwpt) -> None:
        """Removes a paging HWPT."""
        self.hwpts.remove(hwpt)
        self.users -= 1
        if not self.hwpts:
            for area in self._areas:
                area.unpin()

    # ---- kernel accesses -------------------------------------------------------------------

    def add_access(self, access: KernelAccess) -> None:
        """Attaches a kernel access.  IommuError(EADDRINUSE): a mapping is not aligned as it needs."""
        self._check_aligned(access.alignment)
        self.accesses.append(access)
        self.users += 1

    def remove_access(self, access: KernelAccess) -> None:
        """Detaches a kernel access."""
        self.accesses.remove(access)
        self.users -= 1
