"""Pins: what a kernel access, or a HW_QUEUE, keeps of an IOAS's memory (Linux iommufd_access_pin_pages)."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from vmodel.errors import Access, IommuError
from vmodel.iommu.iommufd.ioas import Ioas
from vmodel.iommu.iommufd.pages import MappedArea
from vmodel.span import PAGE, Span


@dataclass(frozen=True)
class PinnedPages:
    """Pages `first` to `last` of an area's memory, pinned; `locks`: the area cannot be unmapped."""

    area: MappedArea
    first: int
    last: int
    locks: bool

    @property
    def memory(self) -> Span:
        """The GPAs of the pages."""
        return Span.sized(self.area.pages.gpa + self.first * PAGE, (self.last - self.first + 1) * PAGE)


def check_access(area: MappedArea, access: Access) -> None:
    """IommuError: EPERM the mapping does not allow it, where a write needs only WRITE; EINVAL it is of a dma-buf.

    (Linux check_area_prot, iopt_area_add_access, iopt_pages_rw_access)
    """
    if (Access.WRITE if Access.WRITE in access else Access.READ) not in area.access:
        raise IommuError(errno.EPERM, f"{area.span} does not allow {access!r}")
    if area.pages.of_device:
        raise IommuError(errno.EINVAL, f"{area.span} is memory of a device")


def pin_areas(ioas: Ioas, span: Span, access: Access, *, locks: bool = False) -> list[PinnedPages]:
    """Pins the pages of a range, in order.  IommuError as KernelAccess.pin_pages; nothing changes then."""
    pins: list[PinnedPages] = []
    try:
        for area, part in ioas.contiguous(span):
            inner = part.last != span.last
            if area.leaving or area.byte(part.start) % PAGE or (inner and area.byte(part.last) % PAGE != PAGE - 1):
                raise IommuError(errno.EINVAL, f"{ioas}: {part} is not made of whole pages, or is being unmapped")
            check_access(area, access)
            pin = PinnedPages(area, *area.numbers(part.start, part.last), locks)
            area.pages.pin(pin.first, pin.last)
            area.accesses += 1
            area.locks += locks
            pins.append(pin)
    except IommuError:
        release_pins(pins)
        raise
    return pins


def release_pins(pins: Iterable[PinnedPages]) -> None:
    """Undoes `pin_areas`."""
    for pin in pins:
        pin.area.accesses -= 1
        pin.area.locks -= pin.locks
        pin.area.pages.unpin(pin.first, pin.last)
