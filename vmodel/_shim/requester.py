"""What issues DMA; see vms_requester_* and vms_dma_*."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vmodel._shim.domain import Domain
from vmodel._shim.fault import NO_PASID, raise_fault
from vmodel._shim.handle import check, create
from vmodel._shim.memory import Memory
from vmodel._vmshim import ffi, lib

ATOMIC_FETCH_ADD: int = lib.VMS_ATOMIC_FETCH_ADD
ATOMIC_SWAP: int = lib.VMS_ATOMIC_SWAP
ATOMIC_CAS: int = lib.VMS_ATOMIC_CAS
DMA_WRITE: int = lib.VMS_DMA_WRITE
PROT_NONE: int = lib.VMS_PROT_NONE
STALE_ROUTE: int = lib.VMS_STALE_ROUTE
#: Notes of stale uses that are taken at once.
_NOTES = 16
#: Reads up to this size go through a buffer that is kept: making one would cost more than the copy.
_SCRATCH = 16384
#: The most bytes of one read: more are read in pieces, as memory is taken for what there is only.
MOST_BYTES = 16 << 20


class TooLarge(Exception):
    """A read of more than MOST_BYTES."""


@dataclass(frozen=True)
class StaleNote:
    """A stale use; the fields are those of vms_stale, but `pasid`: None without one."""

    iova: int
    word: int
    was: int
    now: int
    pasid: int | None
    access: int
    was_prot: int
    now_prot: int
    kind: int
    reason: int


def _note(n: Any) -> StaleNote:
    pasid = None if n.pasid == NO_PASID else n.pasid
    return StaleNote(n.iova, n.word, n.was, n.now, pasid, n.access, n.was_prot, n.now_prot, n.kind, n.reason)


class _PerThread(threading.local):
    """What each thread that makes accesses keeps: fresh structs would cost more than the copy of a small access."""

    def __init__(self) -> None:
        self.fault = ffi.new("vms_fault *")
        self.scratch = ffi.new("char[]", _SCRATCH)


def _room(iova: int, size: int) -> Any:
    if iova + size > 1 << 64:  # a fault before anything is moved
        return ffi.NULL
    if size > MOST_BYTES:
        raise TooLarge
    return ffi.new("char[]", size)


class Requester:
    """What issues DMA.  Any thread may call it.

    Buffers are released before an error is raised: whoever keeps the error keeps this frame, and the collector of
    CPython 3.11 crashes where a cycle has a memoryview that is exported.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.handle = create(lib.vms_requester_create, lib.vms_requester_destroy, "vms_requester", memory.handle)
        self._local = _PerThread()
        self._stats = ffi.new("vms_dma_stats *")

        #: Gets the notes of stale uses, after the access and on its thread; see check_stale.
        self.on_stale: Callable[[list[StaleNote]], None] | None = None

    def enable(self, on: bool) -> None:
        check(lib.vms_requester_enable(self.handle, on))

    def _ended(self, rc: int, fault: Any) -> None:
        """A call did not just succeed."""
        if self.on_stale is not None and (notes := self.stale()):
            self.on_stale(notes)
        if rc < 0:
            raise_fault(rc, fault)

    def attach(self, domain: Domain | None, pasid: int = NO_PASID) -> None:
        """Accesses with this PASID go through `domain` from now on; None as in vms_requester_attach."""
        check(lib.vms_requester_attach(self.handle, pasid, ffi.NULL if domain is None else domain.handle))

    def block(self) -> None:
        """Takes all domains away: each access is a fault until the next `attach` without a PASID.  Cannot fail."""
        check(lib.vms_requester_block(self.handle))

    def own_tlb(self, on: bool) -> None:
        """Whether its IOTLB is a TLB of the device's own, which FLUSH_KEEP_OWN leaves alone."""
        check(lib.vms_requester_own_tlb(self.handle, on))

    def flush(self, start: int, last: int, pasid: int = NO_PASID) -> None:
        """Takes [start, last] of this PASID out of its IOTLB."""
        check(lib.vms_requester_flush(self.handle, pasid, start, last))

    def translate(self, iovas: Sequence[int], access: int, pasid: int = NO_PASID) -> list[int]:
        """The GPA of each IOVA, by way of the IOTLB."""
        fault, out = self._local.fault, ffi.new("uint64_t[]", len(iovas))
        rc = lib.vms_dma_translate(self.handle, pasid, list(iovas), len(iovas), access, out, fault)
        if rc:
            self._ended(rc, fault)
        return list(out)

    def read(self, iova: int, size: int, pasid: int = NO_PASID) -> bytes:
        """`size` bytes from `iova` on.  TooLarge: more than MOST_BYTES."""
        local = self._local
        fault = local.fault
        scratch = local.scratch if size <= _SCRATCH else _room(iova, size)
        rc = lib.vms_dma_rw(self.handle, pasid, iova, scratch, size, 0, fault)
        if rc:
            self._ended(rc, fault)
        return ffi.unpack(scratch, size)  # type: ignore[no-any-return]

    def readinto(self, iova: int, buffer: Any, pasid: int = NO_PASID) -> None:
        """Fills `buffer` (writable, contiguous) from `iova` on."""
        fault = self._local.fault
        into = ffi.from_buffer(buffer, require_writable=True)
        rc = lib.vms_dma_rw(self.handle, pasid, iova, into, len(into), 0, fault)
        if rc:
            ffi.release(into)
            self._ended(rc, fault)

    def write(self, iova: int, data: Any, pasid: int = NO_PASID) -> None:
        """Writes `data` (bytes-like, contiguous) to `iova`."""
        fault = self._local.fault
        source = ffi.from_buffer(data)
        rc = lib.vms_dma_rw(self.handle, pasid, iova, source, len(source), DMA_WRITE, fault)
        if rc:
            ffi.release(source)
            self._ended(rc, fault)

    def atomic(self, iova: int, op: int, size: int, operand: int, compare: int, pasid: int = NO_PASID) -> int:
        fault, old = self._local.fault, ffi.new("uint64_t *")
        rc = lib.vms_dma_atomic(self.handle, pasid, iova, op, size, operand, compare, old, fault)
        if rc:
            self._ended(rc, fault)
        return int(old[0])

    def gather(self, pieces: Sequence[tuple[int, int]], buffer: Any, flags: int, pasid: int = NO_PASID) -> None:
        """Moves (iova, length) pieces from or (DMA_WRITE) to `buffer`, where they lie one after the other."""
        fault = self._local.fault
        vector = ffi.new("vms_sg[]", list(pieces))
        flat = ffi.from_buffer(buffer, require_writable=not flags & DMA_WRITE)
        rc = lib.vms_dma_sg(self.handle, pasid, vector, len(pieces), flat, len(flat), flags, fault)
        if rc:
            ffi.release(flat)
            self._ended(rc, fault)

    def pin(self, iova: int, size: int, flags: int, pasid: int = NO_PASID) -> Pin:
        fault = self._local.fault
        pointer, pin = ffi.new("void **"), ffi.new("vms_pin **")
        rc = lib.vms_dma_pin(self.handle, pasid, iova, size, flags, pointer, pin, fault)
        if rc:
            self._ended(rc, fault)
        view = memoryview(ffi.buffer(pointer[0], size))
        return Pin(self, ffi.gc(pin[0], lib.vms_dma_unpin), view if flags & DMA_WRITE else view.toreadonly())

    def chosen_by(self, memory: Memory, words: Sequence[tuple[int, int]], pasid: int = NO_PASID) -> None:
        """What is attached was chosen by these (GPA, word) of `memory`.  OSError(ENOENT): nothing is."""
        check(lib.vms_requester_chosen_by(self.handle, pasid, memory.handle, list(words), len(words)))

    def check_stale(self, on: bool) -> None:
        """Whether each use of what is cached is compared with what the tables say now."""
        check(lib.vms_requester_check_stale(self.handle, on))

    def stale(self) -> list[StaleNote]:
        """Notes of stale uses, which leave."""
        out = ffi.new("vms_stale[]", _NOTES)
        found: list[StaleNote] = []
        while n := lib.vms_requester_stale(self.handle, out, _NOTES):
            found += [_note(out[i]) for i in range(n)]
        return found

    def stats(self) -> tuple[int, int, int, int, int, int, int, int]:
        """(read operations, read bytes, write operations, write bytes, faults, IOTLB hits, misses, stale uses)."""
        lib.vms_dma_stats_get(self.handle, self._stats)
        s = self._stats
        return s.read_ops, s.read_bytes, s.write_ops, s.write_bytes, s.faults, s.iotlb_hits, s.iotlb_misses, s.stale


class Pin:
    """Keeps a piece of guest memory mapped while Python looks at it."""

    def __init__(self, requester: Requester, handle: Any, view: memoryview) -> None:
        self._requester = requester  # and by it the memory, outlives the pin
        self._handle = handle
        self.view = view

    def close(self) -> None:
        """Unpins; slices of `view` must be gone (BufferError otherwise)."""
        self.view.release()
        ffi.release(self._handle)
