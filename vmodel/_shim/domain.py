"""IOVA to GPA; see vms_domain_* and vms_budget_*."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from vmodel._shim.fault import raise_fault
from vmodel._shim.handle import check, create
from vmodel._shim.memory import Memory
from vmodel._vmshim import ffi, lib

DOMAIN_IDENTITY: int = lib.VMS_DOMAIN_IDENTITY
DOMAIN_BLOCKED: int = lib.VMS_DOMAIN_BLOCKED
UNMAP_DEFER: int = lib.VMS_UNMAP_DEFER
FLUSH_KEEP_OWN: int = lib.VMS_FLUSH_KEEP_OWN
MAP_NO_CACHE: int = lib.VMS_MAP_NO_CACHE
MAP_SNOOP: int = lib.VMS_MAP_SNOOP

#: (first IOVA, last IOVA, GPA of the first, prot, level) of a mapping, or of what a walk has found.
Mapped = tuple[int, int, int, int, int]


def _mapped(m: Any) -> Mapped:
    return m.start, m.last, m.gpa, m.prot, m.level


class Budget:
    """Bytes of memory that the mappings of several domains may take together."""

    def __init__(self, limit: int) -> None:
        self.handle = create(lib.vms_budget_create, lib.vms_budget_destroy, "vms_budget", limit)

    @property
    def taken(self) -> int:
        """In bytes."""
        return int(lib.vms_budget_taken(self.handle))


class Domain:
    """IOVA to GPA; see vms_domain_*.  Any thread may call it."""

    def __init__(self, handle: Any, keep: tuple[object, ...] = ()) -> None:
        self.handle = handle
        self._keep = keep
        #: vms_domain_map and vms_domain_unmap of this domain: the result, or -errno.  Bound once, as they are hot.
        self.try_map: Callable[[int, int, int, int], int] = functools.partial(lib.vms_domain_map, handle)
        self.try_unmap: Callable[[int, int, int], int] = functools.partial(lib.vms_domain_unmap, handle)

    @classmethod
    def plain(cls, kind: int) -> Domain:
        """DOMAIN_IDENTITY or DOMAIN_BLOCKED."""
        return cls(create(lib.vms_domain_create, lib.vms_domain_destroy, "vms_domain", kind))

    @classmethod
    def paging(
        cls, page_sizes: int, first: int, last: int, last_gpa: int, max_mappings: int, budget: Budget | None = None
    ) -> Domain:
        """One that keeps its mappings, in memory of `budget`."""
        taken_from = ffi.NULL if budget is None else budget.handle
        limits = (page_sizes, first, last, last_gpa, max_mappings, taken_from)
        return cls(create(lib.vms_domain_create_paging, lib.vms_domain_destroy, "vms_domain", *limits))

    @classmethod
    def table(
        cls,
        memory: Memory,
        format: int,
        levels: int,
        root: int,
        input_bits: int,
        output_bits: int,
        flags: int,
        parent: Domain | None,
    ) -> Domain:
        """One that walks a guest's tables; the arguments are vms_table's."""
        table = ffi.new("vms_table *", (format, levels, root, input_bits, output_bits, flags))
        above = ffi.NULL if parent is None else parent.handle
        constructor = lib.vms_domain_create_table
        return cls(
            create(constructor, lib.vms_domain_destroy, "vms_domain", memory.handle, table, above), (memory, parent)
        )

    def map(self, iova: int, gpa: int, size: int, prot: int) -> None:
        check(self.try_map(iova, gpa, size, prot))

    def unmap(self, iova: int, size: int, flags: int = 0) -> int:
        """Bytes removed."""
        return check(self.try_unmap(iova, size, flags)) << 12

    def clear(self, first: int, last: int, flags: int = 0) -> int:
        """Bytes removed."""
        return check(lib.vms_domain_clear(self.handle, first, last, flags)) << 12

    def flush(self, start: int, last: int, flags: int = 0) -> None:
        check(lib.vms_domain_flush(self.handle, start, last, flags))

    def walk(self, iova: int, access: int) -> Mapped:
        """Where `iova` leads; DmaFault."""
        out, fault = ffi.new("vms_mapping *"), ffi.new("vms_fault *")
        rc = lib.vms_domain_walk(self.handle, iova, access, out, fault)
        if rc:
            raise_fault(rc, fault)
        return _mapped(out)

    def list(self) -> Iterator[Mapped]:
        """All mappings, ascending."""
        room, iova = 256, 0
        out = ffi.new("vms_mapping[]", room)
        while True:  # each page begins behind the last one's addresses, and those end
            n = lib.vms_domain_list(self.handle, iova, out, room)
            page = [_mapped(m) for m in out[0:n]]
            yield from page
            if n < room or page[-1][1] == 2**64 - 1:
                return
            iova = page[-1][1] + 1

    def first(self, iova: int) -> Mapped | None:
        """The first mapping that ends at `iova` or behind it."""
        out = ffi.new("vms_mapping *")
        return _mapped(out) if lib.vms_domain_list(self.handle, iova, out, 1) else None

    def count(self) -> tuple[int, int]:
        """(mappings, bytes of memory that they take)."""
        taken = ffi.new("uint64_t *")
        return int(lib.vms_domain_count(self.handle, taken)), int(taken[0])

    def check(self) -> None:
        """For tests: OSError(EIO) when what the mappings are in is not as it must be."""
        check(lib.vms_domain_check(self.handle))

    def dirty_start(self) -> None:
        check(lib.vms_domain_dirty_start(self.handle))

    def dirty_stop(self) -> None:
        check(lib.vms_domain_dirty_stop(self.handle))

    def dirty_report(self, iova: int, size: int, page_size: int, keep: bool) -> bytes:
        words = (size // max(page_size, 1) + 63) // 64
        bitmap = bytearray(words * 8)
        into = ffi.from_buffer("uint64_t[]", bitmap)
        check(lib.vms_domain_dirty_report(self.handle, iova, size, page_size, keep, into, words))
        return bytes(bitmap)
