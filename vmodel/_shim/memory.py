"""Pieces of client files, and a function's DMA windows with their dirty log; see vms_files_* and vms_memory_*."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from vmodel._shim.handle import check, create, in_bounds
from vmodel._vmshim import ffi, lib

#: The most pages of a dirty report: a bitmap of 256 MiB.
_MOST_PAGES = 1 << 31


class Files:
    """Pieces of client files that this process has mapped, once each; shared by all functions of a server."""

    def __init__(self) -> None:
        self.handle = create(lib.vms_files_create, lib.vms_files_destroy, "vms_files")

    @property
    def mapped(self) -> int:
        """How many mappings are alive."""
        return int(lib.vms_files_mapped(self.handle))


class Memory:
    """One function's DMA windows and dirty log."""

    @in_bounds
    def __init__(self, files: Files, max_windows: int) -> None:
        self.files = files
        self.handle = create(lib.vms_memory_create, lib.vms_memory_destroy, "vms_memory", files.handle, max_windows)
        self._bytes = ffi.new("uint64_t *")

    @in_bounds
    def map(self, gpa: int, size: int, prot: int, fd: int, offset: int) -> None:
        check(lib.vms_memory_map(self.handle, gpa, size, prot, fd, offset))

    @in_bounds
    def unmap(self, gpa: int, size: int) -> int:
        removed = ffi.new("uint64_t *")
        check(lib.vms_memory_unmap(self.handle, gpa, size, removed))
        return int(removed[0])

    def unmap_all(self) -> int:
        removed = ffi.new("uint64_t *")
        check(lib.vms_memory_unmap_all(self.handle, removed))
        return int(removed[0])

    def count(self) -> int:
        return int(lib.vms_memory_count(self.handle))

    def list(self) -> list[tuple[int, int, int, int, bool]]:
        """(start, last, file offset, prot, has a file) of each window, ascending."""
        found: list[tuple[int, int, int, int, bool]] = []
        room = 256
        out = ffi.new("vms_window[]", room)
        gpa = 0
        while True:  # each page begins behind the last one's addresses, and those end
            n = lib.vms_memory_list(self.handle, gpa, out, room)
            found += [(w.start, w.last, w.offset, w.prot, bool(w.has_file)) for w in out[0:n]]
            if n < room or found[-1][1] == 2**64 - 1:
                return found
            gpa = found[-1][1] + 1

    @in_bounds
    def dirty_start(self, ranges: Sequence[tuple[int, int]]) -> None:
        check(lib.vms_dirty_start(self.handle, ffi.new("vms_range[]", list(ranges)), len(ranges)))

    def dirty_stop(self) -> None:
        check(lib.vms_dirty_stop(self.handle))

    @in_bounds
    def dirty_report(self, gpa: int, size: int, page_size: int) -> bytes:
        if page_size < 4096:
            raise OSError(errno.EINVAL, f"a dirty report in pages of {page_size} bytes")
        if size // page_size > _MOST_PAGES:
            raise OSError(errno.ENOMEM, f"a dirty report of more than {_MOST_PAGES:#x} pages")
        words = (size // page_size + 63) // 64
        bitmap = bytearray(words * 8)
        check(lib.vms_dirty_report(self.handle, gpa, size, page_size, ffi.from_buffer("uint64_t[]", bitmap), words))
        return bytes(bitmap)
