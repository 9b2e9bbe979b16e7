"""Where an IOAS maps memory if the user does not say where (Linux iopt_alloc_iova)."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from vmodel.errors import IommuError
from vmodel.iommu.areas import common
from vmodel.iommu.runs import Runs
from vmodel.span import PAGE, MiB, Span

_LAST = (1 << 64) - 1
#: IOVAs are aligned to no more, whatever the memory is: a huge page of the CPU.
_HUGE_PAGE = 2 * MiB
#: What may be chosen: neither the first page nor the last.
_CHOSEN = Span(PAGE, _LAST - PAGE)


def allocate_iova(room: Iterable[Span], taken: Runs, address: int, size: int, alignment: int) -> int:
    """The first fit in `room` with the alignment of the memory at `address`, up to 2 MiB, for large pages; never 0.

    IommuError: EOVERFLOW too many bytes; EINVAL the memory is not aligned to `alignment`; ENOSPC no room.
    """
    if size >= _LAST // 2:
        raise IommuError(errno.EOVERFLOW, f"{size:#x} bytes are too many to allocate IOVAs for")
    wanted = 1 << (size - 1).bit_length()
    align = min(wanted, address & -address or wanted, _HUGE_PAGE)
    if align < alignment:
        raise IommuError(errno.EINVAL, f"{address:#x} is not aligned to {alignment:#x}")
    for usable in common(room, [_CHOSEN]):
        for hole in taken.gaps(usable, size):
            start = ((hole.start + align - 1) & -align) | address % PAGE
            if start < hole.last and start + size - 1 <= hole.last:
                return start
    raise IommuError(errno.ENOSPC, f"no free IOVAs for {size:#x} bytes")
