"""The vIOMMU of an SMMUv3, with and without CMDQ-V (Linux arm-smmu-v3-iommufd.c, tegra241-cmdqv.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from vmodel.errors import Access, IommuError, Reason
from vmodel.iommu.domain import AllocFlags, TableDomain
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.fault import FaultRecord
from vmodel.iommu.group import Group
from vmodel.iommu.iommufd.hw_queue import HwQueueType
from vmodel.iommu.iommufd.hwpt import Hwpt
from vmodel.iommu.iommufd.nested import NestedData, SmmuV3Ste
from vmodel.iommu.iommufd.registers import CMDQS, cmdqv_of
from vmodel.iommu.iommufd.smmu_commands import Atc0, Atc1, SmmuOp, Tlbi0, check_command, command_words, range_of
from vmodel.iommu.iommufd.smmu_nested import SmmuEvent, SmmuNested
from vmodel.iommu.iommufd.veventq import VeventqType
from vmodel.iommu.iommufd.viommu import Viommu
from vmodel.iommu.pgtable import Table
from vmodel.memory import GuestMemory
from vmodel.regs import Bit, Bits, Layout
from vmodel.span import PAGE, Span

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.device import Device


class Event0(Layout):
    """Word 0 of an event record (7.3)."""

    ID = Bits(0, 7)
    SSV = Bit(11)
    SSID = Bits(12, 31)
    SID = Bits(32, 63)


class Event1(Layout):
    """Word 1 of an event record."""

    RNW = Bit(35, doc="a read")
    S2 = Bit(39)
    CLASS = Bits(40, 41, doc="2: the address of the access itself")


_EVENTS = {
    Reason.NOT_MAPPED: SmmuEvent.F_TRANSLATION,
    Reason.INPUT_WIDTH: SmmuEvent.F_TRANSLATION,
    Reason.RESERVED_BITS: SmmuEvent.F_TRANSLATION,
    Reason.OUTPUT_WIDTH: SmmuEvent.F_ADDR_SIZE,
    Reason.ACCESS_FLAG: SmmuEvent.F_ACCESS,
    Reason.PERMISSION: SmmuEvent.F_PERMISSION,
}
_FAULTS = frozenset(_EVENTS.values())


class SmmuV3Viommu(Viommu):
    """IOMMU_VIOMMU_TYPE_ARM_SMMUV3: a guest's STEs, its invalidation commands (16 bytes each), and its events.

    A command has the guest's StreamIDs, which are those of vDEVICEs; whatever VMID it has, it is for this VM.
    """

    entry: ClassVar[type | None] = bytes
    may_be_empty: ClassVar[bool] = False

    def stage1(self, device: Device, flags: AllocFlags, data: NestedData | Table, memory: GuestMemory) -> SmmuNested:
        """IommuError: EOPNOTSUPP flags; EINVAL other data than an STE; EIO an illegal one."""
        if flags:
            raise IommuError(errno.EOPNOTSUPP, f"{self}: a nested HWPT with {flags!r}")
        if not isinstance(data, SmmuV3Ste):
            raise IommuError(errno.EINVAL, f"{self}: {type(data).__name__} is not for an SMMUv3")
        return SmmuNested(self.iommu, self.hwpt.paging, memory, data)

    def attached(self, hwpt: Hwpt, group: Group) -> None:
        """Devices with ATS use it if the STE says so (arm_smmu_attach_dev_nested)."""
        super().attached(hwpt, group)
        assert isinstance(hwpt.stage1, SmmuNested)
        for endpoint in group.endpoints:
            endpoint.set_ats(endpoint.has_ats and hwpt.stage1.ats)

    def detached(self, hwpt: Hwpt, group: Group) -> None:
        super().detached(hwpt, group)
        for endpoint in group.endpoints:
            endpoint.set_ats(False)

    def invalidate_one(self, entry: bytes) -> None:
        """IommuError: EINVAL not 16 bytes; EIO a command, a field or a StreamID that a guest must not have."""
        words = command_words(entry)
        check_command(words, self.iommu.capabilities)
        op = SmmuOp(words[0] & 0xFF)
        if op in (SmmuOp.CFGI_CD, SmmuOp.CFGI_CD_ALL, SmmuOp.ATC_INV):
            self._for_device(op, words)
            return
        span = range_of(words) if op in (SmmuOp.TLBI_NH_VA, SmmuOp.TLBI_NH_VAA) else None
        asid = int(Tlbi0(words[0]).ASID) if op in (SmmuOp.TLBI_NH_VA, SmmuOp.TLBI_NH_ASID) else None
        for hwpt in self.hwpts:
            assert isinstance(hwpt.stage1, SmmuNested)
            for found in hwpt.stage1.descriptors.values():
                if isinstance(found.domain, TableDomain) and asid in (None, found.asid):
                    found.domain.flush(span, own=False)  # the TLBs of devices: ATC_INV

    def _for_device(self, op: SmmuOp, words: tuple[int, int]) -> None:
        vdevice = self.vdevices.get(int(Atc0(words[0]).SID))
        if vdevice is None:
            raise IommuError(errno.EIO, f"no vDEVICE has StreamID {int(Atc0(words[0]).SID):#x}")
        endpoint = vdevice.device.endpoint
        if op is SmmuOp.ATC_INV:
            _invalidate_atc(endpoint, Atc0(words[0]), Atc1(words[1]))
            return
        for hwpt in set(vdevice.device.attached.values()):
            if hwpt.viommu is self:
                hwpt.reload()

    def event_of(self, hwpt: Hwpt, virt_id: int, record: FaultRecord) -> tuple[int, bytes] | None:
        """Faults of stage 1 and of the guest's descriptors (arm_smmu_handle_event, arm_vmaster_report_event).

        Not those that were page requests: the user has got them by the HWPT's fault object.
        """
        stage1 = hwpt.stage1
        assert isinstance(stage1, SmmuNested)
        found = stage1.descriptors.get(record.pasid)
        if record.reason in (Reason.PASID, Reason.BLOCKED):
            event = stage1.event_of(record.pasid)
        elif record.stage != 1 or found is None or not found.reports or hwpt.asks(record):
            return None
        else:
            event = _EVENTS.get(record.reason)
        if event is None:
            return None
        word0 = Event0.SID.put(int(event), virt_id & 0xFFFF_FFFF)
        if record.pasid is not None:
            word0 = Event0.SSID.put(word0 | Event0.SSV.mask, record.pasid)
        word1 = address = 0
        if event in _FAULTS:
            word1 = Event1.CLASS.put(0 if Access.WRITE in record.access else Event1.RNW.mask, 2)
            address = record.iova
        words = (word0, word1, address, 0)
        return VeventqType.ARM_SMMUV3, b"".join(word.to_bytes(8, "little") for word in words)


def _invalidate_atc(endpoint: Endpoint, word0: Atc0, word1: Atc1) -> None:
    size = PAGE << word1.SIZE
    start = (word1.ADDRESS << 12) & -size
    whole = word1.SIZE == 52
    span = Span(0, (1 << 64) - 1) if whole else Span(start, start + size - 1)
    group = endpoint.group
    if word0.SSV and not word0.GLOBAL:
        endpoint.invalidate(span, int(word0.SSID))
        return
    endpoint.invalidate(span)
    if word0.SSV and group is not None:
        for pasid in list(group.pasids):
            endpoint.invalidate(span, pasid)


class CmdqvViommu(SmmuV3Viommu):
    """IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV: also command queues of the VM's own, HwQueue."""

    #: StreamIDs have 20 bits (VINTF_SID_MATCH_VIRT_SID).
    _SID_BITS = 20

    def __init__(self, device: Device, hwpt: Hwpt, kind: int) -> None:
        found = cmdqv_of(device.group.iommu)
        assert found is not None
        self._info = found
        super().__init__(device, hwpt, kind)

    def vdevice_init(self, device: Device, virt_id: int) -> None:
        """IommuError: EINVAL more than 20 bits; ENOSPC all 16 StreamIDs are taken (tegra241_vintf_init_vsid)."""
        if virt_id >= 1 << self._SID_BITS:
            raise IommuError(errno.EINVAL, f"{self}: StreamID {virt_id:#x} has more than {self._SID_BITS} bits")
        if len(self.vdevices) >= 1 << self._info.log2vsids:
            raise IommuError(errno.ENOSPC, f"{self}: all {1 << self._info.log2vsids} StreamIDs are taken")

    def hw_queue_type(self, kind: int) -> bool:
        return kind == HwQueueType.TEGRA241_CMDQV

    def hw_queue_init(self, index: int, gpa: int, length: int) -> None:
        """IommuError: EINVAL `index` is too large, or `length` no power of 2 from 32 bytes on, or `gpa` not aligned to
        it; EEXIST the index is taken; EIO the one before it is not (tegra241_vintf_alloc_lvcmdq_user).
        """
        if index >= 1 << self._info.log2vcmdqs:
            raise IommuError(errno.EINVAL, f"{self} has {1 << self._info.log2vcmdqs} queues, not {index}")
        if index in self.hw_queues:
            raise IommuError(errno.EEXIST, f"{self}: {self.hw_queues[index]} has index {index}")
        if index and index - 1 not in self.hw_queues:
            raise IommuError(errno.EIO, f"{self}: queue {index} before {index - 1}")
        if length & (length - 1) or not 32 <= length <= 16 << CMDQS or gpa % length or gpa >> 48:
            raise IommuError(errno.EINVAL, f"{self}: a queue of {length:#x} bytes at gpa {gpa:#x}")
