"""`Endpoint`: a device as the IOMMUs see it, its faults included."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterable, Sequence

from vmodel import _shim
from vmodel.errors import DmaFault, IommuError, Reason
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import Domain
from vmodel.iommu.driver import Source
from vmodel.iommu.fault import FaultRecord, PageRequest, PageResponse
from vmodel.iommu.group import Group
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.stale import StaleUse
from vmodel.logs import limited
from vmodel.memory import GuestMemory
from vmodel.span import Span

_failures = limited(f"{__name__}.failures")

#: Reasons that a page request may mend: the others will be the same at the next try.
_ASKABLE = frozenset((Reason.NOT_MAPPED, Reason.PERMISSION, Reason.ACCESS_FLAG))


class Endpoint:
    """A device as the IOMMUs see it.

    Attributes: `name`; `source`, the function or platform device; `iommu` that covers it, or None; `requester_id`;
    `group`, or None, and `why`; `reserved` regions; `driver`, who uses it, None: nobody.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        iommu: Iommu | None,
        requester: _shim.Requester | None = None,
        reserved: Iterable[ReservedRegion] = (),
    ) -> None:
        self.name = name
        self.source = source
        self.iommu = iommu
        self.requester_id = None if iommu is None else iommu.driver.requester_id(source)
        self.group: Group | None = None
        self.why = "" if iommu is not None else "no IOMMU covers it"
        self.reserved = [*(iommu.capabilities.reserved if iommu is not None else ()), *reserved]
        self.driver: object | None = None
        self._requester = requester
        self._requests = itertools.count(1)
        self._pri_failed = False
        if requester is not None:
            watched = iommu is not None and iommu.report_stale
            requester.on_stale = self._stale if watched else None
            requester.check_stale(watched)

    @property
    def needs_direct(self) -> bool:
        """Whether a region of it must stay mapped 1:1, come what may."""
        return any(region.type is RegionType.DIRECT for region in self.reserved)

    def show(self, domain: Domain | None, pasid: int | None = None) -> None:
        """Its accesses go through `domain` from now on; None: nothing is between it and memory, or no such PASID."""
        if self._requester is not None:
            shim = None if domain is None else domain.shim
            self._requester.attach(shim, _shim.NO_PASID if pasid is None else pasid)

    def has_tlb(self, on: bool) -> None:
        """Whether it keeps translations itself (PCIe ATS), until `forget`."""
        if self._requester is not None:
            self._requester.own_tlb(on)

    def forget(self, span: Span, pasid: int | None = None) -> None:
        """Takes IOVAs of what it keeps, whoever's TLB that is."""
        if self._requester is not None:
            self._requester.flush(span.start, span.last, _shim.NO_PASID if pasid is None else pasid)

    def chosen_by(self, memory: GuestMemory, words: Sequence[tuple[int, int]], pasid: int | None = None) -> None:
        """What it has been shown was chosen by these (GPA, word) of `memory`: if they change, its use is stale."""
        if self._requester is not None:
            self._requester.chosen_by(memory.shim, words, _shim.NO_PASID if pasid is None else pasid)

    def _stale(self, notes: list[_shim.StaleNote]) -> None:
        if (iommu := self.iommu) is not None:
            for note in notes:
                iommu.stale(StaleUse(iommu.name, self.name, self.requester_id or 0, note))

    def use(self, driver: object) -> None:
        """A driver binds.  IommuError(EBUSY): another has it, or its group is owned or attached by somebody else."""
        if self.driver is not None and self.driver != driver:
            raise IommuError(errno.EBUSY, f"{self.name} is in use by {self.driver}")
        group = self.group
        if group is not None and group.owner is not None and group.owner != driver:
            raise IommuError(errno.EBUSY, f"{self.name}: {group} is owned by {group.owner}")
        if group is not None and group.owner is None and group.in_use:
            raise IommuError(errno.EBUSY, f"{self.name}: {group} has a domain that is not the kernel's")
        self.driver = driver

    def unuse(self) -> None:
        """Its driver unbinds."""
        self.driver = None

    # ---- faults ----------------------------------------------------------------------------

    def faulted(self, fault: DmaFault, *, ask: bool = True) -> bool:
        """An access has failed: asks for the page (with `ask`) where that is possible; else records it.

        The result says whether to try again.
        """
        iommu, group = self.iommu, self.group
        if iommu is None or group is None or fault.reason is Reason.BUS_MASTER_OFF:  # it never got there
            return False
        if ask and iommu.resolver is not None and iommu.resolver(self, fault):
            return True
        domain = group.domain_of(fault.pasid)
        if ask and domain is not None and self._ask(domain, fault):
            return True
        iommu.record(
            FaultRecord(
                time.monotonic_ns(),
                iommu.name,
                self.name,
                self.requester_id or 0,
                fault.pasid,
                fault.iova,
                fault.access,
                fault.reason,
                fault.level,
                fault.stage,
                "no" if domain is None else domain.type.value,
                group.number,
            )
        )
        return False

    def _ask(self, domain: Domain, fault: DmaFault) -> bool:
        assert self.iommu is not None
        handler = domain.page_handler
        if handler is None or self._pri_failed or fault.reason not in _ASKABLE or not self.iommu.capabilities.can_wait:
            return False
        request = PageRequest(self.name, fault.pasid, fault.iova, fault.access, next(self._requests))
        try:
            response = handler(request)
        except Exception:
            _failures.exception("%s: the page handler failed", self.name)
            response = PageResponse.FAILURE
        if response is PageResponse.FAILURE:
            self._pri_failed = True  # as PCIe 10.4.1 has it: no more requests until it is enabled anew
        return response is PageResponse.SUCCESS

    def enable_page_requests(self) -> None:
        """After a FAILURE: requests are asked about again."""
        self._pri_failed = False

    def __repr__(self) -> str:
        return f"<endpoint {self.name}, {self.source}>"
