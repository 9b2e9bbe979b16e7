"""Kinds of IOMMUs: how each identifies devices, and which tables it walks.  `drivers/` has one file for each kind."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic

from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.coherency import Coherency
from vmodel.iommu.domain import AllocFlags, DomainType
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.pci.topology import Bdf, Function, dma_aliases


@dataclass(frozen=True)
class PlatformDevice:
    """A device that does DMA and is not a PCI function.

    ValueError: `name` cannot be that of a folder in sysfs: it is "", "." or "..", has a NUL or more than 255 bytes, or
    is no UTF-8.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name in ("", ".", ".."):
            raise ValueError(f"a platform device named {self.name!r}: must be the name of a folder, such as fsl-dma.0")
        try:
            size = len(self.name.encode())
        except UnicodeEncodeError:
            raise ValueError(f"a platform device named {self.name!r}: must be UTF-8") from None
        if "\0" in self.name or size > 255:
            raise ValueError(f"a platform device named {self.name[:80]!r}: must have no NUL, and at most 255 bytes")

    @property
    def folder(self) -> str:
        """Its name in sysfs (Linux's kobjects: "!" for "/")."""
        return self.name.replace("/", "!")

    def __str__(self) -> str:
        return self.name


#: A source of DMA that an IOMMU may cover.
Source = Function | PlatformDevice


class Refusal(str):
    """Why an IOMMU's driver refuses something, for people; `code` is the errno of Linux's driver."""

    code: int

    def __new__(cls, text: str, code: int) -> Refusal:
        """The text, with its errno."""
        made = super().__new__(cls, text)
        made.code = code
        return made


class KindParams(pydantic.BaseModel):
    """The parameters of a kind in machine files; unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def bdf_text(value: str) -> str:
    """Validates a PCI address, and returns it in normal form.  ValueError."""
    return str(Bdf.parse(value))


@dataclass(frozen=True)
class MapErrors:
    """The errno values of mappings that a driver in Linux refuses.

    `overlap`: of another mapping; `misaligned`: not whole pages; `wraps`: past 2**64; `output_first`: a GPA beyond the
    output width is noticed before either of the last two.
    """

    overlap: int = errno.EEXIST
    misaligned: int = errno.EINVAL
    wraps: int = errno.ERANGE
    output_first: bool = False

    def find(self, code: int, iova: int, gpa: int, size: int, access: int, output_bits: int) -> int:
        """The errno of a mapping that the shim has refused with `code`."""
        if code == errno.EEXIST:
            return self.overlap
        if code == errno.EINVAL and access and size > 0:
            if self.output_first and gpa >> output_bits:
                return errno.ERANGE
            return self.wraps if iova + size > 1 << 64 else self.misaligned
        return self.wraps if code == errno.ERANGE and access and iova + size > 1 << 64 else code


#: Linux drivers/iommu/generic_pt/iommu_pt.h, map_range.
GENERIC_PT = MapErrors(errno.EADDRINUSE, errno.ENXIO, errno.EOVERFLOW, output_first=True)


class Driver(ABC):
    """A kind of IOMMU.  `params`: an instance of its Params, or data for one (pydantic.ValidationError)."""

    #: The name in machine files, and the name for people.
    kind: ClassVar[str]
    title: ClassVar[str]
    #: Formats of tables that it walks, and of those that it walks as stage 1 over a paging domain.
    formats: ClassVar[frozenset[TableFormat]]
    nested_formats: ClassVar[frozenset[TableFormat]] = frozenset()
    #: The default capabilities of such an IOMMU.
    default: ClassVar[Capabilities]
    Params: ClassVar[type[KindParams]] = KindParams
    #: Whether its tables are good for this one instance only, so that another one refuses its domains.
    own_tables: ClassVar[bool] = False
    #: How its domains refuse mappings.
    map_errors: ClassVar[MapErrors] = MapErrors()
    #: The errno when its tables cannot be attached to a narrower IOMMU of the kind.
    misfit: ClassVar[int] = errno.EINVAL
    #: Whether a parent of nested domains can neither track writes nor be attached to PASIDs.
    parent_alone: ClassVar[bool] = False
    #: Whether all mappings of such a parent must be writable (Linux PT_FEAT_VTDSS_FORCE_WRITEABLE).
    parent_writable: ClassVar[bool] = False
    #: Whether nested HWPTs need a vIOMMU (Linux: the driver has no domain_alloc_nested).
    nested_by_viommu: ClassVar[bool] = False
    #: What a domain for PASIDs cannot be as well.
    not_for_pasids: ClassVar[AllocFlags] = AllocFlags.NONE
    #: How DMA through its paging domains snoops.
    coherency: ClassVar[Coherency] = Coherency()
    #: Whether firmware describes it by an IVRS table, on which quirks of AMD's southbridges depend.
    in_ivrs: ClassVar[bool] = False
    #: Parameters that apply only to an IOMMU that a guest drives.
    served_params: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: Any = None) -> None:
        self.params: Any = params if isinstance(params, self.Params) else self.Params.model_validate(params or {})

    def fit(self, capabilities: Capabilities) -> Capabilities:
        """What an IOMMU with these capabilities has, where some depend on others.  ValueError: there is none."""
        return capabilities

    def cache_coherency(self, capabilities: Capabilities) -> bool:
        """Whether Linux's driver declares IOMMU_CAP_CACHE_COHERENCY, which VFIO and iommufd require."""
        return True

    @abstractmethod
    def requester_id(self, source: Source) -> int | None:
        """The id that the IOMMU sees in a device's requests; None: it cannot identify, so not isolate it."""

    def why_not(self, source: Source) -> str:
        """The reason why `requester_id` returns None, for people."""
        return f"{self.title} has no id for it"

    def describe_id(self, requester_id: int) -> str:
        """An id for people; by default as the address of a PCI requester."""
        return str(Bdf.of(requester_id >> 16, requester_id & 0xFFFF))

    @property
    def stage1_bypasses(self) -> bool:
        """Whether a VM's stage 1 can make DMA bypass caches, unless the device's DMA is made to snoop."""
        return False

    def snoop_by_entry(self, flags: AllocFlags) -> bool:
        """Whether a bit of each entry of a paging domain with `flags` forces snooping, and not the whole domain."""
        return False

    def default_domain_type(self, source: Source, max_pasids: int | None) -> DomainType | None:
        """The type that default domains of a device must have; None: any.  `max_pasids` as that of Endpoint.

        (Linux iommu_ops: def_domain_type, and default_domain, whose type PLATFORM is IDENTITY here)
        """
        return None

    def refuses_sva(self, capabilities: Capabilities, table: Table, *, has_ats: bool) -> Refusal | None:
        """Why a device cannot share a process's `table`; None: it can.  `has_ats`: it has PCIe's ATS capability.

        (Linux iommu_ops.domain_alloc_sva, and set_dev_pasid of its domains)
        """
        return Refusal(f"{self.title} does not share tables of processes", errno.EOPNOTSUPP)

    def partition(self, source: Source) -> tuple[Hashable, str] | None:
        """(key, reason): devices with equal keys share a group.  None: topology decides."""
        return None


def topmost(function: Function) -> Bdf:
    """The requester id that the root complex sees in a function's DMA: the alias nearest to the root.

    An NTB's own DMA has its own id; its aliases are those of devices on the other side.
    """
    aliases = list(dma_aliases(function))
    proxies = function.alias_quirk is not None and function.alias_quirk.proxy
    return next((alias for alias in aliases[::-1] if alias.by is not function or not proxies), aliases[0]).bdf


def pci_id(bdf: Bdf) -> int:
    """Segment and requester id in one number: `segment << 16 | rid`."""
    return bdf.segment << 16 | bdf.rid
