"""Domains: translations from IOVA to GPA.  Linux: struct iommu_domain and its functions (drivers/iommu/iommu.c)."""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmodel import _shim
from vmodel.errors import Access, DmaFault, IommuError
from vmodel.iommu.changes import ChangeKind
from vmodel.iommu.fault import PageHandler
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.memory import GuestMemory
from vmodel.span import PAGE, Span

if TYPE_CHECKING:
    from vmodel.iommu.group import Group
    from vmodel.iommu.iommu import Iommu

_numbers = itertools.count(1)


class DomainType(enum.Enum):
    """Types of domains (Linux IOMMU_DOMAIN_*); the values are those of a group's `type` in sysfs."""

    BLOCKED = "blocked"
    IDENTITY = "identity"
    #: Kernel-managed.
    DMA = "DMA"
    #: Kernel-managed; IOTLB flushes are deferred and batched instead of done at each unmap.
    DMA_FQ = "DMA-FQ"
    #: User-managed.
    UNMANAGED = "unmanaged"
    #: A user's stage 1 over a paging domain.
    NESTED = "nested"
    #: A CPU's page table, for one PASID.
    SVA = "SVA"

    @property
    def is_paging(self) -> bool:
        """Whether such domains have map and unmap."""
        return self in (DomainType.DMA, DomainType.DMA_FQ, DomainType.UNMANAGED)


#: Types that default domains may have.
DEFAULT_TYPES = frozenset((DomainType.IDENTITY, DomainType.DMA, DomainType.DMA_FQ))


class AllocFlags(enum.IntFlag):
    """Flags of `paging_domain_alloc` (Linux IOMMU_HWPT_ALLOC_*)."""

    NONE = 0
    #: May be the stage 2 of nested domains.
    NEST_PARENT = 1
    #: Writes through it can be tracked.
    DIRTY_TRACKING = 2
    #: May be attached to PASIDs, too.
    PASID = 8
    #: DMA through it always snoops.
    ENFORCE_SNOOP = 1 << 16


@dataclass(frozen=True)
class Mapping:
    """The IOVAs `span` map to GPAs from `gpa` on, with the permissions `access`.  `cache`: Linux's IOMMU_CACHE."""

    span: Span
    gpa: int
    access: Access
    cache: bool = field(default=True, repr=False)


class Domain:
    """The base of all domains.  `groups`: those that are attached, once for each attachment (also of PASIDs)."""

    def __init__(self, kind: DomainType, shim: _shim.Domain, made_for: Iommu | None, name: str = "") -> None:
        self.type = kind
        self.shim = shim
        #: The IOMMU that it was allocated for; None: it fits all.
        self.made_for = made_for
        self.name = name or f"{kind.value}{next(_numbers)}"
        self.groups: list[Group] = []
        #: The groups whose default domain it is, attached or not.
        self.defaults: weakref.WeakSet[Group] = weakref.WeakSet()
        #: Answers page requests when an access finds no page; None: the access fails.
        self.page_handler: PageHandler | None = None

    @property
    def users(self) -> int:
        """How many groups, and PASIDs of groups, are attached."""
        return len(self.groups)

    def snoops(self, iova: int, *, no_snoop: bool) -> bool:
        """Whether an access at `iova` snoops the CPU's caches; `no_snoop`: its request has that attribute.

        Only paging domains, and domains nested in one, can overrule the request.
        """
        return not no_snoop

    def iova_to_phys(self, iova: int) -> int | None:
        """The GPA of `iova` by mappings or tables, ignoring IOTLBs; None: not mapped.  Sets no flags in tables."""
        try:
            start, _, gpa, _, _ = self.shim.walk(iova, 0)
        except (DmaFault, OverflowError):  # the latter: no address
            return None
        return gpa + (iova - start)

    def __repr__(self) -> str:
        return f"<{self.type.value} domain {self.name}>"


class BlockedDomain(Domain):
    """Blocks all DMA."""

    def __init__(self) -> None:
        super().__init__(DomainType.BLOCKED, _shim.Domain.plain(_shim.DOMAIN_BLOCKED), None, "blocked")


class IdentityDomain(Domain):
    """Maps each IOVA to the same GPA."""

    def __init__(self) -> None:
        super().__init__(DomainType.IDENTITY, _shim.Domain.plain(_shim.DOMAIN_IDENTITY), None, "identity")


class PagingDomain(Domain):
    """A domain whose mappings are made and removed by `map` and `unmap`.

    Its limits are those of the IOMMU that it was made for.  If `deferred`, unmapped ranges stay in IOTLBs until
    `flush`, which happens automatically after `flush_unmaps` unmaps or `flush_ms` milliseconds (see Capabilities).
    """

    def __init__(
        self,
        kind: DomainType,
        made_for: Iommu,
        flags: AllocFlags,
        name: str = "",
        *,
        page_sizes: frozenset[int] | None = None,
    ) -> None:
        """`page_sizes`: those of its entries; None: all that the IOMMU has."""
        can = made_for.capabilities
        self.page_sizes = page_sizes or can.page_sizes
        self.aperture = can.usable
        self.output_bits = can.output_bits
        self.flags = flags
        #: Whether `areas.fill` maps large pages; otherwise any page can be unmapped.
        self.large_pages = True
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
        #: How often the IOTLBs were flushed for this domain.
        self.flushes = 0
        #: Whether writes are being tracked.
        self.tracking = False
        self._map = shim.try_map
        self._no_read_only = self.nests and made_for.driver.parent_writable
        self._unmap = shim.try_unmap
        self._map_errors = made_for.driver.map_errors
        self._coherency = made_for.driver.coherency
        self._snoop_by_entry = made_for.driver.snoop_by_entry(flags)
        self._enforced = False
        #: What the shim keeps with each mapping beside permissions.
        self._marks = 0
        if AllocFlags.ENFORCE_SNOOP in flags:
            self._enforce()
        self._flush_after = can.flush_unmaps
        self._flush_seconds = can.flush_ms / 1000
        self._waiting: list[Span] = []
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def defer_flushes(self) -> None:
        """Makes a DMA domain a DMA-FQ one, in use or not (Linux: DMA-FQ written to `type`, also with a driver).

        IommuError(EINVAL): it is of another type.
        """
        if self.type not in (DomainType.DMA, DomainType.DMA_FQ):
            raise IommuError(errno.EINVAL, f"{self.name}: {self.type.value} domains cannot defer flushes")
        self.type, self.deferred = DomainType.DMA_FQ, True
        for group in list(self.defaults):
            group.changes.notify(ChangeKind.DEFAULT_DOMAIN, group=group, value=self)

    @property
    def coherent(self) -> bool:
        """Whether walks of its tables snoop the CPU's caches."""
        return self.made_for is not None and self.made_for.capabilities.coherent

    @property
    def enforces_snoop(self) -> bool:
        """Whether snooping is enforced, for all that was mapped since."""
        return self._enforced

    def enforce_cache_coherency(self) -> bool:
        """Makes DMA snoop, whatever its requests say; returns whether (Linux's operation of this name).

        False, and nothing changes: the IOMMU cannot, or a device that is attached cannot.  Devices that cannot are not
        attached afterwards.  VT-d's second-stage entries keep what they were made with: call it before `map`.
        """
        if not self._coherency.enforces:
            return False
        devices = [endpoint for group in self.groups for endpoint in group.endpoints]
        if not self._coherency.always and not all(device.can_enforce_snoop for device in devices):
            return False
        self._enforce()
        return True

    def _enforce(self) -> None:
        self._enforced = True
        self._marks = _shim.MAP_SNOOP if self._snoop_by_entry else 0

    def snoops(self, iova: int, *, no_snoop: bool) -> bool:
        found = self.shim.first(iova) if 0 <= iova < 1 << 64 else None
        flags = found[3] if found is not None and found[0] <= iova else 0
        forced = bool(flags & _shim.MAP_SNOOP) if self._snoop_by_entry else self._enforced
        return self._coherency.snoops(cache=not flags & _shim.MAP_NO_CACHE, forced=forced, no_snoop=no_snoop)

    @property
    def tracks(self) -> bool:
        """Whether writes can be tracked."""
        return bool(self.flags & AllocFlags.DIRTY_TRACKING)

    @property
    def nests(self) -> bool:
        """Whether it can be the stage 2 of nested domains."""
        return bool(self.flags & AllocFlags.NEST_PARENT)

    def map(
        self, iova: int, gpa: int, size: int, access: Access = Access.READ | Access.WRITE, *, cache: bool = True
    ) -> None:
        """Maps `size` bytes; `cache`: with IOMMU_CACHE, without which DMA is not coherent on Arm.

        IommuError: EINVAL no bytes, no access, or on VT-d read-only in a parent of nested domains; ENXIO not whole
        pages of the smallest size; EOVERFLOW past 2**64; ERANGE outside of the aperture or beyond the output width;
        EADDRINUSE overlaps a mapping; ENOSPC too many mappings; ENOMEM `max_memory` of the IOMMU is used up.  Kinds
        whose driver in Linux does not use generic_pt have EINVAL, ERANGE and EEXIST for ENXIO, EOVERFLOW and
        EADDRINUSE (virtio-iommu: EINVAL for the last, too).
        """
        if self._no_read_only and access == Access.READ:
            text = f"{self.name}: the parent of nested domains has no read-only mappings (ERRATA_772415_SPR17)"
            raise IommuError(errno.EINVAL, text)
        try:
            if cache and not self._marks and access <= 3:  # the usual case
                rc = self._map(iova, gpa, size, access)
            else:
                rc = self._map(iova, gpa, size, self._marked(access, cache))
        except OverflowError:
            rc = -errno.ERANGE
        if rc:
            code = self._map_errors.find(-rc, iova, gpa, size, self._marked(access, cache), self.output_bits)
            what = f"map of {size:#x} bytes at iova {iova:#x} to gpa {gpa:#x}"
            if code == errno.EINVAL and not (size and self._marked(access, cache)):
                raise IommuError(code, f"{what}: {'no access' if size else 'no bytes'}")
            raise IommuError(code, f"{what}: overlaps a mapping") if rc == -errno.EEXIST else _why(code, what)

    def _marked(self, access: int, cache: bool) -> int:
        """Permissions with what else the shim keeps; 0, which it refuses, for what is no permission."""
        if access == _shim.PROT_NONE:
            return access
        return access | self._marks | (0 if cache else _shim.MAP_NO_CACHE) if 0 < access <= 3 else 0

    def map_inaccessible(self, iova: int, gpa: int, size: int) -> None:
        """As `map`, but without any permission: the mapping exists, and each access to it faults."""
        self.map(iova, gpa, size, NO_ACCESS)

    def is_mapped(self, span: Span) -> bool:
        """Whether any part of `span` is mapped."""
        first = self.shim.first(span.start)
        return first is not None and first[0] <= span.last

    def unmap(self, iova: int, size: int) -> int:
        """Unmaps `size` bytes; returns the number of bytes unmapped (Linux iommu_unmap, generic_pt's __unmap_range).

        It stops at the first hole.  A page (of the largest size that alignment allows) is one entry of the table, and
        goes as a whole: if the range ends inside of one, more than `size` bytes are unmapped; if it begins inside of
        one, nothing is.  IommuError(EINVAL): not whole pages of the smallest size.
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
        """Unmaps every mapping in `span`, which may have holes; returns the number of bytes unmapped.

        Without `flush` the ranges stay in IOTLBs.  IommuError(ERANGE): a mapping is only partly in `span`; nothing is
        unmapped.
        """
        try:
            return self.shim.clear(span.start, span.last, 0 if flush else _shim.UNMAP_DEFER)
        except OSError as error:
            what = f"unmap of all in {span}"
            if _code(error) == errno.ERANGE:
                raise IommuError(errno.ERANGE, f"{what}: a mapping is only partly in it") from None
            raise _why(_code(error), what) from None

    def _unmap_later(self, iova: int, size: int) -> int:
        removed = self._unmap_pages(iova, size, _shim.UNMAP_DEFER)
        if removed:
            with self._lock:
                self._waiting.append(Span.sized(iova, removed))
                full = len(self._waiting) >= self._flush_after
                if self._timer is None and not full:
                    timer = threading.Timer(self._flush_seconds, self.flush)
                    timer.daemon = True
                    try:
                        timer.start()
                    except RuntimeError:  # the host has no thread for it
                        full = True
                    else:
                        self._timer = timer
            if full:
                self.flush()
        return removed

    @property
    def waiting(self) -> list[Span]:
        """The ranges that were unmapped and may still be in IOTLBs."""
        with self._lock:
            return list(self._waiting)

    def flush(self) -> None:
        """Flushes this domain from all IOTLBs; returns when no access through an old mapping is under way."""
        with self._lock:
            self._waiting.clear()
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        self.flushes += 1
        self.shim.flush(0, (1 << 64) - 1)

    def flush_span(self, span: Span) -> None:
        """As `flush`, for `span` (IOVA) only."""
        self.flushes += 1
        self.shim.flush(span.start, span.last)

    @contextlib.contextmanager
    def gather(self) -> Iterator[Gather]:
        """Collects the unmaps of a `with` block for one flush at its end (Linux struct iommu_iotlb_gather)."""
        gathered = Gather(self)
        try:
            yield gathered
        finally:
            gathered.sync()

    def mappings(self) -> Iterator[Mapping]:
        """All mappings, ascending, each as it was made, minus the parts that were unmapped."""
        for start, last, gpa, prot, _ in self.shim.list():
            yield Mapping(Span(start, last), gpa, Access(prot & _RW), cache=not prot & _shim.MAP_NO_CACHE)

    def __len__(self) -> int:
        return self.shim.count()[0]

    # ---- dirty tracking --------------------------------------------------------------------

    def set_dirty_tracking(self, on: bool) -> None:
        """Starts tracking with an empty log, or stops and discards the log.

        IommuError(EOPNOTSUPP): the domain was allocated without DIRTY_TRACKING.
        """
        if not self.tracks:
            raise IommuError(errno.EOPNOTSUPP, f"{self.name} was allocated without dirty tracking")
        if on and not self.tracking:
            self.shim.dirty_start()
        elif self.tracking and not on:
            self.shim.dirty_stop()
        self.tracking = on

    def read_dirty(self, span: Span, page_size: int = PAGE, *, clear: bool = True) -> bytes:
        """The pages of `span` (IOVA) that DMA has written to since they were last cleared; `clear` clears them.

        The result is a little-endian bitmap, one bit for each `page_size` bytes, padded to a multiple of 8 bytes.
        IommuError: EINVAL tracking is off, or `span` is not made of whole pages; ENOMEM more than 2**31 of them.
        """
        if not self.tracking:
            raise IommuError(errno.EINVAL, f"{self.name}: dirty tracking is off")
        check_report(span, page_size)
        try:
            return self.shim.dirty_report(span.start, span.size, page_size, not clear)
        except (OSError, OverflowError) as error:
            raise _why(_code(error), f"dirty report of {span} in pages of {page_size:#x}") from None


class Gather:
    """Collects unmaps for one common flush."""

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
        """Flushes one range that covers all that was unmapped."""
        if self._span is not None:
            self._domain.shim.flush(self._span.start, self._span.last)
            self._domain.flushes += 1
            self._span = None


class TableDomain(Domain):
    """Translates by tables in guest memory: nested domains (a stage 1 over `parent`) and SVA.

    The IOMMU reads the tables from `memory`.  The guest may change them at any time; the new entries are used for
    certain after `flush`.  A `parent` that is a TableDomain must not have a parent itself.
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

    def snoops(self, iova: int, *, no_snoop: bool) -> bool:
        # VT-d: Linux sets PGSNP of a nested PASID entry by its parent (pasid_pte_config_nested).
        return not no_snoop or (isinstance(self.parent, PagingDomain) and self.parent.enforces_snoop)

    def flush(self, span: Span | None = None, *, own: bool = True) -> None:
        """Flushes cached translations, all or those in `span` (IOVA), from the IOTLBs.

        `own`: also from the TLBs of devices with ATS (Endpoint.set_ats).
        """
        whole = span or Span(0, (1 << 64) - 1)
        self.shim.flush(whole.start, whole.last, 0 if own else _shim.FLUSH_KEEP_OWN)


def check_report(span: Span, page_size: int) -> None:
    """IommuError: EINVAL `span` is not made of whole pages of `page_size`; ENOMEM a bitmap of them has over 256 MiB."""
    what = f"dirty report of {span} in pages of {page_size:#x}"
    if page_size < PAGE or page_size & (page_size - 1) or (span.start | span.size) & (page_size - 1):
        raise IommuError(errno.EINVAL, f"{what}: not whole pages")
    if span.size // page_size > _MOST_DIRTY:
        raise IommuError(errno.ENOMEM, f"{what}: more than {_MOST_DIRTY:#x} pages")


#: The most pages of a dirty report: a bitmap of 256 MiB.
_MOST_DIRTY = 1 << 31
#: The shim's flag for a mapping without any permission.
NO_ACCESS = Access(_shim.PROT_NONE)
_RW = Access.READ | Access.WRITE

_WHY = {
    errno.EINVAL: "not whole pages",
    errno.ENXIO: "not whole pages",
    errno.EOVERFLOW: "past 2**64",
    errno.ERANGE: "outside of the aperture or beyond the output width",
    errno.ENOSPC: "too many mappings",
    errno.ENOMEM: "max_memory is used up",
}


def _why(code: int, what: str) -> IommuError:
    return IommuError(code, f"{what}: {_WHY.get(code) or os.strerror(code)}")


def _code(error: OSError | OverflowError) -> int:
    """The errno of an error.  An OverflowError, from a value of more than 64 bits, is ERANGE: beyond any aperture."""
    return error.errno or errno.EINVAL if isinstance(error, OSError) else errno.ERANGE


#: Formats of CPU page tables, which SVA domains may use.
CPU_FORMATS = frozenset((TableFormat.X86, TableFormat.ARM_S1, TableFormat.RISCV_S1))
