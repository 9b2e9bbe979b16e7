"""Invalidations by users: entries one after the other, and how many were done (IOMMU_HWPT_INVALIDATE)."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vmodel.errors import IommuError
from vmodel.iommu.domain import TableDomain
from vmodel.iommu.iommufd.context import Object
from vmodel.iommu.iommufd.nested import check_words
from vmodel.span import PAGE, Span

#: The most entries of one call (IOMMU_HWPT_INVALIDATE_ENTRY_NUM_MAX).
MOST_ENTRIES = 1 << 19
#: The lock is released after so many, as others wait for it; SMMUv3's driver issues as many at once.
BATCH = 62
_LAST = (1 << 64) - 1


class InvalidationError(IommuError):
    """An invalidation was refused after `done` entries, which have been carried out (Linux: entry_num)."""

    def __init__(self, code: int, message: str, done: int = 0) -> None:
        super().__init__(code, message)
        self.done = done


@dataclass(frozen=True)
class VtdS1Invalidate:
    """struct iommu_hwpt_vtd_s1_invalidate: `npages` pages of 4 KiB from `addr` on; addr 0, npages 2**64 - 1: all.

    `flags`: LEAF, only cached leaves.  IommuError(EINVAL): a value is wider than its field.
    """

    addr: int = 0
    npages: int = _LAST
    flags: int = 0

    LEAF = 1

    def __post_init__(self) -> None:
        check_words("an invalidation", (self.addr, self.npages))
        check_words("an invalidation", (self.flags,), 32)


def run(
    item: Object,
    entries: Sequence[Any],
    kind: type | None,
    one: Callable[[Any], None],
    *,
    may_be_empty: bool = True,
) -> int:
    """Carries out `entries`, each of type `kind` (None: the object has no invalidation), by `one`; returns how many.

    `one` is called with the lock of `item`, which is released after each BATCH.  InvalidationError as
    Viommu.invalidate.
    """
    entries = tuple(entries[: MOST_ENTRIES + 1])
    if len(entries) > MOST_ENTRIES:
        raise InvalidationError(errno.EINVAL, f"{item}: {len(entries)} entries")
    if item.context.find(item.id) is not item:
        raise InvalidationError(errno.ENOENT, f"{item} was destroyed")
    if kind is None:
        raise InvalidationError(errno.EOPNOTSUPP, f"{item} has no invalidation")
    if not all(isinstance(entry, kind) for entry in entries) or not (entries or may_be_empty):
        raise InvalidationError(errno.EINVAL, f"{item}: entries must be {kind.__name__}")
    done = 0
    while True:
        with item.lock:
            if done and item.context.find(item.id) is not item:
                raise InvalidationError(errno.ENOENT, f"{item} was destroyed meanwhile", done)
            for entry in entries[done : done + BATCH]:
                try:
                    one(entry)
                except IommuError as error:
                    code = error.errno or errno.EINVAL
                    raise InvalidationError(code, f"entry {done}: {error.strerror}", done) from None
                done += 1
        if done == len(entries):
            return done
        time.sleep(0)  # without it this thread would get the lock again, before others wake up


def invalidate_vtd(domain: TableDomain, entry: VtdS1Invalidate) -> None:
    """One entry, also in the TLBs of devices (Linux intel_nested_cache_invalidate_user, cache_tag_flush_range).

    IommuError: EOPNOTSUPP an unknown flag; EINVAL `addr` is not that of a page, or not 0 for all pages.
    """
    if entry.flags & ~VtdS1Invalidate.LEAF:
        raise IommuError(errno.EOPNOTSUPP, f"flags {entry.flags:#x}")
    if entry.addr % PAGE or (entry.npages == _LAST and entry.addr):
        raise IommuError(errno.EINVAL, f"addr {entry.addr:#x}, {entry.npages} pages")
    # As in Linux's cache_tag_flush_range, a range that would wrap is all.
    last = entry.addr + entry.npages * PAGE - 1
    domain.flush(Span(entry.addr, last) if entry.addr <= last < _LAST else None)
