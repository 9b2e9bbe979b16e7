"""Kinds of IOMMUs: what each tells devices apart by, and the tables it walks.  One file a kind in `drivers/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic

from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.pgtable import TableFormat
from vmodel.pci.topology import Bdf, Function, dma_aliases


@dataclass(frozen=True)
class PlatformDevice:
    """Something that does DMA and is no PCI function."""

    name: str

    def __str__(self) -> str:
        return self.name


#: What an IOMMU may cover.
Source = Function | PlatformDevice


class KindParams(pydantic.BaseModel):
    """A kind's own parameters, as in a machine file; unknown ones are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def bdf_text(value: str) -> str:
    """For validators: a PCI address as text."""
    return str(Bdf.parse(value))


class Driver(ABC):
    """A kind of IOMMU.  `params`: an instance of its Params, or what makes one (pydantic.ValidationError)."""

    #: Its name in machine files, and what it is.
    kind: ClassVar[str]
    title: ClassVar[str]
    #: Formats of tables that it walks by itself, and of those that may lie over a paging domain.
    formats: ClassVar[frozenset[TableFormat]]
    nested_formats: ClassVar[frozenset[TableFormat]] = frozenset()
    #: What such an IOMMU can do, if nothing else is said.
    default: ClassVar[Capabilities]
    Params: ClassVar[type[KindParams]] = KindParams
    #: Parameters that mean something only where a guest drives it.
    served_params: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: Any = None) -> None:
        self.params: Any = params if isinstance(params, self.Params) else self.Params.model_validate(params or {})

    @abstractmethod
    def requester_id(self, source: Source) -> int | None:
        """The id by which the IOMMU knows a device; None: it cannot tell it from others, so there is no isolation."""

    def why_not(self, source: Source) -> str:
        """Why `requester_id` gives None."""
        return f"{self.title} has no id for it"

    def describe_id(self, requester_id: int) -> str:
        """An id for people: here that of a PCI requester."""
        return str(Bdf.of(requester_id >> 16, requester_id & 0xFFFF))

    def partition(self, source: Source) -> tuple[Hashable, str] | None:
        """What has its group in common with all devices of an equal key, and why; None: topology decides."""
        return None


def topmost(function: Function) -> Bdf:
    """The requester id of a function's DMA as the root complex sees it: the alias nearest to the root."""
    return list(dma_aliases(function))[-1].bdf


def pci_id(bdf: Bdf) -> int:
    """Segment and requester id in one number."""
    return bdf.segment << 16 | bdf.rid
