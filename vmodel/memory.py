"""Guest memory as one function sees it: the windows that its client's DMA_MAP opened."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from vmodel import _shim
from vmodel.errors import Access
from vmodel.span import PAGE, Span

#: Windows that one client may have at a time: the specification's default for max_dma_maps.
MAX_WINDOWS = 65535

_files_lock = threading.Lock()
_files: _shim.Files | None = None


def shared_files() -> _shim.Files:
    """The files that this process has mapped: all functions of a machine share the guest's RAM."""
    global _files
    with _files_lock:
        if _files is None:
            _files = _shim.Files()
        return _files


@dataclass(frozen=True)
class Window:
    """One DMA_MAP: `span` of GPA, reached through a file (from `offset` on) or by messages."""

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
        """Opens a window; `fd` stays the caller's.  OSError as in vms_memory_map."""
        self.shim.map(gpa, size, int(access), fd, offset)

    def unmap(self, gpa: int, size: int) -> int:
        """Closes all windows inside the range; bytes removed.  OSError(EINVAL) when it cuts one."""
        return self.shim.unmap(gpa, size)

    def unmap_all(self) -> int:
        """Closes every window; bytes removed."""
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
        """Logs DMA writes to `spans` (none: to everything) from now on.

        OSError: EBUSY when it is on already, EINVAL when spans overlap.
        """
        self.shim.dirty_start([(span.start, span.last) for span in spans])

    def dirty_stop(self) -> None:
        """Ends logging and forgets the log.  OSError(EINVAL) when it is off."""
        self.shim.dirty_stop()

    def dirty_report(self, span: Span, page_size: int = PAGE) -> bytes:
        """Reads and clears: a little-endian bitmap, one bit a page, padded to 8 bytes.

        OSError(EINVAL): logging is off, or `span` is not made of whole pages of `page_size`.
        """
        return self.shim.dirty_report(span.start, span.size, page_size)

    def close(self) -> None:
        """Closes every window.  The object itself may be used again."""
        self.shim.unmap_all()
