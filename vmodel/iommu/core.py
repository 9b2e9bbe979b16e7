"""`System`: all IOMMUs of a machine, what they cover, and the groups that follow."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vmodel import _shim
from vmodel.errors import DmaFault, IommuError, Reason
from vmodel.iommu.capabilities import Capabilities, RegionType, ReservedRegion
from vmodel.iommu.domain import (
    CPU_FORMATS,
    AllocFlags,
    BlockedDomain,
    Domain,
    DomainType,
    IdentityDomain,
    PagingDomain,
    TableDomain,
)
from vmodel.iommu.driver import Driver, PlatformDevice, Source
from vmodel.iommu.fault import FaultQueue, FaultRecord, PageRequest, PageResponse
from vmodel.iommu.group import Group
from vmodel.iommu.grouping import find_group
from vmodel.iommu.pgtable import Table
from vmodel.iommu.stale import StaleUse
from vmodel.logs import RateLimit, limited
from vmodel.memory import GuestMemory
from vmodel.pci.topology import Bdf, Function, Topology
from vmodel.span import Span

log = logging.getLogger(__name__)
_failures = limited(f"{__name__}.failures")

#: Reasons that a page request may mend: the others will be the same at the next try.
_ASKABLE = frozenset((Reason.NOT_MAPPED, Reason.PERMISSION, Reason.ACCESS_FLAG))


@dataclass(frozen=True)
class Coverage:
    """What an IOMMU covers: PCI functions from `first` to `last` of one segment, or platform devices by name."""

    first: Bdf | None = None
    last: Bdf | None = None
    names: frozenset[str] = frozenset()

    @classmethod
    def pci(cls, first: Bdf, last: Bdf) -> Coverage:
        """All functions with addresses from `first` to `last`.  ValueError: two segments, or backwards."""
        if first.segment != last.segment or first > last:
            raise ValueError(f"{first} to {last} is no range of one segment")
        return cls(first, last)

    @classmethod
    def segment(cls, number: int) -> Coverage:
        """A whole PCI segment."""
        return cls.pci(Bdf(number, 0, 0, 0), Bdf(number, 255, 31, 7))

    @classmethod
    def platform(cls, *names: str) -> Coverage:
        """Devices that are not PCI."""
        return cls(names=frozenset(names))

    def __contains__(self, source: Source) -> bool:
        if isinstance(source, PlatformDevice):
            return source.name in self.names
        return self.first is not None and self.last is not None and self.first <= source.bdf <= self.last


class Iommu:
    """One IOMMU: a kind, capabilities, what it covers, and its queue of faults."""

    def __init__(
        self,
        name: str,
        driver: Driver,
        covers: Iterable[Coverage],
        capabilities: Capabilities | None = None,
    ) -> None:
        self.name = name
        self.driver = driver
        self.covers = list(covers)
        self.capabilities = capabilities or driver.default
        self.faults = FaultQueue(self.capabilities.fault_queue_depth)
        #: Memory for the mappings of all domains that are made for it.
        self.budget = _shim.Budget(self.capabilities.max_memory)
        #: What a group without a domain is attached to, and the way round the IOMMU.
        self.blocked = BlockedDomain()
        self.identity = IdentityDomain()
        #: Asked first when an access fails, on its thread: whether it is worth another try now.  An IOMMU that a guest
        #: drives reads its table of devices here, as hardware does at the first request of a device.
        self.resolver: Callable[[Endpoint, DmaFault], bool] | None = None
        self._handlers: list[Callable[[FaultRecord], None]] = []
        #: Whether uses of stale translations are counted and logged.
        self.report_stale = bool(getattr(driver.params, "report_stale", False))
        self._log_limit, self._stale_limit = RateLimit(10, 5.0), RateLimit(10, 5.0)

    def on_fault(self, handler: Callable[[FaultRecord], None]) -> Callable[[], None]:
        """Calls `handler` with each record, on the thread of the access; the result takes it back."""
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    def record(self, record: FaultRecord) -> None:
        """Puts a fault into the queue, the log (10 lines in 5 s) and before the handlers."""
        self.faults.put(record)
        passed, held = self._log_limit()
        if held:
            log.warning("%s: %d more faults were not logged", self.name, held)
        if passed:
            log.warning("%s", record)
        for handler in list(self._handlers):
            try:
                handler(record)
            except Exception:
                _failures.exception("%s: a fault handler failed", self.name)

    def stale(self, use: StaleUse) -> None:
        """Puts a stale use into the log (10 lines in 5 s)."""
        passed, held = self._stale_limit()
        if held:
            log.warning("%s: %d more stale uses were not logged", self.name, held)
        if passed:
            log.warning("%s", use)

    def __contains__(self, source: Source) -> bool:
        return any(source in part for part in self.covers)

    def __repr__(self) -> str:
        return f"<{self.driver.title} {self.name}>"


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


class System:
    """The IOMMUs, endpoints and groups of one machine.

    `group_mf`: all functions of a device are one group (virtual functions never are).
    """

    def __init__(self, topology: Topology | None = None, *, group_mf: bool = False) -> None:
        self.topology = topology or Topology()
        self.group_mf = group_mf
        self.iommus: list[Iommu] = []
        self.endpoints: list[Endpoint] = []
        self.groups: list[Group] = []
        self._lock = threading.RLock()
        self._numbers = itertools.count()

    def add_iommu(self, iommu: Iommu) -> Iommu:
        """IOMMUs come before the devices that they cover.  IommuError(EEXIST): the name is taken."""
        with self._lock:
            if any(other.name == iommu.name for other in self.iommus):
                raise IommuError(errno.EEXIST, f"there is an IOMMU {iommu.name!r} already")
            self.iommus.append(iommu)
        return iommu

    def add(
        self,
        source: Source,
        requester: _shim.Requester | None = None,
        *,
        name: str = "",
        iommu: Iommu | None = None,
        bypass: bool = False,
        reserved: Iterable[ReservedRegion] = (),
    ) -> Endpoint:
        """A device comes, at the start or hot-plugged, and is attached to its group's domain before its first DMA.

        `iommu`: that one rather than the first that covers it; `bypass`: none.  Without a group it is not translated.
        IommuError: EEXIST it is there already; EINVAL its group has a domain that does not fit it.
        """
        with self._lock:
            if any(e.source == source for e in self.endpoints):
                raise IommuError(errno.EEXIST, f"{source} is there already")
            if iommu is None and not bypass:
                iommu = next((candidate for candidate in self.iommus if source in candidate), None)
            endpoint = Endpoint(name or getattr(source, "name", ""), source, iommu, requester, reserved)
            if iommu is not None:
                found = find_group(self, endpoint)
                endpoint.why = found.why
                if found.isolated:
                    group = found.group or Group(iommu, next(self._numbers), iommu.identity, self._lock)
                    group.join(endpoint)
                    if found.group is None:
                        self.groups.append(group)
            if endpoint.group is None:
                endpoint.show(None)  # it may have been here before, behind an IOMMU
            self.endpoints.append(endpoint)
            return endpoint

    def remove(self, endpoint: Endpoint) -> None:
        """A device goes.  It is detached; its group goes with its last member.  ValueError: it is not there."""
        with self._lock:
            self.endpoints.remove(endpoint)
            group = endpoint.group
            if group is not None:
                group.leave(endpoint)
                if not group.endpoints:
                    self.groups.remove(group)

    def __getitem__(self, name: str) -> Endpoint:
        for endpoint in self.endpoints:
            if endpoint.name == name:
                return endpoint
        raise KeyError(name)

    def settle(self) -> Iterator[Endpoint]:
        """Endpoints in the order in which a guest enumerates them; those that are not PCI last."""
        order = {function: n for n, function in enumerate(self.topology.functions())}
        yield from sorted(
            self.endpoints,
            key=lambda e: (order.get(e.source, len(order)) if isinstance(e.source, Function) else len(order), e.name),
        )

    def close(self) -> None:
        """Flushes what deferred domains hold back; their timers end."""
        for domain in {d for g in self.groups for d in (g.domain, g.default_domain, *g.pasids.values())}:
            if isinstance(domain, PagingDomain):
                with contextlib.suppress(IommuError):
                    domain.flush()


# ---- allocation ------------------------------------------------------------------------------------


def _iommu_of(endpoint: Endpoint) -> Iommu:
    if endpoint.iommu is None or endpoint.group is None:
        raise IommuError(errno.ENODEV, f"{endpoint.name} has no group: {endpoint.why}")
    return endpoint.iommu


def paging_domain_alloc(endpoint: Endpoint, flags: AllocFlags = AllocFlags.NONE) -> PagingDomain:
    """A user-managed domain for a device (Linux iommu_paging_domain_alloc_flags).

    IommuError: ENODEV the device has no group; EOPNOTSUPP its IOMMU cannot do what `flags` ask.
    """
    iommu = _iommu_of(endpoint)
    can = iommu.capabilities
    for flag, ability in (
        (AllocFlags.NEST_PARENT, can.nesting),
        (AllocFlags.DIRTY_TRACKING, can.dirty_tracking),
        (AllocFlags.PASID, can.pasid_bits > 0),
        (AllocFlags.ENFORCE_SNOOP, can.enforce_snoop),
    ):
        if flag in flags and not ability:
            raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} cannot do {flag.name}")
    return PagingDomain(DomainType.UNMANAGED, iommu, flags)


def dma_domain_alloc(endpoint: Endpoint) -> PagingDomain:
    """A kernel-managed domain for a device: deferred unless its IOMMU is strict.  IommuError(ENODEV)."""
    iommu = _iommu_of(endpoint)
    flags = AllocFlags.DIRTY_TRACKING if iommu.capabilities.dirty_tracking else AllocFlags.NONE
    return PagingDomain(DomainType.DMA if iommu.capabilities.strict else DomainType.DMA_FQ, iommu, flags)


def nested_domain_alloc(endpoint: Endpoint, parent: PagingDomain, memory: GuestMemory, table: Table) -> TableDomain:
    """A user's stage 1 over `parent`; tables are read from `memory`, where the parent leads.

    IommuError: ENODEV no group; EOPNOTSUPP no nesting, or not in this format; EINVAL `parent` was not allocated for it,
    or the table cannot be.
    """
    iommu = _iommu_of(endpoint)
    if not iommu.capabilities.nesting or table.format not in iommu.driver.nested_formats:
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} does not nest {table.format.name} tables")
    if not parent.nests:
        raise IommuError(errno.EINVAL, f"{parent.name} was not allocated as a parent")
    return TableDomain(DomainType.NESTED, iommu, memory, table, parent)


def sva_domain_alloc(endpoint: Endpoint, memory: GuestMemory, table: Table) -> TableDomain:
    """A process's page table, for a PASID (Linux iommu_sva_bind_device).

    IommuError: ENODEV no group; EOPNOTSUPP no PASIDs, no page requests, not coherent, or not in this format; EINVAL the
    table cannot be.
    """
    iommu = _iommu_of(endpoint)
    can = iommu.capabilities
    if (
        not can.pasid_bits
        or not can.can_wait
        or not can.coherent
        or table.format not in CPU_FORMATS & iommu.driver.formats
    ):
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} cannot share {table.format.name} tables of processes")
    return TableDomain(DomainType.SVA, iommu, memory, table)


def walked_domain_alloc(
    endpoint: Endpoint, memory: GuestMemory, table: Table, parent: TableDomain | None = None
) -> TableDomain:
    """A domain by tables that the guest keeps for this device: what an emulated IOMMU's registers point to.

    With `parent` a stage 1 over that.  IommuError: ENODEV no group; EOPNOTSUPP its IOMMU does not walk this format
    there; EINVAL the table cannot be.
    """
    iommu = _iommu_of(endpoint)
    if table.format not in (iommu.driver.formats if parent is None else iommu.driver.nested_formats):
        raise IommuError(errno.EOPNOTSUPP, f"{iommu.name} does not walk {table.format.name} tables")
    return TableDomain(DomainType.DMA if parent is None else DomainType.NESTED, iommu, memory, table, parent)
