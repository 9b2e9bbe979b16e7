"""Allocates domains for a device, with the checks and errno values of Linux."""

from __future__ import annotations

import errno

from vmodel.errors import IommuError
from vmodel.iommu.domain import CPU_FORMATS, AllocFlags, DomainType, PagingDomain, TableDomain
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.pgtable import Table
from vmodel.memory import GuestMemory

_NOT_OF_PARENTS = AllocFlags.DIRTY_TRACKING | AllocFlags.PASID


def _iommu_of(endpoint: Endpoint) -> Iommu:
    if endpoint.iommu is None or endpoint.group is None:
        raise IommuError(errno.ENODEV, f"{endpoint.name} has no group: {endpoint.why}")
    return endpoint.iommu


def paging_domain_alloc(endpoint: Endpoint, flags: AllocFlags = AllocFlags.NONE) -> PagingDomain:
    """A user-managed domain for a device (Linux iommu_paging_domain_alloc_flags).

    IommuError: ENODEV the device has no group; EOPNOTSUPP its IOMMU does not support one of `flags`, or the
    combination.
    """
    iommu = _iommu_of(endpoint)
    can = iommu.capabilities
    for flag, ability in (
        (AllocFlags.NEST_PARENT, can.nesting),
        (AllocFlags.DIRTY_TRACKING, can.dirty_tracking),
        (AllocFlags.PASID, can.pasid_bits > 0),
        (AllocFlags.ENFORCE_SNOOP, endpoint.can_enforce_snoop),
    ):
        if flag in flags and not ability:
            raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} does not support {flag.name}")
    if AllocFlags.NEST_PARENT in flags and iommu.driver.parent_alone and flags & _NOT_OF_PARENTS:
        text = f"{iommu.name}: a parent of nested domains neither tracks writes nor has PASIDs"
        raise IommuError(errno.EOPNOTSUPP, text)
    if AllocFlags.PASID in flags and flags & iommu.driver.not_for_pasids:
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name}: a domain for PASIDs cannot be {flags!r}")
    return PagingDomain(DomainType.UNMANAGED, iommu, flags)


def dma_domain_alloc(endpoint: Endpoint) -> PagingDomain:
    """A kernel-managed domain for a device.

    Its IOTLB flushes are deferred unless the IOMMU is strict, or a member of the group is untrusted.
    IommuError(ENODEV): the device has no group.
    """
    iommu = _iommu_of(endpoint)
    assert endpoint.group is not None
    strict = iommu.capabilities.strict or any(member.untrusted for member in endpoint.group.endpoints)
    flags = AllocFlags.DIRTY_TRACKING if iommu.capabilities.dirty_tracking else AllocFlags.NONE
    return PagingDomain(DomainType.DMA if strict else DomainType.DMA_FQ, iommu, flags)


def nested_domain_alloc(endpoint: Endpoint, parent: PagingDomain, memory: GuestMemory, table: Table) -> TableDomain:
    """A user's stage 1 over `parent`; table addresses are translated by `parent` and read from `memory`.

    IommuError: ENODEV the device has no group; EOPNOTSUPP no nesting, or not with this format; EINVAL `parent` was not
    allocated with NEST_PARENT, or is of another kind, or `table` is invalid.
    """
    iommu = _iommu_of(endpoint)
    if not iommu.capabilities.nesting:
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} does not nest tables")
    if not parent.nests or parent.made_for is None or parent.made_for.driver.kind != iommu.driver.kind:
        raise IommuError(errno.EINVAL, f"{parent.name} was not allocated as a parent for {iommu.driver.title}")
    if table.format not in iommu.driver.nested_formats:
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} does not nest {table.format.name} tables")
    return TableDomain(DomainType.NESTED, iommu, memory, table, parent)


def sva_domain_alloc(endpoint: Endpoint, memory: GuestMemory, table: Table) -> TableDomain:
    """A domain that walks a process's page table, for a PASID (Linux iommu_sva_bind_device).

    IommuError: ENODEV the device has no group; ENOSPC it, or its IOMMU, has no PASIDs; EOPNOTSUPP the IOMMU does not
    walk this format, or shares no tables; EINVAL `table` is invalid; else what the driver of the kind wants: VT-d
    coherent walks and, for 5 levels, `input_bits` of 57 (ENODEV), and a device with ATS (EINVAL); SMMUv3 coherent
    walks, pages of 4 KiB, and the table's `output_bits` (EOPNOTSUPP).  Page requests are not needed: without them,
    accesses to missing pages fail.
    """
    iommu = _iommu_of(endpoint)
    if not iommu.capabilities.pasid_bits or endpoint.max_pasids == 0:
        raise IommuError(errno.ENOSPC, f"{endpoint.name} has no PASIDs")
    if table.format not in CPU_FORMATS & iommu.driver.formats:
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} cannot share {table.format.name} tables of processes")
    if (why := iommu.driver.refuses_sva(iommu.capabilities, table, has_ats=endpoint.has_ats)) is not None:
        raise IommuError(why.code, f"{endpoint.name}: {why}")
    return TableDomain(DomainType.SVA, iommu, memory, table)


def walked_domain_alloc(
    endpoint: Endpoint, memory: GuestMemory, table: Table, parent: TableDomain | None = None
) -> TableDomain:
    """A domain that walks the guest's own tables, which the registers of an emulated IOMMU point to.

    With `parent`, the tables are stage 1 over it.  IommuError: ENODEV the device has no group; EOPNOTSUPP its IOMMU
    does not walk this format at this stage; EINVAL `table` is invalid.
    """
    iommu = _iommu_of(endpoint)
    if table.format not in (iommu.driver.formats if parent is None else iommu.driver.nested_formats):
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} does not walk {table.format.name} tables")
    return TableDomain(DomainType.DMA if parent is None else DomainType.NESTED, iommu, memory, table, parent)
