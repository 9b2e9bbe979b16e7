"""Domains: what an IOVA means.  Linux: struct iommu_domain and the functions around it (drivers/iommu/iommu.c)."""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel import _shim
from vmodel.errors import Access, DmaFault, IommuError
from vmodel.iommu.fault import PageHandler
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.memory import GuestMemory
from vmodel.span import PAGE, Span

if TYPE_CHECKING:
    from vmodel.iommu.iommu import Iommu

_numbers = itertools.count(1)


class DomainType(enum.Enum):
    """Types of domains (Linux IOMMU_DOMAIN_*); the values are what sysfs prints of a group."""

    BLOCKED = "blocked"
    IDENTITY = "identity"
    #: Kernel-managed.
    DMA = "DMA"
    #: Kernel-managed; IOTLBs are flushed now and then instead of at each unmap.
    DMA_FQ = "DMA-FQ"
    #: User-managed.
    UNMANAGED = "unmanaged"
    #: A user's stage 1 over a paging domain.
    NESTED = "nested"
    #: A CPU's page table, for one PASID.
    SVA = "SVA"

    @property
    def is_paging(self) -> bool:
        """Whether it has map and unmap."""
        return self in (DomainType.DMA, DomainType.DMA_FQ, DomainType.UNMANAGED)


class AllocFlags(enum.IntFlag):
    """Flags of `paging_domain_alloc` (Linux IOMMU_HWPT_ALLOC_*)."""

    NONE = 0
    #: May be the stage 2 of nested domains.
    NEST_PARENT = 1
    #: Its writes can be tracked.
    DIRTY_TRACKING = 2
    #: May be attached to PASIDs as well.
    PASID = 8
    #: DMA through it always snoops.
    ENFORCE_SNOOP = 1 << 16


@dataclass(frozen=True)
class Mapping:
    """IOVAs `span` lead to `gpa` and on; `access` says what may be done."""

    span: Span
    gpa: int
    access: Access


class Domain:
    """Base of all domains.  `users` counts the groups (and PASIDs of groups) that are attached."""

    def __init__(self, kind: DomainType, shim: _shim.Domain, made_for: Iommu | None, name: str = "") -> None:
        self.type = kind
        self.shim = shim
        #: The IOMMU that it was allocated for; None: fits all.
        self.made_for = made_for
        self.name = name or f"{kind.value}{next(_numbers)}"
        self.users = 0
        #: Asked when an access finds no page; None: the access fails.
        self.page_handler: PageHandler | None = None

    def iova_to_phys(self, iova: int) -> int | None:
        """The GPA that `iova` leads to, by mapping or table and past all IOTLBs; None: nowhere.  Sets no flags."""
        try:
            start, _, gpa, _, _ = self.shim.walk(iova, 0)
        except DmaFault:
            return None
        return gpa + (iova - start)

    def __repr__(self) -> str:
        return f"<{self.type.value} domain {self.name}>"


class BlockedDomain(Domain):
    """Lets nothing through."""

    def __init__(self) -> None:
        super().__init__(DomainType.BLOCKED, _shim.Domain.plain(_shim.DOMAIN_BLOCKED), None, "blocked")


class IdentityDomain(Domain):
    """IOVA = GPA, for all of memory."""

    def __init__(self) -> None:
        super().__init__(DomainType.IDENTITY, _shim.Domain.plain(_shim.DOMAIN_IDENTITY), None, "identity")


class PagingDomain(Domain):
    """Mappings that software makes and removes.

    Its limits are those of the IOMMU it was made for.  `deferred`: unmapped ranges stay in IOTLBs until `flush`, which
    comes by itself after `flush_unmaps` unmaps or `flush_ms`.
    """

    def __init__(self, kind: DomainType, made_for: Iommu, flags: AllocFlags, name: str = "") -> None:
        can = made_for.capabilities
        self.page_sizes = can.page_sizes
        self.aperture = can.usable
        self.output_bits = can.output_bits
        self.flags = flags
        shim = _shim.Domain.paging(
            sum(self.page_sizes),
            self.aperture.start,
            self.aperture.last,
            (1 << can.output_bits) - 1,
            can.max_mappings,
            made_for.budget,
        )
        super().__init__(kind, shim, made_for, name)
        self.deferred = kind is DomainType.DMA_FQ
        #: How often IOTLBs were flushed.
        self.flushes = 0
        #: Whether writes are being tracked.
        self.tracking = False
        self._map = shim.try_map
        self._unmap = shim.try_unmap
        self._flush_after = can.flush_unmaps
        self._flush_seconds = can.flush_ms / 1000
        self._waiting: list[Span] = []
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    @property
    def coherent(self) -> bool:
        """Whether walks of its tables see the CPU's caches."""
        return self.made_for is not None and self.made_for.capabilities.coherent

    @property
    def enforces_snoop(self) -> bool:
        """Whether DMA through it always snoops."""
        return bool(self.flags & AllocFlags.ENFORCE_SNOOP)

    @property
    def tracks(self) -> bool:
        """Whether writes can be tracked."""
        return bool(self.flags & AllocFlags.DIRTY_TRACKING)

    @property
    def nests(self) -> bool:
        """Whether it can be the stage 2 of others."""
        return bool(self.flags & AllocFlags.NEST_PARENT)

    def map(self, iova: int, gpa: int, size: int, access: Access = Access.READ | Access.WRITE) -> None:
        """Maps `size` bytes.

        IommuError: EINVAL not whole pages of the smallest size, or no access; ERANGE outside of the aperture or beyond
        the output width; EEXIST something there is mapped; ENOSPC too many mappings; ENOMEM no
        memory is left of what the IOMMU's mappings may take.
        """
        try:
            rc = self._map(iova, gpa, size, access)
        except OverflowError:
            rc = -errno.ERANGE
        if rc:
            raise _why(-rc, f"map of {size:#x} bytes at iova {iova:#x} to gpa {gpa:#x}")

    def map_inaccessible(self, iova: int, gpa: int, size: int) -> None:
        """As `map`, but nothing may be done there; its `access` is empty."""
        self.map(iova, gpa, size, _NO_ACCESS)

    def is_mapped(self, span: Span) -> bool:
        """Whether anything of `span` is."""
        first = self.shim.first(span.start)
        return first is not None and first[0] <= span.last

    def unmap(self, iova: int, size: int) -> int:
        """Unmaps `size` bytes; how many were (Linux iommu_unmap).

        It ends at the first hole, and before a page that it would have to cut: what is one page (the largest that
        alignment allows) goes in one piece or not at all.  IommuError(EINVAL): not whole pages of the smallest size.
        """
        if self.deferred:
            return self._unmap_later(iova, size)
        removed = self._unmap_pages(iova, size, 0)
        if removed:
            self.flushes += 1
        return removed

    def _unmap_pages(self, iova: int, size: int, flags: int) -> int:
        try:
            rc = self._unmap(iova, size, flags)
        except OverflowError:
            rc = -errno.ERANGE
        if rc < 0:
            raise _why(-rc, f"unmap of {size:#x} bytes at iova {iova:#x}")
        return rc << 12

    def clear(self, span: Span, *, flush: bool = True) -> int:
        """Unmaps every mapping in `span`, holes or not; how many bytes were.  Without `flush` they stay in IOTLBs.

        IommuError(ERANGE): a mapping reaches out of it; nothing is gone.
        """
        try:
            return self.shim.clear(span.start, span.last, 0 if flush else _shim.UNMAP_DEFER)
        except OSError as error:
            raise _why(_code(error), f"unmap of all in {span}") from None

    def _unmap_later(self, iova: int, size: int) -> int:
        removed = self._unmap_pages(iova, size, _shim.UNMAP_DEFER)
        if removed:
            with self._lock:
                self._waiting.append(Span.sized(iova, removed))
                full = len(self._waiting) >= self._flush_after
                if self._timer is None and not full:
                    self._timer = threading.Timer(self._flush_seconds, self.flush)
                    self._timer.daemon = True
                    self._timer.start()
            if full:
                self.flush()
        return removed

    @property
    def waiting(self) -> list[Span]:
        """What was unmapped and may be in IOTLBs still."""
        with self._lock:
            return list(self._waiting)

    def flush(self) -> None:
        """Takes all of this domain out of the IOTLBs; returns when no access by an old mapping is under way."""
        with self._lock:
            self._waiting.clear()
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        self.flushes += 1
        self.shim.flush(0, (1 << 64) - 1)

    def flush_span(self, span: Span) -> None:
        """Likewise only `span` (IOVA)."""
        self.flushes += 1
        self.shim.flush(span.start, span.last)

    @contextlib.contextmanager
    def gather(self) -> Iterator[Gather]:
        """Unmaps of the `with` block share one flush, at its end (Linux struct iommu_iotlb_gather)."""
        gathered = Gather(self)
        try:
            yield gathered
        finally:
            gathered.sync()

    def mappings(self) -> Iterator[Mapping]:
        """All mappings, ascending, as they were made, less what was unmapped."""
        for start, last, gpa, prot, _ in self.shim.list():
            yield Mapping(Span(start, last), gpa, Access(prot))

    def __len__(self) -> int:
        return self.shim.count()[0]

    # ---- dirty tracking --------------------------------------------------------------------

    def set_dirty_tracking(self, on: bool) -> None:
        """Starts with an empty log, or stops and forgets it.  IommuError(EOPNOTSUPP): not allocated for it."""
        if not self.tracks:
            raise IommuError(errno.EOPNOTSUPP, f"{self.name} was allocated without dirty tracking")
        if on and not self.tracking:
            self.shim.dirty_start()
        elif self.tracking and not on:
            self.shim.dirty_stop()
        self.tracking = on

    def read_dirty(self, span: Span, page_size: int = PAGE, *, clear: bool = True) -> bytes:
        """Which pages of `span` (IOVA) DMA has written to since the log was last cleared there.

        A little-endian bitmap, one bit for each `page_size`, padded to 8 bytes.  IommuError(EINVAL): tracking is off,
        or `span` is not made of whole pages.
        """
        try:
            return self.shim.dirty_report(span.start, span.size, page_size, not clear)
        except (OSError, OverflowError) as error:
            raise _why(_code(error), f"dirty report of {span} in pages of {page_size:#x}") from None


class Gather:
    """Unmaps whose flush is still to come."""

    def __init__(self, domain: PagingDomain) -> None:
        self._domain = domain
        self._span: Span | None = None

    def unmap(self, iova: int, size: int) -> int:
        """As PagingDomain.unmap; the range stays in IOTLBs until `sync`."""
        removed = self._domain._unmap_pages(iova, size, _shim.UNMAP_DEFER)
        if removed:
            fresh = Span.sized(iova, removed)
            old = self._span or fresh
            self._span = Span(min(old.start, fresh.start), max(old.last, fresh.last))
        return removed

    def sync(self) -> None:
        """One flush over all that was unmapped."""
        if self._span is not None:
            self._domain.shim.flush(self._span.start, self._span.last)
            self._domain.flushes += 1
            self._span = None


class TableDomain(Domain):
    """Translates by tables in guest memory: nested ones (a stage 1 over `parent`) and SVA.

    `memory` is where the IOMMU reads them.  The guest may change them at any time, and has to say so by `flush`.  A
    `parent` that is a TableDomain has none itself.
    """

    def __init__(
        self,
        kind: DomainType,
        made_for: Iommu,
        memory: GuestMemory,
        table: Table,
        parent: PagingDomain | TableDomain | None = None,
    ) -> None:
        self.table = table
        self.parent = parent
        try:
            shim = _shim.Domain.table(
                memory.shim,
                table.format,
                table.levels,
                table.root,
                table.input_bits,
                table.output_bits,
                table.flags,
                None if parent is None else parent.shim,
            )
        except (OSError, OverflowError) as error:
            raise _why(_code(error), f"{table}") from None
        super().__init__(kind, shim, made_for)

    def flush(self, span: Span | None = None, *, own: bool = True) -> None:
        """Takes what was walked, all or only `span` (IOVA), out of the IOTLBs.

        `own`: also out of those that are a device's own (Endpoint.has_tlb).
        """
        whole = span or Span(0, (1 << 64) - 1)
        self.shim.flush(whole.start, whole.last, 0 if own else _shim.FLUSH_KEEP_OWN)


#: To the shim: a mapping through which nothing may be done.
_NO_ACCESS = Access(_shim.PROT_NONE)

_WHY = {
    errno.EINVAL: "not whole pages, or nothing is asked for",
    errno.ERANGE: "outside of the aperture or beyond the output width",
    errno.EEXIST: "overlaps a mapping",
    errno.ENOSPC: "too many mappings",
    errno.ENOMEM: "no memory is left of max_memory",
}


def _why(code: int, what: str) -> IommuError:
    return IommuError(code, f"{what}: {_WHY.get(code) or os.strerror(code)}")


def _code(error: OSError | OverflowError) -> int:
    """What does not fit into 64 bits is beyond any aperture."""
    return error.errno or errno.EINVAL if isinstance(error, OSError) else errno.ERANGE


#: Formats whose tables are a process's, so that an SVA domain may have them.
CPU_FORMATS = frozenset((TableFormat.X86, TableFormat.ARM_S1))
