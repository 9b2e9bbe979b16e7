"""`Pages`: the memory of a mapping; `MappedArea`: where an IOAS has a part of it (Linux iopt_pages, iopt_area)."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from vmodel.errors import Access, IommuError
from vmodel.iommu.domain import Mapping
from vmodel.iommu.iommufd.cover import Cover
from vmodel.iommu.iommufd.process import AccountMode, Process
from vmodel.span import PAGE, Span


class Pages:
    """Memory from a GPA on, as one call maps it; copies share it, so that a page is pinned and counted once.

    It is pinned page by page, as HWPTs and kernel accesses need it; pages have numbers, from 0 on.
    """

    #: Whether it is of a file in memory.
    of_file = False
    #: Whether it is memory of a device.
    of_device = False

    def __init__(self, process: Process, mode: AccountMode, gpa: int, *, writable: bool) -> None:
        #: Who mapped it: the pages are its own, and count against its limit.
        self.process = process
        self.mode = AccountMode.NONE if process.ipc_lock else mode
        #: The GPA of page 0, and what IOVAs are aligned like if they are allocated.
        self.gpa = self.address = gpa & -PAGE
        #: Whether copies may have WRITE.
        self.writable = writable
        #: Whether it has been taken back, so that HWPTs do not have it any more.
        self.revoked = False
        self.pinned = 0
        self._cover = Cover()

    def check(self, first: int, last: int) -> None:
        """IommuError(EFAULT): a page would have to be pinned, and the process has exited (pfn_reader_user_pin)."""
        if self.process.exited and not self.covers(first, last):
            raise IommuError(errno.EFAULT, "the process that has mapped it has exited")

    def covers(self, first: int, last: int) -> bool:
        """Whether all of the pages are pinned."""
        return self._cover.covers(first, last)

    def move(self, process: Process) -> None:
        """Counts it against another process, which has been charged for it."""
        self.process.uncharge(self.mode, self.pinned)
        self.process = process

    def pin(self, first: int, last: int) -> None:
        """Pins the pages once more.  IommuError: ENOMEM beyond the process's limit; else as `check`."""
        self.check(first, last)
        fresh = self._cover.add(first, last)
        try:
            if fresh:
                self.process.charge(self.mode, fresh)
        except IommuError:
            self._cover.remove(first, last)
            raise
        self.pinned += fresh

    def unpin(self, first: int, last: int) -> None:
        """Undoes one `pin` of the same pages."""
        gone = self._cover.remove(first, last)
        self.pinned -= gone
        self.process.uncharge(self.mode, gone)


@dataclass(eq=False)
class MappedArea:
    """The IOVAs `span` of an IOAS, which lead to `pages` from its byte `start` on."""

    span: Span
    access: Access
    pages: Pages
    start: int
    #: How often kernel accesses have pinned parts of it.
    accesses: int = field(default=0)
    #: How many of them forbid that it is unmapped.
    locks: int = field(default=0)
    #: Whether it is being unmapped, so that it cannot be pinned any more.
    leaving: bool = field(default=False)

    @property
    def gpa(self) -> int:
        """The GPA of its first byte."""
        return self.pages.gpa + self.start

    @property
    def mapping(self) -> Mapping:
        """It as others see it."""
        return Mapping(self.span, self.gpa, self.access, self.cache)

    @property
    def cache(self) -> bool:
        """Whether it is mapped with IOMMU_CACHE: all but memory of devices (Linux batch_to_domain)."""
        return not self.pages.of_device

    def byte(self, iova: int) -> int:
        """The byte of `pages` that an IOVA of the area leads to."""
        return self.start + iova - self.span.start

    def numbers(self, first: int, last: int) -> tuple[int, int]:
        """The numbers of the first and last page of the IOVAs."""
        return self.byte(first) // PAGE, self.byte(last) // PAGE

    def check(self) -> None:
        """As Pages.check, for all of it."""
        self.pages.check(*self.numbers(self.span.start, self.span.last))

    def pin(self) -> None:
        """As Pages.pin, for all of it."""
        self.pages.pin(*self.numbers(self.span.start, self.span.last))

    def unpin(self) -> None:
        """Undoes `pin`."""
        self.pages.unpin(*self.numbers(self.span.start, self.span.last))
