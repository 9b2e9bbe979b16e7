"""`SpaprContainer`: VFIO's container for POWER and its DMA windows (Linux drivers/vfio/vfio_iommu_spapr_tce.c).

A PE has two windows: window 0 begins at 0, and is at first the default one, of 4 KiB pages below 4 GiB; window 1 begins
at 2**59.  The rules of tables are those of PowerNV (arch/powerpc/platforms/powernv/pci-ioda.c).
"""

from __future__ import annotations

import errno
import itertools
import threading
from dataclasses import dataclass

from vmodel.closing import Closing
from vmodel.errors import Access, IommuError
from vmodel.iommu.domain import AllocFlags, DomainType, PagingDomain
from vmodel.iommu.drivers.power_pe import PowerPe
from vmodel.iommu.group import Group, can_attach
from vmodel.iommu.locking import locked
from vmodel.span import KiB, Span

#: Where the windows begin; the second one is selected by address bit 59.
STARTS = (0, 1 << 59)
#: The most levels of a table (Linux POWERNV_IOMMU_MAX_LEVELS).
MAX_LEVELS = 5
#: log2 of a page of Linux on POWER, and of the most memory that it allocates in one piece.
_PAGE_SHIFT, _MOST_SHIFT = 16, 24

_numbers = itertools.count(1)


@dataclass(frozen=True)
class TceWindow:
    """A window: IOVAs with a table, whose entries (TCEs) map `page_size` bytes each."""

    span: Span
    page_size: int


@dataclass(frozen=True)
class SpaprInfo:
    """VFIO_IOMMU_SPAPR_TCE_GET_INFO.

    `start` and `size` in bytes: the default window; of version 2 also: `page_sizes` in bytes that windows may have,
    `windows`: how many there may be, `levels`: the most of a table.
    """

    start: int
    size: int
    page_sizes: frozenset[int] = frozenset()
    windows: int = 0
    levels: int = 0


class SpaprContainer(Closing):
    """Windows with mappings, of one group (version 1) or of several (version 2).

    Any thread may call it.  A context manager: `close` gives the groups back.
    """

    def __init__(self, name: str = "", *, v2: bool = True) -> None:
        """`v2`: VFIO_SPAPR_TCE_v2_IOMMU, which has dynamic windows and registered memory, else VFIO_SPAPR_TCE_IOMMU."""
        self.lock = threading.RLock()
        self.name = name or f"spapr{next(_numbers)}"
        self.v2 = v2
        #: Whether mappings can be made: by `enable`, in version 2 by registered memory.
        self.enabled = False
        self._closed = False
        self._groups: list[Group] = []
        self._windows: list[TceWindow | None] = [None, None]
        self._domain: PagingDomain | None = None
        self._default_pending = False
        self._memory: list[Span] = []

    # ---- groups ----------------------------------------------------------------------------

    @property
    def groups(self) -> list[Group]:
        """The groups, in the order in which they were added."""
        return list(self._groups)

    @property
    def windows(self) -> tuple[TceWindow | None, ...]:
        """Both windows, None where there is none.  The default one is made by the first map, unmap or create."""
        return tuple(self._windows)

    @locked
    def add_group(self, group: Group) -> None:
        """Claims a group; its DMA passes through the windows.

        IommuError: EINVAL it is in the container; ENODEV it is not POWER's; EBUSY version 1 has a group already; EPERM
        it is not compatible with the others; EBADF closed; EBUSY, EPERM as Group.claim_dma_owner.
        """
        if self._closed:
            raise IommuError(errno.EBADF, f"{self.name} is closed")
        if group in self._groups:
            raise IommuError(errno.EINVAL, f"{group} is already in {self.name}")
        group.claim_dma_owner(self)
        try:
            group.attach(self._domain_for(group))
        except IommuError:
            group.release_dma_owner(self)
            raise
        if not self._groups and self._windows[0] is None:
            self._default_pending = True
        self._groups.append(group)

    def _domain_for(self, group: Group) -> PagingDomain:
        if not isinstance(group.iommu.driver, PowerPe):
            raise IommuError(errno.ENODEV, f"{group}: {group.iommu.name} has no TCEs")
        if self._groups and not self.v2:
            raise IommuError(errno.EBUSY, f"{self.name} has {self._groups[0]}: version 1 takes one group")
        if self._domain is None:
            # Each entry can be replaced alone, so that the domain has them in the smallest pages.
            pages = frozenset((4 * KiB,))
            self._domain = PagingDomain(DomainType.UNMANAGED, group.iommu, AllocFlags.NONE, page_sizes=pages)
        for endpoint in group.endpoints:
            if (why := can_attach(self._domain, endpoint)) is not None:
                raise IommuError(errno.EPERM, f"{group} is incompatible with {self.name}: {why}")
        return self._domain

    @locked
    def remove_group(self, group: Group) -> None:
        """Releases a group.  As in Linux, that clears all tables, also those of groups that stay; windows remain.

        IommuError(EINVAL): it is not in this container.
        """
        if group not in self._groups:
            raise IommuError(errno.EINVAL, f"{group} is not in {self.name}")
        for window in self._windows:
            if window is not None:
                self._clear(window.span)
        group.detach()
        group.release_dma_owner(self)
        self._groups.remove(group)

    @locked
    def close(self) -> None:
        """Releases all groups, and so removes all mappings.  No group can be added any more (EBADF)."""
        self._closed = True
        for group in self.groups:
            self.remove_group(group)

    # ---- windows ---------------------------------------------------------------------------

    @property
    def _driver(self) -> PowerPe:
        driver = self._groups[0].iommu.driver
        assert isinstance(driver, PowerPe)
        return driver

    @locked
    def get_info(self) -> SpaprInfo:
        """VFIO_IOMMU_SPAPR_TCE_GET_INFO.  IommuError(ENXIO): there is no group."""
        self._need_group(errno.ENXIO)
        size = self._driver.params.window32
        if not self.v2:
            return SpaprInfo(0, size)
        return SpaprInfo(0, size, self._groups[0].iommu.capabilities.page_sizes, len(STARTS), MAX_LEVELS)

    @locked
    def create(self, page_shift: int, size: int, levels: int = 1) -> int:
        """VFIO_IOMMU_SPAPR_TCE_CREATE: makes a window of `size` bytes in pages of 2**page_shift; returns its start.

        IommuError: ENOTTY version 1; ENXIO there is no group; ENOSPC both windows exist; EINVAL pages of this size do
        not exist, `size` is no power of two of at least a page, or not so many `levels`; ENOMEM a level's table is
        larger than 16 MiB: more levels are needed.
        """
        self._need_v2()
        self._need_group(errno.ENXIO)
        self._create_default()
        return self._create(page_shift, size, levels)

    def _create(self, page_shift: int, size: int, levels: int) -> int:
        number = next((n for n, window in enumerate(self._windows) if window is None), None)
        if number is None:
            raise IommuError(errno.ENOSPC, f"{self.name} has {len(STARTS)} windows")
        sizes = self._groups[0].iommu.capabilities.page_sizes
        if not 0 <= page_shift < 64 or 1 << page_shift not in sizes:
            raise IommuError(errno.EINVAL, f"{self.name}: there are no pages of 2**{page_shift}")
        if size < 1 << page_shift or size & (size - 1) or not 1 <= levels <= MAX_LEVELS:
            raise IommuError(errno.EINVAL, f"{self.name}: a window of {size:#x} bytes in {levels} levels")
        # Linux pnv_pci_ioda2_table_alloc_pages: each level has the same share of the index, at least a page's.
        entries = size.bit_length() - 1 - page_shift
        table = max(-(-entries // levels) + 3, _PAGE_SHIFT)
        if (table - 3) * levels + page_shift >= 55:
            raise IommuError(errno.EINVAL, f"{self.name}: {levels} levels are too many")
        if table > _MOST_SHIFT:
            raise IommuError(errno.ENOMEM, f"{self.name}: a table of 2**{table} bytes")
        window = TceWindow(Span.sized(STARTS[number], size), 1 << page_shift)
        self._windows[number] = window
        return window.span.start

    def _create_default(self) -> None:
        """Makes the default window once it is needed (Linux tce_iommu_create_default_window)."""
        if not self._default_pending:
            return
        self._need_group(errno.ENODEV)
        self._create(12, self._driver.params.window32, 1)
        self._default_pending = False

    @locked
    def remove(self, start: int) -> None:
        """VFIO_IOMMU_SPAPR_TCE_REMOVE: removes the window that `start` is in, with its mappings.

        IommuError: ENOTTY version 1; ENXIO there is no group; EINVAL no window is there.
        """
        self._need_v2()
        self._need_group(errno.ENXIO)
        if self._default_pending and start == 0:
            self._default_pending = False
            return
        window = self._find(start)
        if window is None:
            raise IommuError(errno.EINVAL, f"{self.name} has no window at {start:#x}")
        self._clear(window.span)
        self._windows[self._windows.index(window)] = None

    def _find(self, iova: int) -> TceWindow | None:
        return next((window for window in self._windows if window is not None and iova in window.span), None)

    def _need_v2(self) -> None:
        if not self.v2:
            raise IommuError(errno.ENOTTY, f"{self.name} is of version 1")

    def _need_group(self, code: int) -> None:
        if not self._groups:
            raise IommuError(code, f"{self.name} has no group")

    # ---- mappings --------------------------------------------------------------------------

    @locked
    def map(self, iova: int, gpa: int, size: int, access: Access = Access.READ | Access.WRITE) -> None:
        """VFIO_IOMMU_MAP_DMA: maps whole pages of a window; what was mapped there is replaced.

        IommuError: EPERM not enabled; ENXIO no window has `iova`; EINVAL not whole pages of the window, not all in it,
        no access, or (version 2) memory that is not registered; ERANGE GPAs beyond the output width; ENOMEM
        `max_memory` of the IOMMU is used up: nothing is mapped in this range then.  As `create` for the default window.
        """
        window = self._window_for(iova)
        if size % window.page_size or gpa % window.page_size or not access:
            raise IommuError(
                errno.EINVAL, f"{self.name}: {size:#x} bytes to {gpa:#x} in pages of {window.page_size:#x}"
            )
        span = self._entries(window, iova, size)
        if span is None:
            return
        if self.v2 and not any(gpa in memory and gpa + size - 1 <= memory.last for memory in self._memory):
            raise IommuError(errno.EINVAL, f"{self.name}: {size:#x} bytes at gpa {gpa:#x} are not registered")
        assert self._domain is not None
        if gpa < 0 or gpa + size > 1 << self._domain.output_bits:
            raise IommuError(errno.ERANGE, f"{self.name}: gpa {gpa:#x} has more than {self._domain.output_bits} bits")
        self._clear(span)
        self._domain.map(iova, gpa, size, access)

    @locked
    def unmap(self, iova: int, size: int) -> None:
        """VFIO_IOMMU_UNMAP_DMA: unmaps whole pages of a window, mapped or not.  IommuError as `map`."""
        window = self._window_for(iova)
        if size % window.page_size:
            raise IommuError(errno.EINVAL, f"{self.name}: {size:#x} bytes in pages of {window.page_size:#x}")
        span = self._entries(window, iova, size)
        if span is not None:
            self._clear(span)

    def _window_for(self, iova: int) -> TceWindow:
        if not self.enabled:
            raise IommuError(
                errno.EPERM, f"{self.name} is not enabled: {'register memory' if self.v2 else 'call enable'} first"
            )
        self._create_default()
        window = self._find(iova)
        if window is None:
            raise IommuError(errno.ENXIO, f"{self.name} has no window at {iova:#x}")
        return window

    def _entries(self, window: TceWindow, iova: int, size: int) -> Span | None:
        """The IOVAs of whole entries of a window; None: no bytes.  IommuError(EINVAL): not that."""
        if iova % window.page_size or size < 0 or iova + size - 1 > window.span.last:
            raise IommuError(errno.EINVAL, f"{self.name}: {size:#x} bytes at {iova:#x} are not pages of {window.span}")
        return Span.sized(iova, size) if size else None

    def _clear(self, span: Span) -> None:
        """Unmaps all in `span`; mappings that begin or end outside keep those parts."""
        domain = self._domain
        assert domain is not None
        at = span.start
        while (found := domain.shim.first(at)) is not None and found[0] <= span.last:  # `at` grows each time
            start, last = max(found[0], at), min(found[1], span.last)
            domain.unmap(start, last - start + 1)
            at = last + 1

    # ---- enabling --------------------------------------------------------------------------

    @locked
    def enable(self) -> None:
        """VFIO_IOMMU_ENABLE, of version 1: maps are allowed from now on.

        IommuError: ENOTTY version 2; EBUSY enabled already; ENODEV there is no group; EPERM it has no default window.
        """
        self._need_v1()
        if self.enabled:
            raise IommuError(errno.EBUSY, f"{self.name} is enabled already")
        self._need_group(errno.ENODEV)
        if not self._driver.params.window32:
            raise IommuError(errno.EPERM, f"{self._groups[0]} has no default window")
        self.enabled = True

    @locked
    def disable(self) -> None:
        """VFIO_IOMMU_DISABLE, of version 1: mappings stay as they are.  IommuError(ENOTTY): version 2."""
        self._need_v1()
        self.enabled = False

    def _need_v1(self) -> None:
        if self.v2:
            raise IommuError(errno.ENOTTY, f"{self.name} is of version 2")

    @locked
    def register_memory(self, gpa: int, size: int) -> None:
        """VFIO_IOMMU_SPAPR_REGISTER_MEMORY, of version 2: allows maps of these bytes, in pages of 64 KiB.

        IommuError: ENOTTY version 1; EINVAL not whole pages, past 2**64, or overlaps other registered memory; EBUSY
        registered already; ENOMEM no bytes.
        """
        self._need_v2()
        _check_pages(gpa, size)
        if size == 0:
            raise IommuError(errno.ENOMEM, f"{self.name}: no bytes")
        span = Span.sized(gpa, size)
        if span in self._memory:
            raise IommuError(errno.EBUSY, f"{self.name}: {span} is registered already")
        if any(span.overlaps(other) for other in self._memory):
            raise IommuError(errno.EINVAL, f"{self.name}: {span} overlaps what is registered")
        self._memory.append(span)
        self.enabled = True

    @locked
    def unregister_memory(self, gpa: int, size: int) -> None:
        """VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY, of version 2; `gpa` and `size` are those of register_memory.

        IommuError: ENOTTY version 1; EINVAL not whole pages; ENOENT not registered; EBUSY some of it is mapped.
        """
        self._need_v2()
        _check_pages(gpa, size)
        span = Span.sized(gpa, size) if size else None
        if span is None or span not in self._memory:
            raise IommuError(errno.ENOENT, f"{self.name}: {size:#x} bytes at {gpa:#x} are not registered")
        if self._domain is not None and any(
            span.overlaps(Span.sized(mapping.gpa, mapping.span.size)) for mapping in self._domain.mappings()
        ):
            raise IommuError(errno.EBUSY, f"{self.name}: some of {span} is mapped")
        self._memory.remove(span)


def _check_pages(gpa: int, size: int) -> None:
    page = 1 << _PAGE_SHIFT
    if gpa < 0 or size < 0 or gpa % page or size % page or gpa + size > 1 << 64:
        raise IommuError(errno.EINVAL, f"{size:#x} bytes at {gpa:#x} are not pages of {page:#x}")
