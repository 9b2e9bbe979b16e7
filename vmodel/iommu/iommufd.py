"""Address spaces as iommufd has them: `Ioas`, `Hwpt`, `Device`, `FaultObject`.

errno values are those of Linux (include/uapi/linux/iommufd.h, drivers/iommu/iommufd).  Guest memory takes the place of
a process's, so a map names a GPA.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from vmodel.errors import Access, IommuError
from vmodel.iommu.areas import Areas, common, fill, holes, map_in_all
from vmodel.iommu.capabilities import RegionType
from vmodel.iommu.core import Endpoint, nested_domain_alloc, paging_domain_alloc
from vmodel.iommu.domain import AllocFlags, Domain, Mapping, PagingDomain, TableDomain
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.group import Group, can_attach
from vmodel.iommu.pgtable import Table
from vmodel.memory import GuestMemory
from vmodel.span import PAGE, Span

_LAST = (1 << 64) - 1
_RW = Access.READ | Access.WRITE
_contexts = itertools.count(1)


@dataclass(frozen=True)
class HwInfo:
    """What IOMMU_GET_HW_INFO and IOMMU_DEVICE capabilities tell of a device's IOMMU."""

    kind: str
    coherent: bool
    enforce_snoop: bool
    dirty_tracking: bool
    pasid_bits: int
    page_sizes: frozenset[int]


class _Object:
    """Something with an id, which cannot go while it is used."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.id = context.register(self)
        self.users = 0

    def _release(self) -> None:
        """What goes with the object."""

    def destroy(self) -> None:
        """IOMMU_DESTROY.  IommuError: EBUSY it is in use; ENOENT it is gone."""
        self.context.destroy(self.id)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.id}"


class Context:
    """One open /dev/iommu; owner of the groups of the devices that are bound to it."""

    def __init__(self) -> None:
        self._objects: dict[int, _Object] = {}
        self._ids = itertools.count(1)
        self._number = next(_contexts)
        #: What the devices of a group are attached to together.
        self.attached: dict[tuple[Group, int | None], Hwpt] = {}

    def register(self, item: _Object) -> int:
        """Gives an object its id."""
        number = next(self._ids)
        self._objects[number] = item
        return number

    def __getitem__(self, number: int) -> _Object:
        """The object with an id.  IommuError(ENOENT)."""
        try:
            return self._objects[number]
        except KeyError:
            raise IommuError(errno.ENOENT, f"{self} has no object {number}") from None

    def destroy(self, number: int) -> None:
        """IOMMU_DESTROY.  IommuError: EBUSY it is in use; ENOENT there is none."""
        item = self[number]
        if item.users:
            raise IommuError(errno.EBUSY, f"{item} is in use")
        item._release()
        del self._objects[number]

    def forget(self, item: _Object) -> None:
        """Takes an id back from an object that could not be made."""
        del self._objects[item.id]

    def devices(self) -> list[Device]:
        """The devices bound to it."""
        return [item for item in self._objects.values() if isinstance(item, Device)]

    def __str__(self) -> str:
        return f"iommufd context {self._number}"


class Ioas(_Object):
    """A map of IOVAs, shown to devices by the paging HWPTs that are made from it."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.hwpts: list[Hwpt] = []
        self._areas = Areas()
        self._allowed: list[Span] | None = None
        #: Reserved by whom: goes when it leaves.
        self._reserved: list[tuple[Span, object]] = []

    # ---- addresses -------------------------------------------------------------------------

    @property
    def alignment(self) -> int:
        """What IOVAs, GPAs and sizes must be multiples of: the largest of the HWPTs' smallest pages."""
        return max((min(hwpt.paging.page_sizes) for hwpt in self.hwpts), default=PAGE)

    def iova_ranges(self) -> list[Span]:
        """IOMMU_IOAS_IOVA_RANGES: what may be mapped, given the devices that are attached."""
        ranges = [Span(0, _LAST)]
        for hwpt in self.hwpts:
            ranges = common(ranges, [hwpt.paging.aperture])
        return holes(ranges, [span for span, _ in self._reserved])

    def allow_iovas(self, spans: Iterable[Span]) -> None:
        """IOMMU_IOAS_ALLOW_IOVAS: these stay mappable, and chosen IOVAs come from them; none: from anywhere.

        IommuError: EINVAL they overlap; EADDRINUSE one is not in `iova_ranges`.
        """
        wanted = sorted(spans)
        if any(a.overlaps(b) for a, b in itertools.pairwise(wanted)):
            raise IommuError(errno.EINVAL, f"{self}: allowed ranges that overlap")
        for span in wanted:
            if not any(valid.covers(span) for valid in self.iova_ranges()):
                raise IommuError(errno.EADDRINUSE, f"{self}: {span} is reserved for a device")
        self._allowed = wanted or None

    def reserve(self, span: Span, owner: object) -> None:
        """Nothing may be mapped there as long as `owner` is attached.  IommuError(EADDRINUSE): something is."""
        if self._areas.overlaps(span):
            raise IommuError(errno.EADDRINUSE, f"{self}: {span}, which is to be reserved, has a mapping")
        if any(allowed.overlaps(span) for allowed in self._allowed or ()):
            raise IommuError(errno.EADDRINUSE, f"{self}: {span}, which is to be reserved, is an allowed range")
        self._reserved.append((span, owner))

    def unreserve(self, owner: object) -> None:
        """All that `owner` had reserved."""
        self._reserved = [(span, by) for span, by in self._reserved if by is not owner]

    # ---- the map ---------------------------------------------------------------------------

    def map(self, gpa: int, size: int, access: Access = _RW, iova: int | None = None) -> int:
        """IOMMU_IOAS_MAP, at `iova` or where there is room; the IOVA.

        IommuError: EINVAL not aligned, no access, or reserved; EEXIST overlaps; EOVERFLOW wraps; ENOSPC no room.
        """
        if not access:
            raise IommuError(errno.EINVAL, f"{self}: a mapping without read or write access")
        align = self.alignment
        if size <= 0 or (size | gpa) & (align - 1):
            raise IommuError(errno.EINVAL, f"{self}: gpa {gpa:#x}, {size:#x} bytes: not aligned to {align:#x}")
        if gpa + size - 1 > _LAST:
            raise IommuError(errno.EOVERFLOW, f"{self}: gpa {gpa:#x}, {size:#x} bytes: past 2**64")
        at = self._choose(gpa, size) if iova is None else self._fixed(iova, size)
        area = Mapping(at, gpa, access)
        map_in_all((hwpt.paging for hwpt in self.hwpts), area)
        self._areas.add(area)
        return at.start

    def _fixed(self, iova: int, size: int) -> Span:
        if iova & (self.alignment - 1):
            raise IommuError(errno.EINVAL, f"{self}: iova {iova:#x} is not aligned to {self.alignment:#x}")
        if iova < 0 or iova + size - 1 > _LAST:
            raise IommuError(errno.EOVERFLOW, f"{self}: iova {iova:#x}, {size:#x} bytes: past 2**64")
        span = Span.sized(iova, size)
        if not any(valid.covers(span) for valid in self.iova_ranges()):
            raise IommuError(errno.EINVAL, f"{self}: {span} is reserved, or beyond the aperture")
        if self._areas.overlaps(span):
            raise IommuError(errno.EEXIST, f"{self}: {span} overlaps a mapping")
        return span

    def _choose(self, gpa: int, size: int) -> Span:
        """The first room, as aligned as the GPA is, so that big pages stay possible; never 0."""
        wanted = 1 << (size - 1).bit_length()
        align = max(min(wanted, gpa & -gpa) if gpa else wanted, self.alignment)
        room = common(self.iova_ranges(), self._allowed or [Span(0, _LAST)])
        for hole in holes(room, [Span(0, PAGE - 1), *(area.span for area in self._areas)]):
            start = (hole.start + align - 1) & -align
            if start + size - 1 <= hole.last:
                return Span.sized(start, size)
        raise IommuError(errno.ENOSPC, f"{self}: no room for {size:#x} bytes")

    def unmap(self, iova: int, size: int) -> int:
        """IOMMU_IOAS_UNMAP; bytes removed.

        IommuError: EINVAL no size; EOVERFLOW wraps; ENOENT nothing is mapped there, or a mapping reaches out of the
        range: those before it are gone then.
        """
        if size <= 0:
            raise IommuError(errno.EINVAL, f"{self}: unmap of {size} bytes")
        if iova < 0 or iova + size - 1 > _LAST:
            raise IommuError(errno.EOVERFLOW, f"{self}: iova {iova:#x}, {size:#x} bytes: past 2**64")
        span = Span.sized(iova, size)
        found: list[Mapping] = []
        cut = None
        for area in self._areas.over(span):
            if not span.covers(area.span):
                cut = area
                break
            found.append(area)
        removed = self._remove(found)
        if cut is not None:
            raise IommuError(errno.ENOENT, f"{self}: unmap of {span} would cut the mapping {cut.span}")
        if not found:
            raise IommuError(errno.ENOENT, f"{self}: nothing is mapped in {span}")
        return removed

    def unmap_all(self) -> int:
        """IOMMU_IOAS_UNMAP of everything; bytes removed, 0 when there was nothing."""
        return self._remove(list(self._areas))

    def _remove(self, areas: list[Mapping]) -> int:
        for hwpt in self.hwpts:
            with hwpt.paging.gather() as gather:
                for area in areas:
                    gather.unmap(area.span.start, area.span.size)
        for area in areas:
            self._areas.remove(area)
        return sum(area.span.size for area in areas)

    def copy(self, source: Ioas, source_iova: int, size: int, access: Access = _RW, iova: int | None = None) -> int:
        """IOMMU_IOAS_COPY: maps here what `source` maps there; the IOVA.

        IommuError: ENOENT the range is not wholly mapped in `source`; EINVAL no size, not aligned, or in several
        pieces; EOVERFLOW wraps; EPERM write access that the source has not; and as `map`.
        """
        if size <= 0:
            raise IommuError(errno.EINVAL, f"{self}: copy of {size} bytes")
        if source_iova < 0 or source_iova + size - 1 > _LAST:
            raise IommuError(errno.EOVERFLOW, f"{self}: iova {source_iova:#x}, {size:#x} bytes: past 2**64")
        span, at = Span.sized(source_iova, size), source_iova
        pieces = list(source._areas.over(span))
        for area in pieces:
            if area.span.start > at:
                break
            at = area.span.last + 1
        if at <= span.last:
            raise IommuError(errno.ENOENT, f"{source} has no mapping at iova {at:#x}")
        first = pieces[0]
        gpa = first.gpa + (source_iova - first.span.start)
        if any(area.gpa - area.span.start != gpa - source_iova for area in pieces):
            raise IommuError(errno.EINVAL, f"{source}: {span} is not contiguous in guest memory")
        if Access.WRITE in access and any(Access.WRITE not in area.access for area in pieces):
            raise IommuError(errno.EPERM, f"{source}: {span} is read-only")
        return self.map(gpa, size, access, iova)

    def mappings(self) -> list[Mapping]:
        """Ascending, as they were made."""
        return list(self._areas)

    # ---- HWPTs -----------------------------------------------------------------------------

    def show_in(self, hwpt: Hwpt) -> None:
        """A new paging HWPT gets all mappings.  IommuError: they do not fit it."""
        if any(not hwpt.paging.aperture.covers(area.span) for area in self._areas):
            raise IommuError(errno.EADDRINUSE, f"{self}: a mapping is beyond the aperture {hwpt.paging.aperture}")
        fill(hwpt.paging, self._areas)
        self.hwpts.append(hwpt)
        self.users += 1

    def hide_from(self, hwpt: Hwpt) -> None:
        """A paging HWPT goes."""
        self.hwpts.remove(hwpt)
        self.users -= 1


class FaultObject(_Object):
    """Page requests that wait for a reply (IOMMU_FAULT_QUEUE_ALLOC); without one for `timeout` seconds they fail."""

    def __init__(self, context: Context, timeout: float = 5.0) -> None:
        super().__init__(context)
        self.timeout = timeout
        self._ready = threading.Condition()
        self._unread: list[PageRequest] = []
        self._waiting: dict[tuple[str, int], PageResponse | None] = {}

    def handle(self, request: PageRequest) -> PageResponse:
        """The domain's page handler: waits for `respond`, on the thread of the access."""
        key = request.requester, request.group_index
        with self._ready:
            self._unread.append(request)
            self._waiting[key] = None
            self._ready.notify_all()
            self._ready.wait_for(lambda: self._waiting[key] is not None, self.timeout)
            if request in self._unread:
                self._unread.remove(request)
            response = self._waiting.pop(key)
            return PageResponse.INVALID if response is None else response

    def read(self, timeout: float = 0.0) -> list[PageRequest]:
        """Requests that nobody has read yet, after up to `timeout` seconds."""
        with self._ready:
            self._ready.wait_for(lambda: bool(self._unread), timeout)
            found, self._unread = self._unread, []
            return found

    def respond(self, request: PageRequest, response: PageResponse) -> None:
        """Answers a request.  IommuError(EINVAL): it does not wait, or no more."""
        key = request.requester, request.group_index
        with self._ready:
            if key not in self._waiting or self._waiting[key] is not None:
                raise IommuError(errno.EINVAL, f"{self}: no such request waits: {request}")
            self._waiting[key] = response
            self._ready.notify_all()


class Hwpt(_Object):
    """A hardware page table: a domain of an IOAS (paging), or nested in such a one.

    Made by `Device.hwpt_alloc`, or by `Device.attach` for an IOAS (`auto`: then it goes with its last device).
    """

    def __init__(
        self,
        context: Context,
        domain: Domain,
        parent: Ioas | Hwpt,
        fault: FaultObject | None = None,
        *,
        auto: bool = False,
    ) -> None:
        super().__init__(context)
        self.domain = domain
        self.parent = parent
        self.fault = fault
        self.auto = auto
        try:
            if isinstance(parent, Ioas):
                parent.show_in(self)
            else:
                parent.users += 1
        except IommuError:
            context.forget(self)
            raise
        if fault is not None:
            fault.users += 1
            domain.page_handler = fault.handle

    @property
    def paging(self) -> PagingDomain:
        """The domain with the mappings: its own, or its parent's."""
        if isinstance(self.domain, PagingDomain):
            return self.domain
        assert isinstance(self.parent, Hwpt)
        return self.parent.paging

    @property
    def ioas(self) -> Ioas:
        """Whose mappings it shows."""
        return self.parent if isinstance(self.parent, Ioas) else self.parent.ioas

    def _release(self) -> None:
        if isinstance(self.parent, Ioas):
            self.parent.hide_from(self)
        else:
            self.parent.users -= 1
        if self.fault is not None:
            self.fault.users -= 1

    def set_dirty_tracking(self, on: bool) -> None:
        """IOMMU_HWPT_SET_DIRTY_TRACKING.  IommuError: EINVAL nested; EOPNOTSUPP not allocated for it."""
        self._own("dirty tracking").set_dirty_tracking(on)

    def get_dirty_bitmap(self, span: Span, page_size: int = PAGE, *, clear: bool = True) -> bytes:
        """IOMMU_HWPT_GET_DIRTY_BITMAP, as PagingDomain.read_dirty.  IommuError(EINVAL)."""
        return self._own("dirty bitmap").read_dirty(span, page_size, clear=clear)

    def _own(self, what: str) -> PagingDomain:
        if not isinstance(self.domain, PagingDomain):
            raise IommuError(errno.EINVAL, f"{self}: {what} of a nested HWPT: its parent has it")
        return self.domain

    def invalidate(self, span: Span | None = None) -> None:
        """IOMMU_HWPT_INVALIDATE: the guest has changed stage 1.  IommuError(EINVAL): it is not nested."""
        if not isinstance(self.domain, TableDomain):
            raise IommuError(errno.EINVAL, f"{self} is not nested")
        self.domain.flush(span)


class Device(_Object):
    """An endpoint bound to a context (VFIO_DEVICE_BIND_IOMMUFD)."""

    def __init__(self, context: Context, endpoint: Endpoint) -> None:
        """IommuError: ENODEV it has no group; EPERM, EBUSY, EINVAL as Group.claim_dma_owner."""
        if endpoint.group is None:
            raise IommuError(errno.ENODEV, f"{endpoint.name} has no group: {endpoint.why}")
        self.endpoint = endpoint
        self.group = endpoint.group
        self.group.claim_dma_owner(context)
        super().__init__(context)
        self._attached: dict[int | None, Hwpt] = {}

    def _release(self) -> None:
        self.group.release_dma_owner(self.context)

    def get_info(self) -> HwInfo:
        """IOMMU_GET_HW_INFO."""
        can = self.group.iommu.capabilities
        return HwInfo(
            self.group.iommu.driver.kind,
            can.coherent,
            can.enforce_snoop,
            can.dirty_tracking,
            can.pasid_bits,
            can.page_sizes,
        )

    def hwpt_alloc(
        self,
        parent: Ioas | Hwpt,
        flags: AllocFlags = AllocFlags.NONE,
        *,
        table: Table | None = None,
        memory: GuestMemory | None = None,
        fault: FaultObject | None = None,
    ) -> Hwpt:
        """IOMMU_HWPT_ALLOC: paging with an IOAS; nested with a HWPT, the guest's `table` and the `memory` it is in.

        IommuError: EINVAL what does not go together, or a parent that is none; EOPNOTSUPP the IOMMU cannot; EADDRINUSE
        the IOAS has mappings beyond its aperture.
        """
        if fault is not None and not self.group.iommu.capabilities.can_wait:
            raise IommuError(errno.EOPNOTSUPP, f"{self.group.iommu.name} has no page requests")
        domain: Domain
        if isinstance(parent, Ioas):
            if table is not None or memory is not None:
                raise IommuError(errno.EINVAL, f"{self}: a table over an IOAS: allocate a parent HWPT first")
            domain = paging_domain_alloc(self.endpoint, flags)
        else:
            if table is None or memory is None:
                raise IommuError(errno.EINVAL, f"{self}: a nested HWPT needs a table and the memory that it is in")
            if flags & ~AllocFlags.PASID:
                raise IommuError(errno.EOPNOTSUPP, f"{self}: {flags!r} of a nested HWPT")
            if not isinstance(parent.domain, PagingDomain):
                raise IommuError(errno.EINVAL, f"{parent} is nested itself")
            domain = nested_domain_alloc(self.endpoint, parent.domain, memory, table)
        return Hwpt(self.context, domain, parent, fault)

    # ---- attach ----------------------------------------------------------------------------

    def attach(self, target: Ioas | Hwpt, pasid: int | None = None) -> Hwpt:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT: to a HWPT, or to one that fits of an IOAS; which it is.

        Devices of one group go together.  IommuError: EBUSY it is attached; EINVAL the domain does not fit, or its
        group is attached to another; EADDRINUSE a mapping is where the device has a reserved region.
        """
        if pasid in self._attached:
            raise IommuError(errno.EBUSY, f"{self} is attached to {self._attached[pasid]}")
        shared = self.context.attached.get((self.group, pasid))
        hwpt = self._resolve(target, shared)
        try:
            if shared is not None and shared is not hwpt:
                raise IommuError(errno.EINVAL, f"{self}: its group is attached to {shared}")
            self._reserve(hwpt.ioas)
            if shared is None:
                self._show(hwpt, pasid)
        except IommuError:
            hwpt.ioas.unreserve(self)
            self._drop_auto(hwpt)
            raise
        self._note(hwpt, pasid)
        return hwpt

    def replace(self, target: Ioas | Hwpt, pasid: int | None = None) -> Hwpt:
        """Another HWPT in place of the one there is, at once, for all devices of the group; which it is.

        IommuError as `attach`; EINVAL it is not attached.  Then the old one stays.
        """
        old = self._attached.get(pasid)
        if old is None:
            raise IommuError(errno.EINVAL, f"{self} is not attached")
        hwpt = self._resolve(target, None)
        if hwpt is old:
            return old
        members = [d for d in self.context.devices() if d.group is self.group and d._attached.get(pasid) is old]
        try:
            if hwpt.ioas is not old.ioas:
                for device in members:
                    device._reserve(hwpt.ioas)
            if pasid is None:
                self.group.attach(hwpt.domain)
            else:
                self.group.replace_pasid(hwpt.domain, pasid)
        except IommuError:
            if hwpt.ioas is not old.ioas:
                for device in members:
                    hwpt.ioas.unreserve(device)
            self._drop_auto(hwpt)
            raise
        for device in members:
            device._forget(pasid)
            device._note(hwpt, pasid)
            if hwpt.ioas is not old.ioas and all(h.ioas is not old.ioas for h in device._attached.values()):
                old.ioas.unreserve(device)
        self._drop_auto(old)
        return hwpt

    def detach(self, pasid: int | None = None) -> None:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT.  IommuError(EINVAL): it is not attached."""
        hwpt = self._attached.get(pasid)
        if hwpt is None:
            raise IommuError(errno.EINVAL, f"{self} is not attached")
        self._forget(pasid)
        if all(other.ioas is not hwpt.ioas for other in self._attached.values()):
            hwpt.ioas.unreserve(self)
        if not any(d.group is self.group and pasid in d._attached for d in self.context.devices()):
            del self.context.attached[self.group, pasid]
            if pasid is None:
                self.group.detach()
            else:
                self.group.detach_pasid(pasid)
        self._drop_auto(hwpt)

    def _resolve(self, target: Ioas | Hwpt, shared: Hwpt | None) -> Hwpt:
        if isinstance(target, Hwpt):
            return target
        if shared is not None and shared.ioas is target:
            return shared
        for hwpt in target.hwpts:
            if hwpt.auto and all(can_attach(hwpt.domain, endpoint) is None for endpoint in self.group.endpoints):
                return hwpt
        flags = AllocFlags.NONE
        if self.group.iommu.capabilities.enforce_snoop:
            flags |= AllocFlags.ENFORCE_SNOOP
        return Hwpt(self.context, paging_domain_alloc(self.endpoint, flags), target, auto=True)

    def _reserve(self, ioas: Ioas) -> None:
        for region in self.endpoint.reserved:
            if region.type not in (RegionType.DIRECT_RELAXABLE, RegionType.SW_MSI):
                ioas.reserve(region.span, self)

    def _show(self, hwpt: Hwpt, pasid: int | None) -> None:
        if pasid is None:
            self.group.attach(hwpt.domain)
        else:
            self.group.attach_pasid(hwpt.domain, pasid)

    def _note(self, hwpt: Hwpt, pasid: int | None) -> None:
        self._attached[pasid] = self.context.attached[self.group, pasid] = hwpt
        hwpt.users += 1
        self.users += 1

    def _forget(self, pasid: int | None) -> None:
        self._attached.pop(pasid).users -= 1
        self.users -= 1

    def _drop_auto(self, hwpt: Hwpt) -> None:
        if hwpt.auto and not hwpt.users:
            hwpt.destroy()

    def __str__(self) -> str:
        return f"device {self.id} ({self.endpoint.name})"
