"""`KernelAccess`: a kernel driver's access to the memory of an IOAS, without DMA (Linux iommufd_access_*, device.c)."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator

from vmodel import _shim
from vmodel.errors import Access, DmaFault, IommuError
from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.iommufd.ioas import Ioas
from vmodel.iommu.iommufd.pins import PinnedPages, check_access, pin_areas, release_pins
from vmodel.iommu.locking import locked
from vmodel.memory import GuestMemory
from vmodel.span import PAGE, MiB, Span

_LAST = (1 << 64) - 1
#: `destroy` waits this long for calls of `unmap` that run, as Linux does (iommufd_object_dec_wait).
_WAIT_SECONDS = 60.0
#: Memory is read in pieces of this size, so that a mapping without memory behind it costs no more.
_PIECE = MiB
#: The most bytes of one `read`: its result is new memory (Linux: the caller's buffer), and it holds the lock.
MOST_READ = 64 * MiB

#: Called as (iova, size) before a mapping that is pinned goes away: it must unpin all in the range.
Unmap = Callable[[int, int], None]


class KernelAccess(Object):
    """What a driver of a mediated device has: it reads and writes an IOAS's memory, and pins it.

    Between `attach` and `detach` it uses an IOAS.  A user cannot destroy it: IOMMU_DESTROY is EBUSY.
    """

    def __init__(self, context: Context, memory: GuestMemory, unmap: Unmap | None = None) -> None:
        """`memory`: what GPAs lead to.  `unmap`: as in `pin_pages`; without it, the access can only read and write.

        `unmap` is called without the context's lock, on the thread of the call that unmaps.  In Linux it cannot fail,
        and cannot unmap: see Ioas.unmap.
        """
        super().__init__(context)
        self.users = 1  # the driver's
        #: Bytes to which IOVAs, GPAs and sizes of an IOAS that it is attached to are aligned.
        self.alignment = 1 if unmap is None else PAGE
        #: The IOAS that it is attached to.
        self.ioas: Ioas | None = None
        self._unmap = unmap
        self._memory = _shim.Requester(memory.shim)
        self._memory.enable(True)
        #: What is pinned: for each (iova, size) the pieces of each call.
        self._pins: dict[tuple[int, int], list[list[PinnedPages]]] = {}
        self._changing = False
        self._ending = False
        #: The threads in `unmap`.
        self._calling: list[int] = []
        self._idle = threading.Condition(context.lock)

    # ---- attach ----------------------------------------------------------------------------

    def attach(self, ioas: Ioas) -> None:
        """iommufd_access_attach.  IommuError: EINVAL attached already; EBUSY being detached or destroyed; ENOENT the
        access or the IOAS was destroyed, or is of another context; EADDRINUSE a mapping of the IOAS is not aligned.
        """
        with self.lock:
            self.check()
            if self.ioas is not None:
                raise IommuError(errno.EINVAL, f"{self} is attached to {self.ioas}")
            self._change(ioas)

    def replace(self, ioas: Ioas) -> None:
        """iommufd_access_replace: calls `unmap` for all IOVAs, and uses another IOAS from then on.

        IommuError: ENOENT it is not attached; else as `attach`.
        """
        self._change(ioas, attached=True)

    def detach(self) -> None:
        """iommufd_access_detach: calls `unmap` for all IOVAs; nothing happens if it is not attached.

        What the driver does not unpin then stays pinned forever, as in Linux.
        """
        with self.lock:
            self.check()
            if self.ioas is None:
                return
        self._change(None)

    def _change(self, ioas: Ioas | None, *, attached: bool = False, last: bool = False) -> None:
        """`last`: that of `destroy`, after which no other thread may attach it again."""
        with self.lock:
            self.check()
            if self._ending and not last:
                raise IommuError(errno.EBUSY, f"{self} is being destroyed")
            if attached and self.ioas is None:
                raise IommuError(errno.ENOENT, f"{self} is not attached")
            if ioas is not None:
                ioas.check(self.context)
            if self._changing:
                raise IommuError(errno.EBUSY, f"{self} is being detached")
            old = self.ioas
            if ioas is old:
                return
            if ioas is not None:
                ioas.add_access(self)
            if old is None:
                self.ioas = ioas
                return
            # Nothing more can be pinned; what is, can be unpinned.
            self.ioas = None
            self._changing = True
        try:
            self.notify(0, _LAST)
        finally:
            with self.lock:
                old.remove_access(self)
                self._pins.clear()
                self.ioas = ioas
                self._changing = False
                self._idle.notify_all()

    def notify(self, iova: int, size: int) -> None:
        """Calls `unmap`; the caller must not hold the context's lock."""
        if self._unmap is None:
            return
        with self.lock:
            self._calling.append(threading.get_ident())
        try:
            self._unmap(iova, size)
        finally:
            with self.lock:
                self._calling.remove(threading.get_ident())
                self._idle.notify_all()

    @property
    def notified(self) -> bool:
        """Whether this thread is in a call of `unmap`."""
        return threading.get_ident() in self._calling

    @property
    def ending(self) -> bool:
        """Whether it is being destroyed: it is notified of no unmap any more."""
        return self._ending

    def destroy(self) -> None:
        """iommufd_access_destroy: waits for calls of `unmap` that run, and detaches it.

        IommuError: EBUSY one still runs after 60 s, or this is such a call; ENOENT it has been destroyed.
        """
        with self.lock:
            self.check()
            if self._ending or self.notified:
                raise IommuError(errno.EBUSY, f"{self} is in use")
            self._ending = True
            if not self._idle.wait_for(lambda: not self._calling and not self._changing, _WAIT_SECONDS):
                self._ending = False
                raise IommuError(errno.EBUSY, f"{self}: its unmap does not return")
        try:
            self._change(None, last=True)
        finally:
            with self.lock:
                self.users -= 1
                self.context.destroy(self.id)

    def stop(self) -> None:
        try:
            self.destroy()
        except IommuError as error:
            if error.errno != errno.ENOENT:
                raise

    # ---- pin -------------------------------------------------------------------------------

    @locked
    def pin_pages(self, iova: int, size: int, access: Access = Access.READ) -> list[Span]:
        """iommufd_access_pin_pages: pins the pages of a range; returns their GPAs, in order.

        Until `unpin_pages` an unmap of a mapping in the range calls `unmap(iova, size)` with the ends of the mapping,
        of all accesses of the IOAS.  IommuError: EINVAL no size, not whole pages, the access has no `unmap`, the
        mapping is being unmapped, or is of a dma-buf; EOVERFLOW wraps; ENOENT not attached, or a part is not mapped;
        EPERM a mapping does not allow `access`; ENOMEM, EFAULT as in a map with a HWPT.  On an error nothing changes.
        """
        self.check()
        if self._unmap is None:
            raise IommuError(errno.EINVAL, f"{self} has no `unmap`")
        span, ioas = self._span(iova, size), self._attached()
        pins = pin_areas(ioas, span, access)
        self._pins.setdefault((iova, size), []).append(pins)
        return [pin.memory for pin in pins]

    @locked
    def unpin_pages(self, iova: int, size: int) -> None:
        """iommufd_access_unpin_pages: undoes one `pin_pages` with the same arguments.

        IommuError(EINVAL): there was none since it was attached.  (Linux warns of that.)
        """
        calls = self._pins.get((iova, size))
        if not calls:
            raise IommuError(errno.EINVAL, f"{self} has not pinned {size:#x} bytes at iova {iova:#x}")
        release_pins(calls.pop())
        if not calls:
            del self._pins[iova, size]

    # ---- read and write --------------------------------------------------------------------

    @locked
    def read(self, iova: int, size: int) -> bytes:
        """iommufd_access_rw: bytes of the memory that the IOAS maps, from any IOVA on.

        IommuError: EINVAL no size, a mapping is being unmapped, or is of a dma-buf; EOVERFLOW wraps; ENOENT not
        attached, or a part is not mapped; EPERM a mapping does not allow it; EFAULT there is no memory; ENOMEM more
        than 64 MiB, which may be read in parts.
        """
        self.check()
        got = bytearray()
        for gpa, count in self._pieces(iova, size, Access.READ):
            if len(got) + count > MOST_READ:
                raise IommuError(errno.ENOMEM, f"{self}: a read of {size:#x} bytes: more than {MOST_READ:#x}")
            try:
                got += self._memory.read(gpa, count)
            except (DmaFault, _shim.ByMessage):
                raise IommuError(errno.EFAULT, f"{self}: no memory at gpa {gpa:#x}") from None
        return bytes(got)

    @locked
    def write(self, iova: int, data: bytes) -> None:
        """As `read`, the other way.  As in Linux, what comes before an error has been written."""
        self.check()
        done = 0
        for gpa, count in self._pieces(iova, len(data), Access.WRITE):
            try:
                self._memory.write(gpa, data[done : done + count])
            except (DmaFault, _shim.ByMessage):
                raise IommuError(errno.EFAULT, f"{self}: no memory at gpa {gpa:#x}") from None
            done += count

    def _pieces(self, iova: int, size: int, access: Access) -> Iterator[tuple[int, int]]:
        """GPA and size of each piece of a range."""
        span, ioas = self._span(iova, size), self._attached()
        for area, part in ioas.contiguous(span):
            if area.leaving:
                raise IommuError(errno.EINVAL, f"{self}: {area.span} is being unmapped")
            check_access(area, access)
            area.pages.check(*area.numbers(part.start, part.last))
            for at in range(part.start, part.last + 1, _PIECE):
                yield area.pages.gpa + area.byte(at), min(_PIECE, part.last + 1 - at)

    def _attached(self) -> Ioas:
        if self.ioas is None:
            raise IommuError(errno.ENOENT, f"{self} is not attached")
        return self.ioas

    def _span(self, iova: int, size: int) -> Span:
        if size <= 0:
            raise IommuError(errno.EINVAL, f"{self}: {size} bytes")
        if not 0 <= iova <= iova + size - 1 <= _LAST:
            raise IommuError(errno.EOVERFLOW, f"{self}: iova {iova:#x}, {size:#x} bytes: past 2**64")
        return Span.sized(iova, size)

    def __str__(self) -> str:
        return f"kernel access {self.id}"
