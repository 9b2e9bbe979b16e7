"""`Hwpt`: a hardware page table (Linux drivers/iommu/iommufd/hw_pagetable.c)."""

from __future__ import annotations

import errno

from vmodel.errors import IommuError
from vmodel.iommu.domain import Domain, PagingDomain, TableDomain
from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.iommufd.fault_object import FaultObject
from vmodel.iommu.iommufd.ioas import Ioas
from vmodel.iommu.locking import locked
from vmodel.span import PAGE, Span


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
    ) -> None:
        super().__init__(context)
        self.domain = domain
        self.parent = parent
        self.fault = fault
        self.auto = auto
        #: Whether it may be attached to PASIDs, and to a group that has HWPTs for PASIDs.
        self.for_pasids = for_pasids
        try:
            if isinstance(parent, Ioas):
                parent.add_hwpt(self)
            else:
                parent.users += 1
        except IommuError:
            context.unregister(self)
            raise
        if fault is not None:
            fault.users += 1
            domain.page_handler = fault.handle

    @property
    def paging(self) -> PagingDomain:
        """The domain with the mappings: its own, or its parent's."""
        if isinstance(self.domain, PagingDomain):
            return self.domain
        assert isinstance(self.parent, Hwpt)
        return self.parent.paging

    @property
    def ioas(self) -> Ioas:
        """The IOAS whose mappings it has."""
        return self.parent if isinstance(self.parent, Ioas) else self.parent.ioas

    def release(self) -> None:
        if isinstance(self.parent, Ioas):
            self.parent.remove_hwpt(self)
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
        self.ioas.check_mapped(span)
        return domain.read_dirty(span, page_size, clear=clear)

    def _own(self) -> PagingDomain:
        self.check()
        if not isinstance(self.domain, PagingDomain):
            raise IommuError(errno.ENOENT, f"{self} is nested: its parent tracks writes")
        return self.domain

    @locked
    def invalidate(self, span: Span | None = None) -> None:
        """IOMMU_HWPT_INVALIDATE: flushes stage 1, all or `span` (IOVA).  IommuError(EINVAL): it is not nested."""
        if not isinstance(self.domain, TableDomain):
            raise IommuError(errno.EINVAL, f"{self} is not nested")
        self.domain.flush(span)
