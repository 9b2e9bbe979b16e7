"""Nested HWPTs: a user's tables over a parent, or by way of a vIOMMU (Linux hw_pagetable.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vmodel.errors import IommuError
from vmodel.iommu.allocate import nested_domain_alloc
from vmodel.iommu.domain import AllocFlags, TableDomain
from vmodel.iommu.group import can_attach
from vmodel.iommu.iommufd.fault_object import FaultObject
from vmodel.iommu.iommufd.hwpt import Hwpt
from vmodel.iommu.iommufd.nested import Aborting, NestedData, VtdNested, VtdStage1
from vmodel.iommu.iommufd.viommu import Viommu
from vmodel.iommu.pgtable import Table
from vmodel.memory import GuestMemory

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.device import Device


def nested_hwpt(
    device: Device,
    parent: Hwpt | Viommu,
    flags: AllocFlags,
    data: NestedData | Table | None,
    memory: GuestMemory | None,
    fault: FaultObject | None,
) -> Hwpt:
    """As Device.hwpt_alloc (Linux iommufd_hwpt_nested_alloc, iommufd_viommu_alloc_hwpt_nested)."""
    iommu = device.group.iommu
    if isinstance(parent, Hwpt) and parent.nested:
        raise IommuError(errno.EINVAL, f"{parent} is nested itself")
    if isinstance(parent, Viommu) and parent.iommu is not iommu:
        raise IommuError(errno.EINVAL, f"{parent} is a part of {parent.iommu.name}, not of {iommu.name}")
    if data is None or memory is None or flags & ~AllocFlags.PASID:
        raise IommuError(errno.EOPNOTSUPP, f"{device}: a nested HWPT without data, or with {flags!r}")
    for_pasids = bool(flags & AllocFlags.PASID)
    if isinstance(parent, Viommu):
        stage1 = parent.stage1(device, flags, data, memory)
        domain = Aborting("not attached yet")
        over = parent.hwpt
        return Hwpt(parent.context, domain, over, fault, for_pasids=for_pasids, stage1=stage1, viommu=parent)
    if iommu.driver.nested_by_viommu:
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name}: a nested HWPT needs a vIOMMU")
    found = _over_parent(device, parent, data, memory)
    if isinstance(found, VtdNested):
        return Hwpt(parent.context, found.domain, parent, fault, for_pasids=for_pasids, stage1=found)
    return Hwpt(parent.context, found, parent, fault, for_pasids=for_pasids)


def _over_parent(
    device: Device, parent: Hwpt, data: NestedData | Table, memory: GuestMemory
) -> VtdNested | TableDomain:
    over, iommu = parent.paging, device.group.iommu
    if isinstance(data, Table):
        found: VtdNested | TableDomain = nested_domain_alloc(device.endpoint, over, memory, data)
    elif isinstance(data, VtdStage1) and iommu.driver.kind == "vt-d":
        found = VtdNested(device.endpoint, over, memory, data)
    else:
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} does not nest by {type(data).__name__}")
    if (why := can_attach(over, device.endpoint)) is not None:
        raise IommuError(errno.EINVAL, f"{device}: {parent}: {why}")
    return found
