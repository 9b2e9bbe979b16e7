"""`Device`: an endpoint bound to a context (Linux drivers/iommu/iommufd/device.c)."""

from __future__ import annotations

import errno

from vmodel.errors import IommuError
from vmodel.iommu.allocate import paging_domain_alloc
from vmodel.iommu.areas import off_limits
from vmodel.iommu.domain import AllocFlags, PagingDomain
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.group import shares_tables
from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.iommufd.fault_object import FaultObject
from vmodel.iommu.iommufd.hw_info import HwInfo, hw_info
from vmodel.iommu.iommufd.hwpt import Hwpt
from vmodel.iommu.iommufd.ioas import Ioas
from vmodel.iommu.iommufd.nested import NestedData
from vmodel.iommu.iommufd.nested_hwpt import nested_hwpt
from vmodel.iommu.iommufd.registers import HwInfoType
from vmodel.iommu.iommufd.vdevice import Vdevice
from vmodel.iommu.iommufd.viommu import Viommu, viommu_alloc
from vmodel.iommu.iommufd.viommu_types import VIOMMUS
from vmodel.iommu.locking import locked
from vmodel.iommu.pgtable import Table
from vmodel.memory import GuestMemory

_PAGING_FLAGS = AllocFlags.NEST_PARENT | AllocFlags.DIRTY_TRACKING | AllocFlags.PASID | AllocFlags.ENFORCE_SNOOP


class Device(Object):
    """An endpoint bound to a context (VFIO_DEVICE_BIND_IOMMUFD)."""

    def __init__(self, context: Context, endpoint: Endpoint, *, enforce_snoop: bool = True) -> None:
        """`enforce_snoop`: its paging HWPTs make DMA snoop if it can, as in Linux; False shows what happens without.

        IommuError: EINVAL already bound, or DMA is not coherent with caches (IOMMU_CAP_CACHE_COHERENCY); ENODEV the
        endpoint has no group; EPERM its MSIs are not isolated; EBUSY, EPERM as Group.claim_for_device.
        """
        self.endpoint = endpoint
        self._attached: dict[int | None, Hwpt] = {}
        self.vdevice: Vdevice | None = None
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
            self.enforces_snoop = enforce_snoop and endpoint.can_enforce_snoop
            try:
                self.group.claim_for_device(context)
            except OSError:
                context.unregister(self)
                raise
            context.devices.append(self)

    @property
    def attached(self) -> dict[int | None, Hwpt]:
        """The HWPT of the device (None), and of each of its PASIDs."""
        return dict(self._attached)

    def release(self) -> None:
        if self.vdevice is not None:
            self.vdevice.destroy()
        self.group.release_for_device(self.context)
        self.context.devices.remove(self)

    def get_info(self, wanted: int = HwInfoType.NONE) -> HwInfo:
        """IOMMU_GET_HW_INFO; `wanted`: a HwInfoType, by default that of the device's IOMMU.

        IommuError: EOPNOTSUPP the IOMMU has no information of this type; ENOENT the device was destroyed.
        """
        self.check()
        return hw_info(self.endpoint, self.group.iommu, wanted)

    @locked
    def hwpt_alloc(
        self,
        parent: Ioas | Hwpt | Viommu,
        flags: AllocFlags = AllocFlags.NONE,
        *,
        table: Table | None = None,
        data: NestedData | None = None,
        memory: GuestMemory | None = None,
        fault: FaultObject | None = None,
    ) -> Hwpt:
        """IOMMU_HWPT_ALLOC: a paging HWPT over an IOAS, or over a HWPT or a vIOMMU a nested one with a guest's tables.

        The tables are in `memory`: for VT-d `data` is a VtdStage1, or `table` says where they are; SMMUv3 and AMD-Vi
        need a vIOMMU, and a SmmuV3Ste or an AmdGuestDte.

        IommuError: EINVAL data without memory, or a parent that was destroyed, cannot be a parent, or is for another
        kind of IOMMU; EOPNOTSUPP not supported by the IOMMU, data over an IOAS, none over a HWPT, or flags that
        exclude each other; EIO an illegal stream table entry; EADDRINUSE as Ioas.add_hwpt; ENOENT the device or the
        fault object was destroyed.
        """
        self.check()
        if self.context.find(parent.id) is not parent:
            raise IommuError(errno.EINVAL, f"{self.context} has no {parent}")
        given = [item for item in (table, data) if item is not None]
        if len(given) != (memory is not None):
            raise IommuError(errno.EINVAL, f"{self}: one of `table` and `data`, and `memory`, need each other")
        if fault is not None and not self.group.iommu.capabilities.can_wait:
            raise IommuError(errno.EOPNOTSUPP, f"{self.group.iommu.name} has no page requests")
        for_pasids = bool(flags & AllocFlags.PASID)
        if isinstance(parent, Ioas):
            domain = self._paging(flags, table or data, fault)
            return Hwpt(self.context, domain, parent, fault, for_pasids=for_pasids)
        return nested_hwpt(self, parent, flags, given[0] if given else None, memory, fault)

    def _paging(self, flags: AllocFlags, table: object = None, fault: FaultObject | None = None) -> PagingDomain:
        if table is not None or flags & ~_PAGING_FLAGS or (fault is not None and AllocFlags.NEST_PARENT in flags):
            raise IommuError(errno.EOPNOTSUPP, f"{self}: a paging HWPT with {flags!r}, or with table or page requests")
        # Wherever that is possible: users have no means to make caches coherent (iommufd_hwpt_paging_alloc).
        if self.enforces_snoop:
            flags |= AllocFlags.ENFORCE_SNOOP
        return paging_domain_alloc(self.endpoint, flags)

    @locked
    def viommu_alloc(self, parent: Hwpt, kind: int) -> Viommu:
        """IOMMU_VIOMMU_ALLOC: a vIOMMU of type `kind` (ViommuType) of the device's IOMMU, over a nesting parent.

        IommuError: EOPNOTSUPP the IOMMU has no such type; ENOENT the device or the parent was destroyed, or the parent
        is nested; EINVAL it was not allocated with NEST_PARENT, or is another IOMMU's.
        """
        return viommu_alloc(self, parent, kind, VIOMMUS.get(self.group.iommu.driver.kind))

    # ---- attach ----------------------------------------------------------------------------

    @locked
    def attach(self, target: Ioas | Hwpt, pasid: int | None = None) -> Hwpt:
        """Attaches a HWPT, or for an IOAS one that fits; returns the HWPT (iommufd_device_attach).

        VFIO_DEVICE_ATTACH_IOMMUFD_PT is this, or `replace` if the device, or the PASID, is attached already.  All
        devices of a group must have the same HWPT.  IommuError: EBUSY already attached; EINVAL the domain does not fit,
        the group has another HWPT, or a HWPT without AllocFlags.PASID (as those for an IOAS) would be used together
        with PASIDs; EADDRINUSE a mapping overlaps a reserved region of the device; EOPNOTSUPP no PASIDs or page
        requests; ENOENT the device or the target was destroyed, or is of another context.  On an error nothing changes.
        """
        self.check()
        target.check(self.context)
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
                hwpt.prepare(self.group, pasid)
                self._attach_group(hwpt, pasid)
        except OSError:  # IommuError is one
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
        target.check(self.context)
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
            hwpt.prepare(self.group, pasid)
            if pasid is None:
                self.group.replace(hwpt.domain)
                old.detached(self.group)
                hwpt.attached(self.group)
            else:
                self.group.replace_pasid(hwpt.domain, pasid)
        except OSError:  # IommuError is one
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
                hwpt.detached(self.group)
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
        if isinstance(target, Hwpt):
            return target
        if shared is not None and shared.auto and shared.ioas is target:
            return shared
        for hwpt in target.hwpts:
            # A device that could be made to snoop gets one that does not enforce it, too, as in Linux.
            wanted = self.enforces_snoop or not hwpt.paging.enforces_snoop
            if hwpt.auto and wanted and shares_tables(hwpt.paging, self.group):
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
            hwpt.attached(self.group)
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
