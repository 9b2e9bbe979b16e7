"""`CpuCache`: a CPU's write-back cache over guest memory, which shows what follows from DMA that does not snoop."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from vmodel import _shim
from vmodel.dma import Buffer, Dma
from vmodel.dma_pieces import counting, read_large
from vmodel.errors import Access, DmaFault
from vmodel.memory import GuestMemory
from vmodel.span import PAGE

#: Bytes of a line, as on x86 and most of Arm.
LINE = 64

_RW = Access.READ | Access.WRITE
_T = TypeVar("_T")


class _CacheLine:
    """A cached line; `dirty`: memory does not have `data` yet."""

    __slots__ = ("data", "dirty")

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.dirty = False


class CpuCache:
    """One cache of 64-byte lines, for code in Python that plays the CPU; the CPUs of a guest in QEMU do not use it.

    `read` and `write` are the CPU's accesses, by GPA.  `attach` puts the cache beside a device's DMA.  An access that
    snoops (Dma.snoops) sees dirty data, as it is written back first, and a write takes the line out.  One that does not
    snoop passes the cache: a write leaves a stale line, a read misses dirty data, and dirty data overwrites what was
    written when the line is written back.  Before a coherent IOMMU walks tables in memory, all dirty lines are written
    back, as if they were the tables.  Lines are written back by `flush`, `wbinvd`, or when there are more than
    `lines` of them, the least recently used first.  Any thread may call it.

    >>> cache = CpuCache(memory)  # doctest: +SKIP
    >>> cache.attach(device.dma)  # doctest: +SKIP

    GPAs are those of `memory`, whose windows the attached devices must have, too.  DmaFault: there is no memory at a
    GPA, or it is none.  ValueError: no lines.
    """

    def __init__(self, memory: GuestMemory, *, lines: int = 4096) -> None:
        if lines < 1:
            raise ValueError(f"a cache of {lines} lines")
        self._most = lines
        self._lines: OrderedDict[int, _CacheLine] = OrderedDict()
        self._bus = Dma(memory)
        self._bus.bus_master = True
        self.lock = threading.RLock()

    # ---- the CPU ---------------------------------------------------------------------------

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes, from lines where they are cached; others are cached now.  ValueError: less than 0 bytes."""
        if size < 0:
            raise ValueError(f"{size} bytes")
        data = bytearray()
        with self.lock:
            for at, offset, n in _split(gpa, size):
                data += self._line(at).data[offset : offset + n]
        return bytes(data)

    def write(self, gpa: int, data: Buffer) -> None:
        """Writes `data` to lines, which are dirty now.  On DmaFault the lines before the fault were written."""
        flat, done = bytes(data), 0
        with self.lock:
            for at, offset, n in _split(gpa, len(flat)):
                line = self._line(at)
                line.data[offset : offset + n] = flat[done : done + n]
                line.dirty = True
                done += n

    def _line(self, at: int) -> _CacheLine:
        line = self._lines.get(at)
        if line is not None:
            self._lines.move_to_end(at)
            return line
        line = _CacheLine(self._bus.read(at, LINE))
        while len(self._lines) >= self._most:
            self._evict(next(iter(self._lines)))
        self._lines[at] = line
        return line

    def flush(self, gpa: int, size: int) -> None:
        """Writes back and drops the lines of a range (x86 CLFLUSH, Arm DC CIVAC)."""
        with self.lock:
            self._each(self._cached(gpa, size), self._evict)

    def wbinvd(self) -> None:
        """Writes back and drops all lines (x86 WBINVD)."""
        with self.lock:
            self._each(list(self._lines), self._evict)

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, gpa: int) -> bool:
        """Whether the byte at `gpa` is cached."""
        return gpa // LINE * LINE in self._lines

    @property
    def dirty(self) -> int:
        """How many lines memory does not have yet."""
        with self.lock:
            return sum(line.dirty for line in self._lines.values())

    # ---- lines -----------------------------------------------------------------------------

    def _cached(self, gpa: int, size: int) -> list[int]:
        """The lines of a range that are cached; takes time by what is cached, or by the range, whichever is less."""
        first, end = gpa // LINE * LINE, gpa + size
        if size <= 0:
            return []
        if (end - first) // LINE > len(self._lines):
            return sorted(at for at in self._lines if first <= at < end)
        return [at for at in range(first, end, LINE) if at in self._lines]

    @staticmethod
    def _each(lines: list[int], do: Callable[[int], None]) -> None:
        """Does it for all lines; the first DmaFault is raised at the end."""
        failed: DmaFault | None = None
        try:
            for at in lines:
                try:
                    do(at)
                except DmaFault as fault:
                    failed = failed or fault
            if failed is not None:
                raise failed
        finally:
            failed = None  # no cycle of this frame and the error

    def _evict(self, at: int) -> None:
        """Drops a line, and writes it back.  DmaFault: there is no memory any more; the data is lost."""
        line = self._lines.pop(at)
        if line.dirty:
            self._bus.write(at, line.data)

    def _clean(self, at: int) -> None:
        line = self._lines[at]
        if line.dirty:
            line.dirty = False
            self._bus.write(at, line.data)

    # ---- devices ---------------------------------------------------------------------------

    def attach(self, dma: Dma) -> None:
        """Puts the cache beside all DMA of a device, with and without PASIDs, that its Python code issues.

        RuntimeError: the device is tapped (vmodel.inject).
        """
        dma.set_cache(_Snooped(self))

    @staticmethod
    def detach(dma: Dma) -> None:
        """Undoes `attach`.  RuntimeError: as there."""
        dma.set_cache(None)

    def clean(self) -> None:
        """Writes all dirty lines back, and keeps them."""
        with self.lock:
            self._each(list(self._lines), self._clean)

    def snoop(self, gpa: int, size: int, access: Access) -> None:
        """Before an access that snoops, with the lock: dirty data is written back, what will be written is dropped."""
        self._each(self._cached(gpa, size), self._evict if access & Access.WRITE else self._clean)


class _Snooped:
    """The DMA of a device beside a cache: page by page, as each may snoop or not.

    The snoop and the access are one step for the CPU, by the cache's lock.  What may wait for others is made without:
    a page request, whose answer may need the cache, and a message to the client.
    """

    def __init__(self, cache: CpuCache) -> None:
        self._cache = cache

    def _step(
        self, dma: Dma, iova: int, size: int, access: Access, done: int, once: Callable[[_shim.Requester, int], _T]
    ) -> _T:
        """An access within a page, `done` bytes after the first; `once` makes it, with a requester and a PASID."""
        requester, pasid = dma.requester, _shim.NO_PASID if dma.pasid is None else dma.pasid

        def attempt() -> _T:
            if dma.walk_snoops():
                self._cache.clean()
            gpa = requester.translate([iova], access, pasid)[0]
            snoops = dma.snoops(iova)
            with self._cache.lock:
                if snoops:
                    self._cache.snoop(gpa, size, access)
                return once(requester, pasid)

        with counting(done):
            return dma.whole(attempt, iova, access)
        raise AssertionError("unreachable")

    def read(self, dma: Dma, iova: int, size: int) -> bytes:
        if not _can_split(iova, size):
            return dma.read(iova, size)
        if size > _shim.MOST_BYTES:
            return read_large(partial(self.read, dma), iova, size)
        data = bytearray(size)
        self.readinto(dma, iova, data)
        return bytes(data)

    def readinto(self, dma: Dma, iova: int, buffer: bytearray | memoryview) -> None:
        with memoryview(buffer) as whole, whole.cast("B") as flat:
            if not _can_split(iova, len(flat)):
                flat[:] = dma.read(iova, len(flat))
                return
            for at, n in _pages(iova, len(flat)):
                with flat[at - iova : at - iova + n] as part:
                    self._read_page(dma, at, part, at - iova)

    def _read_page(self, dma: Dma, iova: int, part: memoryview, done: int) -> None:
        def once(requester: _shim.Requester, pasid: int) -> bool:
            with suppress(_shim.ByMessage):
                requester.readinto(iova, part, pasid)
                return True
            return False

        if not self._step(dma, iova, len(part), Access.READ, done, once):
            with counting(done):
                dma.readinto(iova, part)

    def write(self, dma: Dma, iova: int, data: Buffer) -> None:
        flat = bytes(data)
        if not _can_split(iova, len(flat)):
            dma.write(iova, flat)
            return
        for at, n in _pages(iova, len(flat)):
            self._write_page(dma, at, flat[at - iova : at - iova + n], at - iova)

    def _write_page(self, dma: Dma, iova: int, part: bytes, done: int) -> None:
        def once(requester: _shim.Requester, pasid: int) -> bool:
            with suppress(_shim.ByMessage):
                requester.write(iova, part, pasid)
                return True
            return False

        if not self._step(dma, iova, len(part), Access.WRITE, done, once):
            with counting(done):
                dma.write(iova, part)

    def gather_into(self, dma: Dma, pieces: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        done = 0
        for iova, size in pieces:
            with counting(done):
                self.readinto(dma, iova, buffer[done : done + size])
            done += size

    def scatter(self, dma: Dma, pieces: Sequence[tuple[int, int]], data: memoryview) -> None:
        done = 0
        for iova, size in pieces:
            with counting(done):
                self.write(dma, iova, data[done : done + size])
            done += size

    @contextmanager
    def view(self, dma: Dma, iova: int, size: int, *, writable: bool) -> Iterator[memoryview]:
        access = _RW if writable else Access.READ
        with dma.view(iova, size, writable=writable) as there:
            self._snoop_pages(dma, iova, size, access)
            try:
                yield there
            finally:
                if writable:
                    self._snoop_pages(dma, iova, size, access)  # what the CPU has read meanwhile

    def _snoop_pages(self, dma: Dma, iova: int, size: int, access: Access) -> None:
        for at, n in _pages(iova, size):
            self._step(dma, at, n, access, at - iova, lambda requester, pasid: None)

    def atomic(self, dma: Dma, iova: int, op: int, size: int, operand: int, compare: int) -> int:
        if size not in (4, 8) or iova % size or not _can_split(iova, size):  # it fails
            return dma.atomic(iova, op, size, operand, compare)

        def once(requester: _shim.Requester, pasid: int) -> int:
            return requester.atomic(iova, op, size, operand, compare, pasid)

        return self._step(dma, iova, size, _RW, 0, once)


def _can_split(iova: int, size: int) -> bool:
    """Whether there is a byte to move, and no address beyond 2**64, which is a fault of the whole access."""
    return size > 0 and iova >= 0 and iova + size <= 1 << 64


def _pages(start: int, size: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of each page's part of a range."""
    end = start + size
    while start < end:
        n = min(PAGE - start % PAGE, end - start)
        yield start, n
        start += n


def _split(gpa: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(address of the line, offset in it, bytes) of each line's part of a range."""
    end = gpa + size
    while gpa < end:
        n = min(LINE - gpa % LINE, end - gpa)
        yield gpa // LINE * LINE, gpa % LINE, n
        gpa += n
