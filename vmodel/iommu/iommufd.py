"""The objects of iommufd: `Ioas`, `Hwpt`, `Device`, `FaultObject`.

errno values are those of Linux (include/uapi/linux/iommufd.h, drivers/iommu/iommufd).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from vmodel.errors import IommuError
from vmodel.iommu.allocate import nested_domain_alloc, paging_domain_alloc
from vmodel.iommu.areas import off_limits
from vmodel.iommu.context import Context, Object, locked
from vmodel.iommu.domain import AllocFlags, Domain, PagingDomain, TableDomain
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.group import can_attach, shares_tables
from vmodel.iommu.ioas import Ioas
from vmodel.iommu.pgtable import Table
from vmodel.memory import GuestMemory
from vmodel.span import PAGE, Span

__all__ = ["Context", "Device", "FaultObject", "HwInfo", "Hwpt", "Ioas"]

_PAGING_FLAGS = AllocFlags.NEST_PARENT | AllocFlags.DIRTY_TRACKING | AllocFlags.PASID | AllocFlags.ENFORCE_SNOOP


@dataclass(frozen=True)
class HwInfo:
    """A device and its IOMMU, as IOMMU_GET_HW_INFO describes them.

    `page_sizes` in bytes; `pasid_bits`: 0 if the device, or the IOMMU, has no PASIDs.
    """

    kind: str
    coherent: bool
    enforce_snoop: bool
    dirty_tracking: bool
    pasid_bits: int
    page_sizes: frozenset[int]


class FaultObject(Object):
    """Page requests that wait for a response (IOMMU_FAULT_QUEUE_ALLOC); they fail after `timeout` seconds."""

    def __init__(self, context: Context, timeout: float = 5.0) -> None:
        super().__init__(context)
        self.timeout = timeout
        self._ready = threading.Condition()
        #: Keyed by id(): requests of different devices may be equal.
        self._unread: dict[int, PageRequest] = {}
        self._waiting: dict[int, tuple[PageRequest, PageResponse | None]] = {}

    def handle(self, request: PageRequest) -> PageResponse:
        """The domain's page handler: waits for `respond`, on the thread of the access.  INVALID after `timeout`."""
        key = id(request)
        with self._ready:
            self._unread[key] = request
            self._waiting[key] = request, None
            self._ready.notify_all()
            self._ready.wait_for(lambda: self._waiting[key][1] is not None, self.timeout)
            self._unread.pop(key, None)
            _, response = self._waiting.pop(key)
            return PageResponse.INVALID if response is None else response

    def read(self, timeout: float = 0.0) -> list[PageRequest]:
        """The requests that have not been read yet; waits up to `timeout` seconds for one."""
        with self._ready:
            self._ready.wait_for(lambda: bool(self._unread), timeout)
            found = list(self._unread.values())
            self._unread.clear()
            return found

    def respond(self, request: PageRequest, response: PageResponse) -> None:
        """Answers a request that was read, with SUCCESS or INVALID.

        IommuError(EINVAL): the request is not waiting, or was not read; or another response.
        """
        if response not in (PageResponse.SUCCESS, PageResponse.INVALID):
            raise IommuError(errno.EINVAL, f"{self}: a response must be SUCCESS or INVALID, not {response!r}")
        key = id(request)
        with self._ready:
            if key in self._unread or key not in self._waiting or self._waiting[key][1] is not None:
                raise IommuError(errno.EINVAL, f"{self}: no such request is waiting: {request}")
            self._waiting[key] = request, response
            self._ready.notify_all()

    def cancel(self, requesters: Iterable[str], pasid: int | None) -> None:
        """Answers INVALID to the waiting requests of devices that are being detached."""
        names = set(requesters)
        with self._ready:
            for key, (request, response) in self._waiting.items():
                if response is None and request.requester in names and request.pasid == pasid:
                    self._waiting[key] = request, PageResponse.INVALID
            self._ready.notify_all()


class Hwpt(Object):
    """A hardware page table: a paging domain with the mappings of an IOAS, or a domain nested in such a one.

    `Device.hwpt_alloc` makes it, or `Device.attach` for an IOAS (`auto`: its last device destroys it).
    """

    def __init__(
        self,
        context: Context,
        domain: Domain,
        parent: Ioas | Hwpt,
        fault: FaultObject | None = None,
        *,
        auto: bool = False,
        for_pasids: bool = False,
    ) -> None:
        super().__init__(context)
        self.domain = domain
        self.parent = parent
        self.fault = fault
        self.auto = auto
        #: Whether it may be attached to PASIDs, and to a group that has HWPTs for PASIDs.
        self.for_pasids = for_pasids
        try:
            if isinstance(parent, Ioas):
                parent.add_hwpt(self)
            else:
                parent.users += 1
        except IommuError:
            context.unregister(self)
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
        """The IOAS whose mappings it has."""
        return self.parent if isinstance(self.parent, Ioas) else self.parent.ioas

    def release(self) -> None:
        if isinstance(self.parent, Ioas):
            self.parent.remove_hwpt(self)
        else:
            self.parent.users -= 1
        if self.fault is not None:
            self.fault.users -= 1

    @locked
    def set_dirty_tracking(self, on: bool) -> None:
        """IOMMU_HWPT_SET_DIRTY_TRACKING: on, with an empty log, also if it was on already; or off.

        IommuError: ENOENT nested; EOPNOTSUPP allocated without DIRTY_TRACKING.  (Linux iopt_set_dirty_tracking)
        """
        domain = self._own()
        if on and domain.tracking:
            domain.set_dirty_tracking(False)
        domain.set_dirty_tracking(on)

    @locked
    def get_dirty_bitmap(self, span: Span, page_size: int = PAGE, *, clear: bool = True) -> bytes:
        """IOMMU_HWPT_GET_DIRTY_BITMAP, as PagingDomain.read_dirty.

        IommuError: ENOENT nested; EINVAL not whole pages, a part of `span` is not mapped, or tracking is off;
        EOPNOTSUPP allocated without DIRTY_TRACKING.
        """
        domain = self._own()
        if not domain.tracks:
            raise IommuError(errno.EOPNOTSUPP, f"{self} was allocated without dirty tracking")
        self.ioas.check_mapped(span)
        return domain.read_dirty(span, page_size, clear=clear)

    def _own(self) -> PagingDomain:
        self.check()
        if not isinstance(self.domain, PagingDomain):
            raise IommuError(errno.ENOENT, f"{self} is nested: its parent tracks writes")
        return self.domain

    @locked
    def invalidate(self, span: Span | None = None) -> None:
        """IOMMU_HWPT_INVALIDATE: flushes stage 1, all or `span` (IOVA).  IommuError(EINVAL): it is not nested."""
        if not isinstance(self.domain, TableDomain):
            raise IommuError(errno.EINVAL, f"{self} is not nested")
        self.domain.flush(span)


class Device(Object):
    """An endpoint bound to a context (VFIO_DEVICE_BIND_IOMMUFD)."""

    def __init__(self, context: Context, endpoint: Endpoint) -> None:
        """IommuError: EINVAL already bound, or DMA is not coherent with caches (IOMMU_CAP_CACHE_COHERENCY); ENODEV the
        endpoint has no group; EPERM its MSIs are not isolated; EBUSY, EPERM as Group.claim_dma_owner.
        """
        self.endpoint = endpoint
        self._attached: dict[int | None, Hwpt] = {}
        with context.lock:
            if any(device.endpoint is endpoint for device in context.devices):
                raise IommuError(errno.EINVAL, f"{endpoint.name} is already bound to {context}")
            if endpoint.group is None:
                raise IommuError(errno.ENODEV, f"{endpoint.name} has no group: {endpoint.why}")
            self.group = endpoint.group
            if not self.group.iommu.cache_coherency:
                raise IommuError(errno.EINVAL, f"{endpoint.name}: {self.group.iommu.name} cannot make DMA coherent")
            if not self.group.iommu.capabilities.isolated_msi and not context.allow_unsafe_interrupts:
                text = f"{endpoint.name}: {self.group.iommu.name} does not isolate MSIs: allow_unsafe_interrupts"
                raise IommuError(errno.EPERM, text)
            super().__init__(context)
            try:
                self.group.claim_dma_owner(context)
            except OSError:
                context.unregister(self)
                raise
            context.devices.append(self)

    def release(self) -> None:
        self.context.devices.remove(self)
        self.group.release_dma_owner(self.context)

    def get_info(self) -> HwInfo:
        """IOMMU_GET_HW_INFO."""
        can = self.group.iommu.capabilities
        pasids = 1 << can.pasid_bits
        if self.endpoint.max_pasids is not None:
            pasids = min(pasids, self.endpoint.max_pasids)
        return HwInfo(
            self.group.iommu.driver.kind,
            can.coherent,
            can.enforce_snoop,
            can.dirty_tracking,
            max(pasids.bit_length() - 1, 0),
            can.page_sizes,
        )

    @locked
    def hwpt_alloc(
        self,
        parent: Ioas | Hwpt,
        flags: AllocFlags = AllocFlags.NONE,
        *,
        table: Table | None = None,
        memory: GuestMemory | None = None,
        fault: FaultObject | None = None,
    ) -> Hwpt:
        """IOMMU_HWPT_ALLOC: a paging HWPT over an IOAS, or over a HWPT a nested one with a guest's `table` in `memory`.

        IommuError: EINVAL a table without memory, or a parent that was destroyed, cannot be a parent, or is for another
        kind of IOMMU; EOPNOTSUPP not supported by the IOMMU, a table over an IOAS, no table over a HWPT, or flags that
        exclude each other; EADDRINUSE as Ioas.add_hwpt; ENOENT the device or the fault object was destroyed.
        """
        self.check()
        if self.context.find(parent.id) is not parent:
            raise IommuError(errno.EINVAL, f"{self.context} has no {parent}")
        if (table is None) != (memory is None):
            raise IommuError(errno.EINVAL, f"{self}: `table` and `memory` need each other")
        if fault is not None:
            fault.check(self.context)
            if not self.group.iommu.capabilities.can_wait:
                raise IommuError(errno.EOPNOTSUPP, f"{self.group.iommu.name} has no page requests")
        domain = (
            self._paging(flags, table, fault)
            if isinstance(parent, Ioas)
            else self._nested(parent, flags, table, memory)
        )
        return Hwpt(self.context, domain, parent, fault, for_pasids=bool(flags & AllocFlags.PASID))

    def _paging(self, flags: AllocFlags, table: Table | None = None, fault: FaultObject | None = None) -> PagingDomain:
        if table is not None or flags & ~_PAGING_FLAGS or (fault is not None and AllocFlags.NEST_PARENT in flags):
            raise IommuError(errno.EOPNOTSUPP, f"{self}: a paging HWPT with {flags!r}, or with table or page requests")
        # DMA snoops whenever the IOMMU can enforce it: users have no means to make caches coherent.
        if self.group.iommu.capabilities.enforce_snoop:
            flags |= AllocFlags.ENFORCE_SNOOP
        return paging_domain_alloc(self.endpoint, flags)

    def _nested(self, parent: Hwpt, flags: AllocFlags, table: Table | None, memory: GuestMemory | None) -> TableDomain:
        if not isinstance(parent.domain, PagingDomain):
            raise IommuError(errno.EINVAL, f"{parent} is nested itself")
        if table is None or memory is None or flags & ~AllocFlags.PASID:
            raise IommuError(errno.EOPNOTSUPP, f"{self}: a nested HWPT without a table, or with {flags!r}")
        domain = nested_domain_alloc(self.endpoint, parent.domain, memory, table)
        if (why := can_attach(parent.domain, self.endpoint)) is not None:
            raise IommuError(errno.EINVAL, f"{self}: {parent}: {why}")
        return domain

    # ---- attach ----------------------------------------------------------------------------

    @locked
    def attach(self, target: Ioas | Hwpt, pasid: int | None = None) -> Hwpt:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT: attaches a HWPT, or for an IOAS one that fits; returns the HWPT.

        All devices of a group must have the same HWPT.  IommuError: EBUSY already attached; EINVAL the domain does not
        fit, the group has another HWPT, or a HWPT without AllocFlags.PASID (as those for an IOAS) would be used
        together with PASIDs; EADDRINUSE a mapping overlaps a reserved region of the device; EOPNOTSUPP no PASIDs or
        page requests; ENOENT the device or the target was destroyed, or is of another context.  On an error nothing
        changes.
        """
        self.check()
        if pasid in self._attached:
            raise IommuError(errno.EBUSY, f"{self} is attached to {self._attached[pasid]}")
        shared = self.context.attached.get((self.group, pasid))
        hwpt = self._resolve(target, shared)
        try:
            if shared is not None and shared is not hwpt:
                raise IommuError(errno.EINVAL, f"{self}: its group is attached to {shared}")
            self._check_fits(hwpt, pasid)
            if pasid is None:
                self._reserve(hwpt.ioas)
            if shared is None:
                self._attach_group(hwpt, pasid)
        except IommuError:
            if pasid is None:
                hwpt.ioas.unreserve(self)
            self._drop_auto(hwpt)
            raise
        self._record(hwpt, pasid)
        return hwpt

    @locked
    def replace(self, target: Ioas | Hwpt, pasid: int | None = None) -> Hwpt:
        """Replaces the HWPT of all devices of the group, atomically; returns the new HWPT.

        IommuError as `attach`; EINVAL not attached.  On an error the old HWPT stays.
        """
        self.check()
        old = self._attached.get(pasid)
        if old is None:
            raise IommuError(errno.EINVAL, f"{self} is not attached")
        hwpt = self._resolve(target, None)
        if hwpt is old:
            return old
        members = [d for d in self.context.devices if d.group is self.group and d._attached.get(pasid) is old]
        moving = members if pasid is None and hwpt.ioas is not old.ioas else []
        try:
            self._check_fits(hwpt, pasid)
            for device in moving:
                device._reserve(hwpt.ioas)
            if pasid is None:
                self.group.replace(hwpt.domain)
            else:
                self.group.replace_pasid(hwpt.domain, pasid)
        except IommuError:
            for device in moving:
                hwpt.ioas.unreserve(device)
            self._drop_auto(hwpt)
            raise
        self._cancel_requests(old, pasid)
        for device in members:
            device._remove(pasid)
            device._record(hwpt, pasid)
        for device in moving:
            old.ioas.unreserve(device)
        self._drop_auto(old)
        return hwpt

    @locked
    def detach(self, pasid: int | None = None) -> None:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT; as in Linux nothing happens if the device, or the PASID, is not attached.

        IommuError(ENOENT): the device was destroyed.
        """
        self.check()
        hwpt = self._attached.get(pasid)
        if hwpt is None:
            return
        self._remove(pasid)
        if pasid is None:
            hwpt.ioas.unreserve(self)
        if not any(d.group is self.group and pasid in d._attached for d in self.context.devices):
            del self.context.attached[self.group, pasid]
            if pasid is None:
                self.group.detach()
            else:
                self.group.detach_pasid(pasid)
            self._cancel_requests(hwpt, pasid)
        self._drop_auto(hwpt)

    @locked
    def detach_all(self) -> None:
        """Detaches the device, and each of its PASIDs."""
        for pasid in [pasid for pasid in self._attached if pasid is not None]:
            self.detach(pasid)
        if None in self._attached:
            self.detach()

    def _resolve(self, target: Ioas | Hwpt, shared: Hwpt | None) -> Hwpt:
        target.check(self.context)
        if isinstance(target, Hwpt):
            return target
        if shared is not None and shared.auto and shared.ioas is target:
            return shared
        for hwpt in target.hwpts:
            if hwpt.auto and shares_tables(hwpt.paging, self.group):
                return hwpt
        return Hwpt(self.context, self._paging(AllocFlags.NONE), target, auto=True)

    def _check_fits(self, hwpt: Hwpt, pasid: int | None) -> None:
        """Checks that need more than the domain: page requests, and the rule of IOMMU_HWPT_ALLOC_PASID."""
        if hwpt.fault is not None and not self.group.iommu.capabilities.can_wait:
            raise IommuError(errno.EOPNOTSUPP, f"{self}: {self.group.iommu.name} has no page requests for {hwpt}")
        here = {other: h for (group, other), h in self.context.attached.items() if group is self.group} | {pasid: hwpt}
        if any(other is not None for other in here):
            for meets in (here.get(None), here.get(pasid)):
                if meets is not None and not meets.for_pasids:
                    raise IommuError(errno.EINVAL, f"{self}: {meets} was allocated without PASID")

    def _reserve(self, ioas: Ioas) -> None:
        for span in off_limits(self.endpoint.reserved):
            ioas.reserve(span, self)

    def _cancel_requests(self, hwpt: Hwpt, pasid: int | None) -> None:
        if hwpt.fault is not None:
            hwpt.fault.cancel((endpoint.name for endpoint in self.group.endpoints), pasid)

    def _attach_group(self, hwpt: Hwpt, pasid: int | None) -> None:
        if pasid is None:
            self.group.attach(hwpt.domain)
        else:
            self.group.attach_pasid(hwpt.domain, pasid)

    def _record(self, hwpt: Hwpt, pasid: int | None) -> None:
        self._attached[pasid] = self.context.attached[self.group, pasid] = hwpt
        hwpt.users += 1
        self.users += 1

    def _remove(self, pasid: int | None) -> None:
        self._attached.pop(pasid).users -= 1
        self.users -= 1

    def _drop_auto(self, hwpt: Hwpt) -> None:
        if hwpt.auto and not hwpt.users:
            hwpt.destroy()

    def __str__(self) -> str:
        return f"device {self.id} ({self.endpoint.name})"
