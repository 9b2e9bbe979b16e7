"""`Viommu`: a VM's share of an IOMMU (Linux drivers/iommu/iommufd/viommu.c)."""

from __future__ import annotations

import enum
import errno
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vmodel.errors import DmaFault, IommuError, Reason
from vmodel.iommu.domain import AllocFlags
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.fault import FaultRecord
from vmodel.iommu.group import Group
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.iommufd.context import Object
from vmodel.iommu.iommufd.hw_queue import HwQueue, HwQueueType
from vmodel.iommu.iommufd.hwpt import Hwpt
from vmodel.iommu.iommufd.invalidate import run
from vmodel.iommu.iommufd.nested import NestedData, Stage1
from vmodel.iommu.iommufd.resolvers import resolvers_of
from vmodel.iommu.iommufd.vdevice import Vdevice
from vmodel.iommu.iommufd.veventq import MOST_EVENTS, Veventq, VeventqType
from vmodel.iommu.locking import locked
from vmodel.iommu.pgtable import Table
from vmodel.memory import GuestMemory

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.device import Device

log = logging.getLogger(__name__)
#: The most PASIDs that are attached by the data of users.
_MOST_PASIDS = 4096


class ViommuType(enum.IntEnum):
    """Linux enum iommu_viommu_type."""

    DEFAULT = 0
    ARM_SMMUV3 = 1
    TEGRA241_CMDQV = 2


class Viommu(Object):
    """A VM's share of an IOMMU, over a nesting parent (IOMMU_VIOMMU_ALLOC); `Device.viommu_alloc` makes it.

    The base has what all types have.  A type is a subclass with the functions of Linux's struct iommufd_viommu_ops:
    those that it does not have are EOPNOTSUPP.
    """

    #: Entries of an invalidation: the Python type of one, and whether there may be none.
    entry: ClassVar[type | None] = None
    may_be_empty: ClassVar[bool] = True

    def __init__(self, device: Device, hwpt: Hwpt, kind: int) -> None:
        super().__init__(device.context)
        self.type = kind
        self.iommu: Iommu = device.group.iommu
        self.hwpt = hwpt
        #: By virt_id.
        self.vdevices: dict[int, Vdevice] = {}
        #: By index.
        self.hw_queues: dict[int, HwQueue] = {}
        #: The nested HWPTs that were allocated from it.
        self.hwpts: list[Hwpt] = []
        #: Guards what a fault needs: it is reported while another thread may hold `lock`.
        self._reporting = threading.Lock()
        self._veventqs: dict[int, Veventq] = {}
        self._masters: dict[str, tuple[Hwpt, int]] = {}
        hwpt.users += 1
        #: The PASIDs of groups that were attached at an access, by the data of a HWPT.
        self._pasids: list[tuple[Hwpt, Group, int]] = []
        self._quiet = self.iommu.on_fault(self._faulted)
        self._unlink = resolvers_of(self.iommu).add(self._resolve)

    def release(self) -> None:
        self._quiet()
        self._unlink()
        self.hwpt.users -= 1

    # ---- what a type may have --------------------------------------------------------------

    def stage1(self, device: Device, flags: AllocFlags, data: NestedData | Table, memory: GuestMemory) -> Stage1:
        """Stage 1 of a nested HWPT (alloc_domain_nested).  IommuError(EOPNOTSUPP): the type has none."""
        raise IommuError(errno.EOPNOTSUPP, f"{self}: no nested HWPTs of {type(data).__name__}")

    def invalidate_one(self, entry: Any) -> None:
        """Carries out one entry of an invalidation (cache_invalidate).  IommuError: it is refused."""

    def vdevice_init(self, device: Device, virt_id: int) -> None:
        """Whether a vDEVICE can be had.  IommuError: it cannot."""

    def hw_queue_type(self, kind: int) -> bool:
        """Whether the type has queues of this type (get_hw_queue_size)."""
        return False

    def hw_queue_init(self, index: int, gpa: int, length: int) -> None:
        """Whether a queue can be had (hw_queue_init_phys).  IommuError: it cannot."""

    def event_of(self, hwpt: Hwpt, virt_id: int, record: FaultRecord) -> tuple[int, bytes] | None:
        """The event of a fault, as (VeventqType, data); None: the VM does not get to know it."""
        return None

    # ---- vDEVICEs and events ---------------------------------------------------------------

    @locked
    def vdevice_alloc(self, device: Device, virt_id: int) -> Vdevice:
        """IOMMU_VDEVICE_ALLOC: `virt_id` is the device's id in the VM (SMMUv3: StreamID; 64 bits).

        IommuError: ENOENT the vIOMMU or the device was destroyed; EINVAL the device is behind another IOMMU, or
        `virt_id` does not fit; EEXIST the device has a vDEVICE, or the vIOMMU one with this id; else as vdevice_init.
        """
        if not 0 <= virt_id < 1 << 64:
            raise IommuError(errno.EINVAL, f"{self}: virt_id {virt_id:#x}")
        self.check()
        device.check(self.context)
        if device.group.iommu is not self.iommu:
            raise IommuError(errno.EINVAL, f"{self}: {device} is behind {device.group.iommu.name}")
        if device.vdevice is not None:
            raise IommuError(errno.EEXIST, f"{device} has {device.vdevice}")
        if virt_id in self.vdevices:
            raise IommuError(errno.EEXIST, f"{self}: {self.vdevices[virt_id]} has id {virt_id:#x}")
        self.vdevice_init(device, virt_id)
        return Vdevice(self, device, virt_id)

    @locked
    def veventq_alloc(self, kind: int, depth: int) -> Veventq:
        """IOMMU_VEVENTQ_ALLOC: a queue of `depth` events of one type (VeventqType).

        As in Linux, it need not be a type that the vIOMMU ever reports.  IommuError: EOPNOTSUPP the type is DEFAULT;
        EINVAL `depth` is not from 1 to 2**19; ENOENT the vIOMMU was destroyed; EEXIST it has a queue of this type.
        """
        if kind == VeventqType.DEFAULT:
            raise IommuError(errno.EOPNOTSUPP, f"{self}: vEVENTQ type {kind}")
        if not 0 < depth <= MOST_EVENTS:
            raise IommuError(errno.EINVAL, f"{self}: a vEVENTQ of {depth} events")
        self.check()
        if kind in self._veventqs:
            raise IommuError(errno.EEXIST, f"{self} has {self._veventqs[kind]} of type {kind}")
        queue = Veventq(self, kind, depth)
        with self._reporting:
            self._veventqs[kind] = queue
        return queue

    @locked
    def hw_queue_alloc(self, kind: int, index: int, iova: int, length: int) -> HwQueue:
        """IOMMU_HW_QUEUE_ALLOC: a queue of `length` bytes, at `iova` of the nesting parent.

        IommuError: EOPNOTSUPP the type is DEFAULT, or the vIOMMU has none of it; EINVAL no length; EOVERFLOW wraps;
        ENOENT the vIOMMU was destroyed, or nothing is mapped at `iova`; EFAULT the memory is not contiguous; else as
        hw_queue_init.
        """
        if kind == HwQueueType.DEFAULT:
            raise IommuError(errno.EOPNOTSUPP, f"{self}: HW_QUEUE type {kind}")
        if length <= 0 or index < 0:
            raise IommuError(errno.EINVAL, f"{self}: a queue of {length} bytes, index {index}")
        if iova < 0 or iova + length > 1 << 64:
            raise IommuError(errno.EOVERFLOW, f"{self}: iova {iova:#x}, {length:#x} bytes: past 2**64")
        self.check()
        if not self.hw_queue_type(kind):
            raise IommuError(errno.EOPNOTSUPP, f"{self} has no queues of type {kind:#x}")
        return HwQueue(self, kind, index, iova, length)

    def remove_veventq(self, queue: Veventq) -> None:
        """No event comes to a queue that is being destroyed."""
        with self._reporting:
            del self._veventqs[queue.type]

    def report_event(self, kind: int, data: bytes) -> None:
        """Adds an event to the queue of its type, as a driver does (iommufd_viommu_report_event).  Any thread.

        IommuError: EINVAL no data; EOPNOTSUPP there is no queue of this type.
        """
        if not data:
            raise IommuError(errno.EINVAL, f"{self}: an event without data")
        with self._reporting:
            queue = self._veventqs.get(kind)
            if queue is None:
                raise IommuError(errno.EOPNOTSUPP, f"{self} has no vEVENTQ of type {kind}")
            queue.put(data)

    def _faulted(self, record: FaultRecord) -> None:
        with self._reporting:
            hwpt, virt_id = self._masters.get(record.requester, (None, 0))
            event = None if hwpt is None else self.event_of(hwpt, virt_id, record)
            queue = None if event is None else self._veventqs.get(event[0])
            if event is not None and queue is not None:
                queue.put(event[1])

    def _resolve(self, endpoint: Endpoint, fault: DmaFault) -> bool:
        """Attaches the domain of a PASID at its first access; the access is tried again."""
        group = endpoint.group
        if fault.reason is not Reason.PASID or fault.pasid is None or endpoint.max_pasids == 0 or group is None:
            return False
        with self.lock:
            hwpt = self.context.attached.get((group, None))
            if hwpt is None or hwpt.viommu is not self:
                return False
            if fault.pasid in group.pasids:  # another thread was faster
                return True
            if len(self._pasids) >= _MOST_PASIDS:
                for item in {item for item, _, _ in self._pasids}:
                    self.drop_pasids(item)
            domain = hwpt.domain_of(fault.pasid)
            if domain is None:
                return False
            try:
                group.attach_pasid(domain, fault.pasid)
            except OSError as error:  # the device, or the IOMMU, has no such PASID; or there is no memory
                log.debug("%s: pasid %#x of %s: %s", self, fault.pasid, endpoint.name, error)
                return False
            self._pasids.append((hwpt, group, fault.pasid))
            return True

    def drop_pasids(self, hwpt: Hwpt) -> None:
        """The next access with a PASID reads what the HWPT's data lead to again."""
        for item, group, pasid in self._pasids:
            if item is hwpt and pasid in group.pasids:
                group.detach_pasid(pasid)
        self._pasids = [entry for entry in self._pasids if entry[0] is not hwpt]
        if hwpt.stage1 is not None:
            hwpt.stage1.drop_pasids()

    # ---- nested HWPTs ----------------------------------------------------------------------

    def virt_ids(self, hwpt: Hwpt, group: Group) -> dict[str, tuple[Hwpt, int]]:
        """The ids that a VM knows the devices of a group by, which is to be attached to a nested HWPT.

        IommuError(ENOENT): one of them has no vDEVICE, and needs one (iommufd_viommu_get_vdev_id).
        """
        known = {vdevice.device.endpoint.name: virt_id for virt_id, vdevice in self.vdevices.items()}
        for endpoint in group.endpoints:
            if endpoint.name not in known and hwpt.stage1 is not None and hwpt.stage1.needs_vdevice:
                raise IommuError(errno.ENOENT, f"{self} has no vDEVICE of {endpoint.name}")
        return {e.name: (hwpt, known[e.name]) for e in group.endpoints if e.name in known}

    def attached(self, hwpt: Hwpt, group: Group) -> None:
        """The group's faults are reported with the ids of now, also if a vDEVICE is destroyed."""
        ids = self.virt_ids(hwpt, group)
        with self._reporting:
            self._masters.update(ids)

    def detached(self, hwpt: Hwpt, group: Group) -> None:
        """The group's faults, and its PASIDs, are not the VM's any more."""
        self.drop_pasids(hwpt)
        with self._reporting:
            for endpoint in group.endpoints:
                self._masters.pop(endpoint.name, None)

    def invalidate(self, entries: Sequence[Any]) -> int:
        """IOMMU_HWPT_INVALIDATE: carries out `entries` in order; returns how many.

        InvalidationError, an IommuError with the number `done` before the one that is refused: EINVAL too many, not of
        the vIOMMU's type, or none where the type needs one; EOPNOTSUPP the type has no invalidation; ENOENT the vIOMMU
        was destroyed, maybe meanwhile; else as the type's.  Other threads' calls come in between entries, if there are
        many.
        """
        return run(self, entries, self.entry, self.invalidate_one, may_be_empty=self.may_be_empty)


#: By kind of IOMMU, what finds the class of a vIOMMU type; None: the IOMMU has no such type.
ViommuFinder = Callable[[Iommu, int], type[Viommu] | None]


def viommu_alloc(device: Device, parent: Hwpt, kind: int, find: ViommuFinder | None) -> Viommu:
    """As Device.viommu_alloc (iommufd_viommu_alloc_ioctl)."""
    if kind == ViommuType.DEFAULT:
        raise IommuError(errno.EOPNOTSUPP, f"{device}: vIOMMU type {kind}")
    device.check()
    iommu = device.group.iommu
    made = None if find is None else find(iommu, kind)
    if made is None:
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} has no vIOMMU of type {kind:#x}")
    if iommu.driver.stage1_bypasses and not device.endpoint.can_enforce_snoop:  # arm_smmu_get_viommu_size
        raise IommuError(errno.EOPNOTSUPP, f"{device}: a VM's stage 1 could make its DMA bypass caches")
    parent.check(device.context)
    if parent.nested:
        raise IommuError(errno.ENOENT, f"{parent} is nested")
    if not parent.paging.nests:
        raise IommuError(errno.EINVAL, f"{parent} was not allocated as a parent")
    if iommu.driver.own_tables and parent.paging.made_for is not iommu:
        raise IommuError(errno.EINVAL, f"{parent} is not for {iommu.name}")
    return made(device, parent, kind)
