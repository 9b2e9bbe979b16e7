"""IOMMUs, groups, domains, address spaces and faults, as Linux's iommu core, VFIO type1 and iommufd have them.

Users import from here, except for the kinds of IOMMU (`vmodel.iommu.drivers.KINDS`) and the two interfaces that VMMs
use, `vmodel.iommu.container` (VFIO type1) and `vmodel.iommu.iommufd`.
"""

from vmodel.iommu.allocate import (
    dma_domain_alloc,
    nested_domain_alloc,
    paging_domain_alloc,
    sva_domain_alloc,
    walked_domain_alloc,
)
from vmodel.iommu.capabilities import Capabilities, RegionType, ReservedRegion
from vmodel.iommu.changes import Change, ChangeKind
from vmodel.iommu.domain import AllocFlags, Domain, DomainType, PagingDomain, TableDomain
from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.fault import FaultRecord, PageRequest, PageResponse
from vmodel.iommu.group import Group
from vmodel.iommu.iommu import Coverage, Iommu
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.iommu.system import System

__all__ = [
    "AllocFlags",
    "Capabilities",
    "Change",
    "ChangeKind",
    "Coverage",
    "Domain",
    "DomainType",
    "Endpoint",
    "FaultRecord",
    "Group",
    "Iommu",
    "PageRequest",
    "PageResponse",
    "PagingDomain",
    "PlatformDevice",
    "RegionType",
    "ReservedRegion",
    "System",
    "Table",
    "TableDomain",
    "TableFormat",
    "dma_domain_alloc",
    "nested_domain_alloc",
    "paging_domain_alloc",
    "sva_domain_alloc",
    "walked_domain_alloc",
]
