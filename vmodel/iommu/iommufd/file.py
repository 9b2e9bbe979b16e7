"""`MemoryFile`, `DmaBuf`: what `Ioas.map_file` maps (Linux drivers/iommu/iommufd/pages.c)."""

from __future__ import annotations

import errno
import threading
import weakref
from typing import TYPE_CHECKING

from vmodel.errors import IommuError
from vmodel.iommu.iommufd.pages import Pages
from vmodel.iommu.iommufd.process import AccountMode
from vmodel.span import PAGE

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.context import Context


class MemoryFile:
    """A file in memory (memfd) of `size` bytes, which the guest has at the GPAs from `gpa` on."""

    def __init__(self, gpa: int, size: int) -> None:
        """ValueError: `gpa` is not a multiple of 4 KiB, no bytes, or past 2**64."""
        if gpa % PAGE or gpa < 0 or size <= 0 or gpa + size > 1 << 64:
            raise ValueError(f"a file of {size:#x} bytes at gpa {gpa:#x}")
        self.gpa = gpa
        self.size = size

    def pages(self, context: Context, offset: int, size: int, *, writable: bool) -> Pages:
        """What `Ioas.map_file` maps, from the page of `offset` on."""
        return FilePages(context, self, offset, writable=writable)


class FilePages(Pages):
    """Pages of a file, which remain when the process exits, and which another process can take over."""

    of_file = True

    def __init__(self, context: Context, file: MemoryFile, offset: int, *, writable: bool) -> None:
        super().__init__(context.process, context.account_mode, file.gpa + offset, writable=writable)
        self.file = file
        self.address = offset & -PAGE

    def check(self, first: int, last: int) -> None:
        """IommuError(EINVAL): a page is not in the file (Linux memfd_pin_folios)."""
        if self.address + (last + 1) * PAGE > self.file.size and not self.covers(first, last):
            raise IommuError(
                errno.EINVAL,
                f"the file has {self.file.size:#x} bytes: page {self.address + last * PAGE:#x} is not in it",
            )


class DmaBuf(MemoryFile):
    """A dma-buf: memory of a device, whose driver may take it back (`revoke`).  Kernel accesses cannot use it."""

    def __init__(self, gpa: int, size: int) -> None:
        """ValueError as MemoryFile."""
        super().__init__(gpa, size)
        self.revoked = False
        self._lock = threading.Lock()
        self._mapped: weakref.WeakSet[DmaBufPages] = weakref.WeakSet()

    def pages(self, context: Context, offset: int, size: int, *, writable: bool) -> Pages:
        """IommuError: EINVAL not in the dma-buf; ENODEV it is revoked.  (Linux iopt_alloc_dmabuf_pages)"""
        if offset + size > self.size:
            raise IommuError(errno.EINVAL, f"{size:#x} bytes at {offset:#x} are not all in the dma-buf")
        with self._lock:
            if self.revoked:
                raise IommuError(errno.ENODEV, "the dma-buf is revoked")
            pages = DmaBufPages(context, self, offset, writable=writable)
            self._mapped.add(pages)
            return pages

    def revoke(self) -> None:
        """Takes the memory back: no DMA reaches it when this returns.  Its mappings stay, without memory, for good."""
        with self._lock:
            self.revoked = True
            mapped = list(self._mapped)
        for pages in mapped:
            pages.revoke()

    def restore(self) -> None:
        """Lets it be mapped again."""
        with self._lock:
            self.revoked = False


class DmaBufPages(FilePages):
    """Pages of a dma-buf: not pinned, and not counted."""

    of_file = False
    of_device = True

    def __init__(self, context: Context, file: MemoryFile, offset: int, *, writable: bool) -> None:
        super().__init__(context, file, offset, writable=writable)
        self.mode = AccountMode.NONE
        self._context = context

    def revoke(self) -> None:
        """Unmaps it from all HWPTs (Linux iopt_revoke_notify)."""
        with self._context.lock:
            if not self.revoked:
                for space in self._context.spaces:
                    space.revoke(self)
                self.revoked = True

    def check(self, first: int, last: int) -> None:
        """It is there, or revoked: then it is mapped nowhere."""

    def pin(self, first: int, last: int) -> None:
        """Nothing is pinned."""

    def unpin(self, first: int, last: int) -> None:
        """Nothing was pinned."""
