"""Guest memory as one function sees it: the windows that the client maps by DMA_MAP."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from vmodel import _shim
from vmodel.errors import Access
from vmodel.span import PAGE, Span

#: Most windows of one client at a time: the specification's default for max_dma_maps.
MAX_WINDOWS = 65535

_files_lock = threading.Lock()
_files: _shim.Files | None = None


def shared_files() -> _shim.Files:
    """The cache of mapped files, one for the process: all functions of a machine share the guest's RAM."""
    global _files
    with _files_lock:
        if _files is None:
            _files = _shim.Files()
        return _files


@dataclass(frozen=True)
class Window:
    """One DMA_MAP of GPAs `span`: a file from `offset` on, or, without a file, accessed by DMA_READ and DMA_WRITE."""

    span: Span
    access: Access
    has_file: bool
    offset: int


class GuestMemory:
    """DMA windows and the dirty log of one function."""

    def __init__(self, files: _shim.Files | None = None, max_windows: int = MAX_WINDOWS) -> None:
        self.shim = _shim.Memory(files or shared_files(), max_windows)

    def map(
        self, gpa: int, size: int, access: Access = Access.READ | Access.WRITE, fd: int = -1, offset: int = 0
    ) -> None:
        """Maps a window; `fd` stays the caller's, -1: no file.  OSError as in vms_memory_map (c_shim/vmshim.h)."""
        self.shim.map(gpa, size, int(access), fd, offset)

    def unmap(self, gpa: int, size: int) -> int:
        """Unmaps all windows inside the range; returns the bytes removed.  OSError(EINVAL): it cuts one, or wraps."""
        return self.shim.unmap(gpa, size)

    def unmap_all(self) -> int:
        """Unmaps every window; returns the bytes removed."""
        return self.shim.unmap_all()

    def windows(self) -> list[Window]:
        """All windows, ascending."""
        return [
            Window(Span(start, last), Access(prot), has_file, offset)
            for start, last, offset, prot, has_file in self.shim.list()
        ]

    def __len__(self) -> int:
        return self.shim.count()

    def dirty_start(self, spans: Iterable[Span] = ()) -> None:
        """Starts to log DMA writes to `spans`; no spans: to all memory.

        OSError: EBUSY, logging is on already; EINVAL, spans overlap.
        """
        self.shim.dirty_start([(span.start, span.last) for span in spans])

    def dirty_stop(self) -> None:
        """Stops logging and discards the log.  OSError(EINVAL): logging is off."""
        self.shim.dirty_stop()

    def dirty_report(self, span: Span, page_size: int = PAGE) -> bytes:
        """Reads and clears the dirty bits: a little-endian bitmap, one bit a page, padded to 8 bytes.

        OSError: EINVAL logging is off, or `span` is not made of whole pages of `page_size`; ENOMEM more than 2**31.
        """
        return self.shim.dirty_report(span.start, span.size, page_size)

    def close(self) -> None:
        """Unmaps every window.  The object itself may be used again."""
        self.shim.unmap_all()
