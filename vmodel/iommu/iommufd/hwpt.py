"""`Hwpt`: a hardware page table (Linux drivers/iommu/iommufd/hw_pagetable.c)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmodel.errors import IommuError
from vmodel.iommu.domain import Domain, PagingDomain, TableDomain
from vmodel.iommu.endpoint import ASKABLE
from vmodel.iommu.fault import FaultRecord, PageRequest, PageResponse
from vmodel.iommu.group import Group
from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.iommufd.fault_object import FaultObject
from vmodel.iommu.iommufd.invalidate import InvalidationError, VtdS1Invalidate, invalidate_vtd, run
from vmodel.iommu.iommufd.ioas import Ioas
from vmodel.iommu.iommufd.nested import Stage1
from vmodel.iommu.locking import locked
from vmodel.span import PAGE, Span

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.viommu import Viommu


class Hwpt(Object):
    """A hardware page table: a paging domain with the mappings of an IOAS, or a domain nested in such a one.

    `Device.hwpt_alloc` makes it, or `Device.attach` for an IOAS (`auto`: its last device destroys it).
    """

    def __init__(
        self,
        context: Context,
        domain: Domain,
        parent: Ioas | Hwpt,
        fault: FaultObject | None = None,
        *,
        auto: bool = False,
        for_pasids: bool = False,
        stage1: Stage1 | None = None,
        viommu: Viommu | None = None,
    ) -> None:
        super().__init__(context)
        #: If it is nested, what the user's data say, and the vIOMMU that it was allocated from.
        self.stage1 = stage1
        self.viommu = viommu
        self.domain = domain
        self.parent = parent
        self.fault = fault
        self.auto = auto
        #: Whether it may be attached to PASIDs, and to a group that has HWPTs for PASIDs.
        self.for_pasids = for_pasids
        try:
            if isinstance(parent, Ioas):
                parent.add_hwpt(self)
            elif viommu is not None:
                viommu.users += 1
                viommu.hwpts.append(self)
            else:
                parent.users += 1
        except IommuError:
            context.unregister(self)
            raise
        if fault is not None:
            try:
                fault.check(context)  # after all else, as Linux's iommufd_hwpt_alloc
            except IommuError:
                self.fault = None
                self.release()
                context.unregister(self)
                raise
            fault.users += 1
            domain.page_handler = self._ask

    @property
    def paging(self) -> PagingDomain:
        """The domain with the mappings: its own, or its parent's."""
        if isinstance(self.parent, Hwpt):
            return self.parent.paging
        assert isinstance(self.domain, PagingDomain)
        return self.domain

    @property
    def nested(self) -> bool:
        """Whether a user's tables are over a parent."""
        return isinstance(self.parent, Hwpt)

    @property
    def ioas(self) -> Ioas:
        """The IOAS whose mappings it has."""
        return self.parent if isinstance(self.parent, Ioas) else self.parent.ioas

    def _ask(self, request: PageRequest) -> PageResponse:
        assert self.fault is not None
        return self.fault.handle(request, lambda: self._has(request))

    def _has(self, request: PageRequest) -> bool:
        """Whether the device of a page request still has this HWPT."""
        groups = {device.group for device in list(self.context.devices)}
        found = [group for group in groups if any(e.name == request.requester for e in group.endpoints)]
        domains = [group.domain_of(request.pasid) for group in found]
        return any(domain is not None and domain.page_handler == self._ask for domain in domains)

    def release(self) -> None:
        if isinstance(self.parent, Ioas):
            self.parent.remove_hwpt(self)
        elif self.viommu is not None:
            self.viommu.users -= 1
            self.viommu.hwpts.remove(self)
        else:
            self.parent.users -= 1
        if self.fault is not None:
            self.fault.users -= 1

    @locked
    def set_dirty_tracking(self, on: bool) -> None:
        """IOMMU_HWPT_SET_DIRTY_TRACKING: on, with an empty log, also if it was on already; or off.

        IommuError: ENOENT nested; EOPNOTSUPP allocated without DIRTY_TRACKING.  (Linux iopt_set_dirty_tracking)
        """
        domain = self._own()
        if on and domain.tracking:
            domain.set_dirty_tracking(False)
        domain.set_dirty_tracking(on)

    @locked
    def get_dirty_bitmap(self, span: Span, page_size: int = PAGE, *, clear: bool = True) -> bytes:
        """IOMMU_HWPT_GET_DIRTY_BITMAP, as PagingDomain.read_dirty.

        IommuError: ENOENT nested; EINVAL not whole pages, a part of `span` is not mapped, or tracking is off;
        EOPNOTSUPP allocated without DIRTY_TRACKING.
        """
        domain = self._own()
        if not domain.tracks:
            raise IommuError(errno.EOPNOTSUPP, f"{self} was allocated without dirty tracking")
        if (span.start | span.size) & (self.ioas.alignment - 1):  # iommufd_check_iova_range
            raise IommuError(errno.EINVAL, f"{self}: {span} is not aligned to {self.ioas.alignment:#x}")
        self.ioas.check_mapped(span)
        return domain.read_dirty(span, page_size, clear=clear)

    def _own(self) -> PagingDomain:
        self.check()
        if self.nested:
            raise IommuError(errno.ENOENT, f"{self} is nested: its parent tracks writes")
        return self.paging

    # ---- nested ----------------------------------------------------------------------------

    def prepare(self, group: Group, pasid: int | None) -> None:
        """Before a group is attached: what Linux's drivers check; reads the user's tables if nobody uses it.

        IommuError: EINVAL the IOMMU cannot use the data, or is not that of the vIOMMU; ENOENT as Viommu.virt_ids.
        """
        if self.stage1 is None:
            return
        if self.stage1.unfit is not None:
            raise IommuError(errno.EINVAL, f"{self}: {self.stage1.unfit}")
        if self.viommu is not None:
            made_for = self.viommu.iommu
            own = group.iommu.driver.own_tables or group.iommu.driver.kind != made_for.driver.kind
            if own and group.iommu is not made_for:
                raise IommuError(errno.EINVAL, f"{self} is for {made_for.name}, not {group.iommu.name}")
            if pasid is None:
                self.viommu.virt_ids(self, group)
        if not self.users:
            self.reload()

    def reload(self) -> None:
        """Reads what the user's data points to again, and attaches the groups to the domain that results."""
        if self.stage1 is None:
            return
        if self.viommu is not None:
            self.viommu.drop_pasids(self)
        domain = self.stage1.read()
        self._set_handler(domain)
        for (group, pasid), hwpt in self.context.attached.items():
            if hwpt is self and pasid is None:
                group.replace(domain)
            elif hwpt is self and pasid is not None:
                group.replace_pasid(domain, pasid)
        self.domain = domain

    def _set_handler(self, domain: Domain) -> None:
        if self.fault is not None and isinstance(domain, TableDomain):
            domain.page_handler = self._ask

    def asks(self, record: FaultRecord) -> bool:
        """Whether a fault was a page request first."""
        return self.fault is not None and record.reason in ASKABLE

    def domain_of(self, pasid: int) -> Domain | None:
        """The domain of accesses with a PASID, by the user's data; None: they have none."""
        domain = None if self.stage1 is None else self.stage1.read_pasid(pasid)
        if domain is not None:
            self._set_handler(domain)
        return domain

    def attached(self, group: Group) -> None:
        """A group is attached to it, without a PASID."""
        if self.viommu is not None:
            self.viommu.attached(self, group)

    def detached(self, group: Group) -> None:
        """A group is not attached to it any more."""
        if self.viommu is not None:
            self.viommu.detached(self, group)

    def invalidate(self, what: Span | Sequence[VtdS1Invalidate] | None = None) -> int:
        """IOMMU_HWPT_INVALIDATE: flushes stage 1: all, a span (IOVA), or as entries say; returns how many were done.

        InvalidationError, an IommuError with the number `done` before the one that is refused: EINVAL it is not nested,
        too many, or as invalidate_vtd; EOPNOTSUPP a flag, or a HWPT of a vIOMMU (see Viommu.invalidate); ENOENT it was
        destroyed, maybe meanwhile.  Other threads' calls come in between entries, if there are many.
        """
        if isinstance(what, Span):
            first, last = what.start // PAGE, what.last // PAGE
            what = [VtdS1Invalidate(first * PAGE, last - first + 1)]
        entries = [VtdS1Invalidate()] if what is None else what
        if self.context.find(self.id) is self and not self.nested:
            raise InvalidationError(errno.EINVAL, f"{self} is not nested")
        kind = VtdS1Invalidate if isinstance(self.domain, TableDomain) and self.viommu is None else None
        return run(self, entries, kind, self._invalidate_one)

    def _invalidate_one(self, entry: VtdS1Invalidate) -> None:
        assert isinstance(self.domain, TableDomain)
        invalidate_vtd(self.domain, entry)
