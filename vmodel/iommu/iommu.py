"""`Iommu`: one IOMMU of a machine, and `Coverage`, the devices that it covers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel import _shim
from vmodel.errors import DmaFault
from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.domain import DEFAULT_TYPES, BlockedDomain, DomainType, IdentityDomain
from vmodel.iommu.driver import Driver, PlatformDevice, Source
from vmodel.iommu.fault import FaultQueue, FaultRecord
from vmodel.iommu.stale import StaleUse
from vmodel.logs import Warnings, limited
from vmodel.pci.topology import Bdf

if TYPE_CHECKING:
    from vmodel.iommu.endpoint import Endpoint

log = logging.getLogger(__name__)
_failures = limited(f"{__name__}.failures")


@dataclass(frozen=True)
class Coverage:
    """The devices that an IOMMU covers: the PCI functions from `first` to `last`, or platform devices by name."""

    first: Bdf | None = None
    last: Bdf | None = None
    names: frozenset[str] = frozenset()

    @classmethod
    def pci(cls, first: Bdf, last: Bdf) -> Coverage:
        """All functions with addresses from `first` to `last`, inclusive.

        ValueError: they are in two segments, or `first` is after `last`.
        """
        if first.segment != last.segment or first > last:
            raise ValueError(f"{first} to {last} is not a range of one segment")
        return cls(first, last)

    @classmethod
    def segment(cls, number: int) -> Coverage:
        """A whole PCI segment."""
        return cls.pci(Bdf(number, 0, 0, 0), Bdf(number, 255, 31, 7))

    @classmethod
    def platform(cls, *names: str) -> Coverage:
        """Platform devices, by name."""
        return cls(names=frozenset(names))

    def __contains__(self, source: Source) -> bool:
        if isinstance(source, PlatformDevice):
            return source.name in self.names
        return self.first is not None and self.last is not None and self.first <= source.bdf <= self.last


class Iommu:
    """One IOMMU: a kind, capabilities, what it covers, and its queue of faults.

    ValueError: the kind cannot have such capabilities.
    """

    def __init__(
        self,
        name: str,
        driver: Driver,
        covers: Iterable[Coverage],
        capabilities: Capabilities | None = None,
        *,
        default: DomainType | None = None,
    ) -> None:
        """`default`: the type of the default domains of its groups, IDENTITY, DMA or DMA_FQ; None: System's.

        ValueError: another type.
        """
        if default is not None and default not in DEFAULT_TYPES:
            raise ValueError(f"{default.value} is no type of default domains")
        self.name = name
        self.driver = driver
        self.covers = list(covers)
        self.capabilities = driver.fit(capabilities or driver.default)
        self.faults = FaultQueue(self.capabilities.fault_queue_depth)
        #: Memory for the mappings of all domains that are made for it.
        self.budget = _shim.Budget(self.capabilities.max_memory)
        #: The domain of a group without another one, and the domain that bypasses translation.
        self.blocked = BlockedDomain()
        self.identity = IdentityDomain()
        self.default = default
        #: Called first when an access fails, on the access's thread; True: the access is tried again.  An IOMMU that a
        #: guest drives reads its device table here, as hardware does at the first request of a device.
        self.resolver: Callable[[Endpoint, DmaFault], bool] | None = None
        self._handlers: list[Callable[[FaultRecord], None]] = []
        #: Whether uses of stale translations are counted and logged.
        self.report_stale = bool(getattr(driver.params, "report_stale", False))
        #: Whether a guest that keeps tables invalidates what it maps, too, and not only what it unmaps (VT-d's CAP.CM).
        self.reports_maps = bool(getattr(driver.params, "caching_mode", False))
        self._fault_lines = Warnings(log, self.name, "faults")
        self._stale_lines = Warnings(log, self.name, "stale uses")

    @property
    def cache_coherency(self) -> bool:
        """Whether it can make DMA coherent with the CPU's caches (Linux IOMMU_CAP_CACHE_COHERENCY)."""
        return self.driver.cache_coherency(self.capabilities)

    def on_fault(self, handler: Callable[[FaultRecord], None]) -> Callable[[], None]:
        """Calls `handler` with each record, on the thread of the access.  The function that it returns removes it."""
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    def record(self, record: FaultRecord) -> None:
        """Adds a fault to the queue, writes it to the log (at most 10 lines in 5 s), and calls the handlers."""
        self.faults.put(record)
        self._fault_lines.put(record)
        for handler in list(self._handlers):
            try:
                handler(record)
            except Exception:
                _failures.exception("%s: a fault handler failed", self.name)

    def stale(self, use: StaleUse) -> None:
        """Writes a stale use to the log (at most 10 lines in 5 s)."""
        self._stale_lines.put(use)

    def __contains__(self, source: Source) -> bool:
        return any(source in part for part in self.covers)

    def __repr__(self) -> str:
        return f"<{self.driver.title} {self.name}>"
