"""`Endpoint`: a device as the IOMMUs see it, and the handling of its faults."""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from vmodel import _shim
from vmodel.errors import Access, DmaFault, IommuError, Reason
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.changes import ChangeKind, Changes
from vmodel.iommu.domain import Domain, DomainType, TableDomain
from vmodel.iommu.driver import Source
from vmodel.iommu.fault import FaultRecord, PageRequest, PageResponse
from vmodel.iommu.group import Group
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.release import released, wait_for_owner
from vmodel.iommu.seconds import check_seconds
from vmodel.iommu.stale import StaleUse
from vmodel.logs import limited
from vmodel.memory import GuestMemory
from vmodel.span import Span

_failures = limited(f"{__name__}.failures")

#: Linux's drivers that leave DMA to others (driver_managed_dma): what is bound to them does none by itself.
DRIVERS_WITHOUT_DMA = frozenset(("pcieport", "pci-stub"))
#: Reasons that a page request may fix.  Any other fault would occur again at the next try.
ASKABLE = frozenset((Reason.NOT_MAPPED, Reason.PERMISSION, Reason.ACCESS_FLAG))


def _number_of(pasid: int | None) -> int:
    """The shim's number of a PASID."""
    if pasid is None:
        return _shim.NO_PASID
    if not 0 <= pasid < 1 << 20:
        raise IommuError(errno.EINVAL, f"a PASID has 20 bits, {pasid:#x} has not")
    return pasid


class Watcher(Protocol):
    """Gets what goes wrong with a device's accesses, on the thread of the access."""

    def refused(self, endpoint: Endpoint, fault: DmaFault) -> None:
        """An access failed for good, as bus mastering is off, or by the IOMMU."""

    def stale(self, endpoint: Endpoint, note: _shim.StaleNote) -> None:
        """An access was served by a cached translation that is not valid any more."""

    def mastering(self, endpoint: Endpoint, on: bool) -> None:
        """Bus mastering went on or off."""


class Endpoint:
    """A device as the IOMMUs see it.

    Attributes: `name`; `source`, the function or platform device; `iommu`, which covers it, or None; `requester_id`;
    `group` or None, and the reason `why`; `reserved` regions; `driver`, the driver that is bound, or None.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        iommu: Iommu | None,
        requester: _shim.Requester | None = None,
        reserved: Iterable[ReservedRegion] = (),
        *,
        bypass: bool = False,
        max_pasids: int | None = None,
        enforce_snoop: bool | None = None,
        changes: Changes | None = None,
        unbind_waits: float = 0.0,
    ) -> None:
        check_seconds("unbind_waits", unbind_waits)
        self.name = name
        self.source = source
        self.iommu: Iommu | None = None
        #: Whether it was added with `bypass`: it is behind no IOMMU, whatever covers it.
        self.bypasses = bypass
        self.requester_id: int | None = None
        self.group: Group | None = None
        self.why = "it bypasses the IOMMUs" if bypass else "no IOMMU covers it"
        self.reserved = list(reserved)
        #: How many PASIDs it can use: 0 without PCIe's PASID capability; None: as many as the IOMMU has.
        self.max_pasids = max_pasids
        #: Whether it has PCIe's ATS capability.
        self.has_ats = False
        #: Whether its DMA can be made to snoop; None: as its IOMMU can.
        self.enforce_snoop = enforce_snoop
        #: Whether it is behind an external port (Linux pci_dev.untrusted).
        self.untrusted = False
        #: Whether it was removed from its System.
        self.removed = False
        self.driver: object | None = None
        self.changes = changes or Changes()
        #: Seconds that `unbind` waits for the group's owner (System).
        self.unbind_waits = unbind_waits
        self._requester = requester
        self._requests = itertools.count(1)
        self._pri_failed = False
        self._watcher: Watcher | None = None
        self._bus_master = False
        if iommu is not None:
            self.cover(iommu)
        elif requester is not None:  # it may come from an earlier endpoint
            requester.on_stale = None
            requester.check_stale(False)

    def cover(self, iommu: Iommu) -> None:
        """Puts it behind an IOMMU.  It has no group yet."""
        self.iommu, self.why = iommu, ""
        self.requester_id = iommu.driver.requester_id(self.source)
        self.reserved = [*iommu.capabilities.reserved, *self.reserved]
        self._look_for_stale()

    def _look_for_stale(self) -> None:
        if self._requester is not None:
            wanted = self._watcher is not None or (self.iommu is not None and self.iommu.report_stale)
            self._requester.on_stale = self._stale if wanted else None
            self._requester.check_stale(wanted)

    @property
    def needs_direct(self) -> bool:
        """Whether it has a region that must always be mapped 1:1 (RegionType.DIRECT)."""
        return any(region.type is RegionType.DIRECT for region in self.reserved)

    @property
    def can_enforce_snoop(self) -> bool:
        """Whether its DMA can be made to snoop (Linux IOMMU_CAP_ENFORCE_CACHE_COHERENCY, which is the device's)."""
        if self.enforce_snoop is not None:
            return self.enforce_snoop
        return self.iommu is not None and self.iommu.capabilities.enforce_snoop

    def snoops(self, iova: int, pasid: int | None = None, *, no_snoop: bool = False) -> bool:
        """Whether an access snoops the CPU's caches; `no_snoop`: its request has that attribute."""
        domain = None if self.group is None else self.group.domain_of(pasid)
        return not no_snoop if domain is None else domain.snoops(iova, no_snoop=no_snoop)

    def walk_snoops(self, pasid: int | None = None) -> bool:
        """Whether accesses are translated by tables in memory, and walks of them snoop the CPU's caches."""
        domain = None if self.group is None else self.group.domain_of(pasid)
        return isinstance(domain, TableDomain) and self.iommu is not None and self.iommu.capabilities.coherent

    def attach(self, domain: Domain | None, pasid: int | None = None) -> None:
        """Attaches `domain`: accesses, or those with `pasid`, go through it from now on.

        None: without `pasid`, accesses are not translated; with `pasid`, the PASID has no domain, so they fault.
        OSError: ENOMEM no memory; a blocked domain needs none; EINVAL no PASID.  Nothing has changed then.
        """
        number = _number_of(pasid)
        if self._requester is None:
            return
        try:
            self._requester.attach(None if domain is None else domain.shim, number)
        except OSError:
            if domain is None or domain.type is not DomainType.BLOCKED:
                raise
            if pasid is None:
                self._requester.block()
            else:
                self._requester.attach(None, number)

    def block(self) -> None:
        """Takes all domains away: each access is a fault until the next `attach` without a PASID.  Cannot fail."""
        if self._requester is not None:
            self._requester.block()

    def set_ats(self, on: bool) -> None:
        """Turns PCIe ATS on or off: with it, the device caches translations itself until `invalidate`."""
        if self._requester is not None:
            self._requester.own_tlb(on)

    def invalidate(self, span: Span, pasid: int | None = None) -> None:
        """Invalidates the cached translations of `span` (IOVA) for this device, in the IOTLB and in its own TLB.

        IommuError(EINVAL): no PASID.
        """
        number = _number_of(pasid)
        if self._requester is not None:
            self._requester.flush(span.start, span.last, number)

    def chosen_by(self, memory: GuestMemory, words: Sequence[tuple[int, int]], pasid: int | None = None) -> None:
        """Names the table entries that selected the attached domain, as (GPA, value) of 8-byte words in `memory`.

        If a word has another value at an access, the access is a stale use (StaleUse).  IommuError(EINVAL): no PASID.
        """
        number = _number_of(pasid)
        if self._requester is not None:
            self._requester.chosen_by(memory.shim, words, number)

    def _stale(self, notes: list[_shim.StaleNote]) -> None:
        iommu, watcher = self.iommu, self._watcher
        for note in notes:
            if iommu is not None and iommu.report_stale:
                iommu.stale(StaleUse(iommu.name, self.name, self.requester_id or 0, note))
            if watcher is not None:
                watcher.stale(self, note)

    # ---- being watched ---------------------------------------------------------------------

    @property
    def has_requester(self) -> bool:
        """Whether it makes accesses: a bridge, and a device of another process, does not."""
        return self._requester is not None

    @property
    def bus_master(self) -> bool:
        """Whether bus mastering is on; `Dma` sets it."""
        return self._bus_master

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        was, self._bus_master = self._bus_master, on
        if was != on and (watcher := self._watcher) is not None:
            watcher.mastering(self, on)

    def watch(self, watcher: Watcher, ledger: _shim.Ledger, who: int) -> None:
        """Records in `ledger`, as `who`, what is mapped for it and what it uses; reports what goes wrong to `watcher`.

        Uses of stale translations are looked for, whatever the IOMMU's `report_stale`.
        """
        if self._requester is None:
            raise ValueError(f"{self.name} makes no accesses")
        self._watcher = watcher
        self._look_for_stale()
        ledger.follow(self._requester, who, notified=self.iommu is not None and self.iommu.reports_maps)

    def unwatch(self, watcher: Watcher) -> None:
        """Ends `watch`, unless another one began after it."""
        if self._watcher is watcher and self._requester is not None:
            _shim.Ledger.leave(self._requester)
            self._watcher = None
            self._look_for_stale()

    def incident(self, kind: _shim.IncidentKind, iova: int, access: Access, pasid: int | None) -> None:
        """Notes an access that was refused, or should have been, in the ledger that it is watched by, if it is."""
        if self._requester is not None and self._watcher is not None:
            with contextlib.suppress(FileNotFoundError):  # it is not watched any more
                _shim.Ledger.incident(self._requester, kind, iova, access, _number_of(pasid))

    @property
    def bound_without_dma(self) -> bool:
        """Whether its driver does no DMA by itself, and may be bound beside an owner (driver_managed_dma)."""
        return self.driver in DRIVERS_WITHOUT_DMA

    def uses_default_domain(self, owner: object = None) -> bool:
        """Whether a driver other than `owner` is bound that does DMA by the kernel's default domain."""
        return self.driver is not None and self.driver != owner and not self.bound_without_dma

    def bind(self, driver: object) -> None:
        """Binds a driver.

        IommuError: ENODEV the device was removed; EBUSY another driver is bound, or the group has another owner or a
        domain of a user's.  (Linux __driver_probe_device, really_probe, iommu_device_use_default_domain)
        """
        self._check_free(driver)
        if self.driver is None:
            self.changes.notify(ChangeKind.BIND_DRIVER, self, self.group, driver)
            with self.changes:
                self._check_free(driver)  # subscribers may have changed it
                self.driver = driver
                self.changes.notify(ChangeKind.BOUND_DRIVER, self, self.group, driver)

    def _check_free(self, driver: object) -> None:
        with self.changes:
            if self.removed:
                raise IommuError(errno.ENODEV, f"{self.name} was removed")
            if self.driver is not None and self.driver != driver:
                raise IommuError(errno.EBUSY, f"{self.name} is in use by {self.driver}")
            group = None if driver in DRIVERS_WITHOUT_DMA else self.group
            why = None
            if group is not None and group.owner is not None and group.owner != driver:
                why = f"{self.name}: {group} is owned by {group.owner}"
            elif group is not None and group.owner is None and group.in_use:
                why = f"{self.name}: {group} has a domain that is not the kernel's"
            if why is not None:
                self.changes.notify(ChangeKind.DRIVER_NOT_BOUND, self, self.group, driver)
                raise IommuError(errno.EBUSY, why)

    def unbind(self) -> None:
        """Unbinds the driver; with System(unbind_waits=...) when the owner of the group has released it.

        IommuError(EBUSY): the group still has an owner after that time; the driver stays bound.
        """
        if self.driver is not None:
            wait_for_owner(self)
            self.changes.notify(ChangeKind.UNBIND_DRIVER, self, self.group, self.driver)
        with released(self):
            if (driver := self.driver) is not None:  # subscribers may have unbound it
                self.driver = None
                self.changes.notify(ChangeKind.UNBOUND_DRIVER, self, self.group, driver)

    # ---- faults ----------------------------------------------------------------------------

    def faulted(self, fault: DmaFault, *, ask: bool = True) -> bool:
        """Handles a failed access: with `ask`, makes a page request if possible; else records the fault.

        Returns whether the access is to be tried again.
        """
        resolved = self._resolved(fault, ask)
        if not resolved and (watcher := self._watcher) is not None:
            watcher.refused(self, fault)
        return resolved

    def _resolved(self, fault: DmaFault, ask: bool) -> bool:
        iommu, group = self.iommu, self.group
        if iommu is None or fault.reason is Reason.BUS_MASTER_OFF:  # the access reached no IOMMU
            return False
        if group is not None and ask and self._resolve(iommu, fault):
            return True
        domain = iommu.blocked if group is None else group.domain_of(fault.pasid)
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
                None if group is None else group.number,
            )
        )
        return False

    def _resolve(self, iommu: Iommu, fault: DmaFault) -> bool:
        if iommu.resolver is None:
            return False
        try:
            return iommu.resolver(self, fault)
        except Exception:
            _failures.exception("%s: finding the domain of %s failed", iommu.name, self.name)
            return False

    def _ask(self, domain: Domain, fault: DmaFault) -> bool:
        assert self.iommu is not None
        handler = domain.page_handler
        if handler is None or self._pri_failed or fault.reason not in ASKABLE or not self.iommu.capabilities.can_wait:
            return False
        request = PageRequest(self.name, fault.pasid, fault.iova, fault.access, next(self._requests))
        try:
            response = handler(request)
        except Exception:
            _failures.exception("%s: the page handler failed", self.name)
            response = PageResponse.FAILURE
        if response is PageResponse.FAILURE:
            self._pri_failed = True  # PCIe 10.4.1: no more requests until they are enabled again
        return response is PageResponse.SUCCESS

    def enable_page_requests(self) -> None:
        """Enables page requests again after a FAILURE."""
        self._pri_failed = False

    def __repr__(self) -> str:
        return f"<endpoint {self.name}, {self.source}>"
