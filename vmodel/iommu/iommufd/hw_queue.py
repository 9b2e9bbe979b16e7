"""`HwQueue`: a queue in guest memory that hardware reads for a VM (Linux drivers/iommu/iommufd/viommu.c)."""

from __future__ import annotations

import enum
import errno
import itertools
from typing import TYPE_CHECKING

from vmodel.errors import Access, IommuError
from vmodel.iommu.iommufd.context import Object
from vmodel.iommu.iommufd.pins import PinnedPages, pin_areas, release_pins
from vmodel.span import PAGE, Span

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.viommu import Viommu


class HwQueueType(enum.IntEnum):
    """Linux enum iommu_hw_queue_type."""

    DEFAULT = 0
    TEGRA241_CMDQV = 1


class HwQueue(Object):
    """A queue of a vIOMMU (IOMMU_HW_QUEUE_ALLOC), at `length` bytes of guest memory from `iova` of the parent on.

    The pages stay mapped as long as it exists: Ioas.unmap of them is EBUSY.  A queue is destroyed only after that with
    the next index.  `gpa` is where it is in guest memory.  Nothing executes its commands here.
    """

    def __init__(self, viommu: Viommu, kind: int, index: int, iova: int, length: int) -> None:
        """IommuError: ENOENT `iova` is not mapped; EFAULT the memory is not contiguous; else as hw_queue_init."""
        super().__init__(viommu.context)
        self.viommu, self.type, self.index = viommu, kind, index
        self.iova, self.length = iova, length
        pages = Span(iova & -PAGE, (iova + length - 1) | (PAGE - 1))
        self._pins: list[PinnedPages] = []
        try:
            self._pins = pin_areas(viommu.hwpt.ioas, pages, Access.READ, locks=True)
            if any(a.memory.last + 1 != b.memory.start for a, b in itertools.pairwise(self._pins)):
                raise IommuError(errno.EFAULT, f"{viommu}: the memory of {pages} is not contiguous")
            self.gpa = self._pins[0].memory.start + iova % PAGE
            viommu.hw_queue_init(index, self.gpa, length)
        except IommuError:
            release_pins(self._pins)
            viommu.context.unregister(self)
            raise
        viommu.users += 1
        viommu.hw_queues[index] = self
        if index:
            viommu.hw_queues[index - 1].users += 1

    def release(self) -> None:
        del self.viommu.hw_queues[self.index]
        if self.index:
            self.viommu.hw_queues[self.index - 1].users -= 1
        release_pins(self._pins)
        self.viommu.users -= 1
