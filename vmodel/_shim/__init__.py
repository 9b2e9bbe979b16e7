"""The only importer of the compiled shim: handles as objects, errno as exceptions.

`c_shim/vmshim.h` says what each call does; here are only lifetimes and types.  Handles are freed by the
garbage collector, in any order: what was made from an object keeps it alive on the shim's side.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vmodel._vmshim import ffi, lib
from vmodel.errors import Access, DmaFault, Reason

EXIT_ON_READ: int = lib.VMS_EXIT_ON_READ
EXIT_ON_WRITE: int = lib.VMS_EXIT_ON_WRITE
SIZE_ODD: int = lib.VMS_SIZE_ODD
MISALIGNED: int = lib.VMS_MISALIGNED
#: Every size from 1 to 8 bytes, aligned or not; the bits 1, 2, 4 and 8 are those sizes.
ALL_SIZES: int = 15 | SIZE_ODD | MISALIGNED
REGIONS: int = lib.VMS_REGIONS
BATCH: int = lib.VMS_BATCH
NO_PASID: int = lib.VMS_NO_PASID
DMA_WRITE: int = lib.VMS_DMA_WRITE
PROT_NONE: int = lib.VMS_PROT_NONE
STALE_ROUTE: int = lib.VMS_STALE_ROUTE
#: Notes of stale uses that are taken at once.
_NOTES = 16
#: Deadline that never comes.
FOREVER = 2**64 - 1

EXIT_READ: int = lib.VMS_EXIT_READ
EXIT_WRITE: int = lib.VMS_EXIT_WRITE
EXIT_POSTED: int = lib.VMS_EXIT_POSTED
EXIT_COMMAND: int = lib.VMS_EXIT_COMMAND
EXIT_REPLY: int = lib.VMS_EXIT_REPLY
EXIT_TIMEOUT: int = lib.VMS_EXIT_TIMEOUT
EXIT_WAKE: int = lib.VMS_EXIT_WAKE
EXIT_EVENT: int = lib.VMS_EXIT_EVENT
EXIT_CLOSED: int = lib.VMS_EXIT_CLOSED

#: Reads up to this size go through a buffer that is kept: making one would cost more than the copy.
_SCRATCH = 16384

_enter = lib.vms_enter
_signal = lib.vms_signal
#: vms_access: offset, value, key, region, count.
ACCESS = struct.Struct("<QQQII")
if ffi.sizeof("vms_access") != ACCESS.size:
    raise ImportError("struct vms_access of vmshim.h has another size than vmodel._shim.ACCESS")
_REASON_NO_FILE: int = lib.VMS_REASON_NO_FILE


def check(rc: int) -> int:
    """Turns -errno into OSError; passes anything else through."""
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
    return rc


def _create(create: Any, destroy: Any, kind: str, *args: Any) -> Any:
    out = ffi.new(f"{kind} **")
    check(create(*args, out))
    return ffi.gc(out[0], destroy)


class Files:
    """Pieces of client files that this process has mapped, once each; shared by all functions of a server."""

    def __init__(self) -> None:
        self.handle = _create(lib.vms_files_create, lib.vms_files_destroy, "vms_files")

    @property
    def mapped(self) -> int:
        """How many mappings are alive."""
        return int(lib.vms_files_mapped(self.handle))


class Memory:
    """One function's DMA windows and dirty log."""

    def __init__(self, files: Files, max_windows: int) -> None:
        self.files = files
        self.handle = _create(lib.vms_memory_create, lib.vms_memory_destroy, "vms_memory", files.handle, max_windows)
        self._bytes = ffi.new("uint64_t *")

    def map(self, gpa: int, size: int, prot: int, fd: int, offset: int) -> None:
        check(lib.vms_memory_map(self.handle, gpa, size, prot, fd, offset))

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
        while True:
            n = lib.vms_memory_list(self.handle, gpa, out, room)
            found += [(w.start, w.last, w.offset, w.prot, bool(w.has_file)) for w in out[0:n]]
            if n < room or found[-1][1] == 2**64 - 1:
                return found
            gpa = found[-1][1] + 1

    def dirty_start(self, ranges: Sequence[tuple[int, int]]) -> None:
        check(lib.vms_dirty_start(self.handle, ffi.new("vms_range[]", list(ranges)), len(ranges)))

    def dirty_stop(self) -> None:
        check(lib.vms_dirty_stop(self.handle))

    def dirty_report(self, gpa: int, size: int, page_size: int) -> bytes:
        words = (size // max(page_size, 1) + 63) // 64
        bitmap = bytearray(words * 8)
        check(lib.vms_dirty_report(self.handle, gpa, size, page_size, ffi.from_buffer("uint64_t[]", bitmap), words))
        return bytes(bitmap)


DOMAIN_IDENTITY: int = lib.VMS_DOMAIN_IDENTITY
DOMAIN_BLOCKED: int = lib.VMS_DOMAIN_BLOCKED
TABLE_SET_ACCESSED: int = lib.VMS_TABLE_SET_ACCESSED
TABLE_SET_DIRTY: int = lib.VMS_TABLE_SET_DIRTY
TABLE_SUPERVISOR: int = lib.VMS_TABLE_SUPERVISOR
TABLE_2M: int = lib.VMS_TABLE_2M
TABLE_1G: int = lib.VMS_TABLE_1G
TABLE_SNOOP: int = lib.VMS_TABLE_SNOOP
UNMAP_DEFER: int = lib.VMS_UNMAP_DEFER
FLUSH_KEEP_OWN: int = lib.VMS_FLUSH_KEEP_OWN

#: (first IOVA, last IOVA, GPA of the first, prot, level) of a mapping, or of what a walk has found.
Mapped = tuple[int, int, int, int, int]


def _mapped(m: Any) -> Mapped:
    return m.start, m.last, m.gpa, m.prot, m.level


class Budget:
    """Bytes of memory that the mappings of several domains may take together."""

    def __init__(self, limit: int) -> None:
        self.handle = _create(lib.vms_budget_create, lib.vms_budget_destroy, "vms_budget", limit)

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
        return cls(_create(lib.vms_domain_create, lib.vms_domain_destroy, "vms_domain", kind))

    @classmethod
    def paging(
        cls, page_sizes: int, first: int, last: int, last_gpa: int, max_mappings: int, budget: Budget | None = None
    ) -> Domain:
        """One that keeps its mappings, in memory of `budget`."""
        taken_from = ffi.NULL if budget is None else budget.handle
        limits = (page_sizes, first, last, last_gpa, max_mappings, taken_from)
        return cls(_create(lib.vms_domain_create_paging, lib.vms_domain_destroy, "vms_domain", *limits))

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
        create = lib.vms_domain_create_table
        return cls(_create(create, lib.vms_domain_destroy, "vms_domain", memory.handle, table, above), (memory, parent))

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
            _raise_fault(rc, fault)
        return _mapped(out)

    def list(self) -> Iterator[Mapped]:
        """All mappings, ascending."""
        room, iova = 256, 0
        out = ffi.new("vms_mapping[]", room)
        while True:
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


class ByMessage(Exception):
    """Not a fault: [gpa, gpa+size) has no file, so the next piece goes by DMA_READ or DMA_WRITE."""

    def __init__(self, gpa: int, size: int, done: int) -> None:
        super().__init__(f"{size} bytes at gpa {gpa:#x} go by message")
        self.gpa = gpa
        self.size = size
        self.done = done


def _raise_fault(rc: int, fault: Any) -> None:
    if rc != -errno.EFAULT:  # an argument was wrong: the fault was not filled
        check(rc)
    if fault.reason == _REASON_NO_FILE:
        raise ByMessage(fault.gpa, fault.len, fault.done)
    raise DmaFault(
        Reason(fault.reason),
        fault.iova,
        Access(fault.access),
        fault.done,
        None if fault.pasid == NO_PASID else fault.pasid,
        gpa=fault.gpa,
        level=fault.level,
        stage=fault.stage,
    )


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


class Requester:
    """What issues DMA.  Any thread may call it.

    Buffers are released before an error is raised: whoever keeps the error keeps this frame, and the collector of
    CPython 3.11 crashes where a cycle has a memoryview that is exported.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.handle = _create(lib.vms_requester_create, lib.vms_requester_destroy, "vms_requester", memory.handle)
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
            _raise_fault(rc, fault)

    def attach(self, domain: Domain | None, pasid: int = NO_PASID) -> None:
        """Accesses with this PASID go through `domain` from now on; None as in vms_requester_attach."""
        check(lib.vms_requester_attach(self.handle, pasid, ffi.NULL if domain is None else domain.handle))

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
        """`size` bytes from `iova` on."""
        local = self._local
        fault = local.fault
        scratch = local.scratch if size <= _SCRATCH else ffi.new("char[]", size)
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


class Policy:
    """What a write or a read of each byte of a bank does; see vms_bank_policy.  Everything allowed at first."""

    def __init__(self, size: int) -> None:
        self.store, self.w1c, self.w1s, self.rc, self.exits = (bytearray(size) for _ in range(5))
        self.sizes = bytearray([ALL_SIZES]) * size

    def __len__(self) -> int:
        return len(self.store)

    def arrays(self) -> tuple[bytearray, ...]:
        """In the order of vms_policy's members."""
        return self.store, self.w1c, self.w1s, self.rc, self.exits, self.sizes


@dataclass(frozen=True)
class FunctionStats:
    """Counters of one function since it was made; see vms_func_stats."""

    messages: int
    reads: int
    writes: int
    served: int
    exits: int
    rejected: int


class Function:
    """One PCI function's regions: backing store and who answers each byte."""

    def __init__(self) -> None:
        self.handle = _create(lib.vms_func_create, lib.vms_func_destroy, "vms_func")
        self._stats = ffi.new("vms_func_stats *")

    def define_region(self, region: int, size: int, *, fill: int = 0xFF, writable: bool = True) -> None:
        check(lib.vms_region_define(self.handle, region, size, fill, writable))

    def enable_region(self, region: int, on: bool) -> None:
        check(lib.vms_region_enable(self.handle, region, on))

    def tap_region(self, region: int, exits: int) -> None:
        """All accesses of these kinds (EXIT_ON_*) exit; 0: as their policy says."""
        check(lib.vms_region_tap(self.handle, region, exits))

    def _view(self, pointer: Any, size: int) -> memoryview:
        # The view keeps the function alive, not only its memory's address.
        handle = self.handle
        owner = ffi.gc(ffi.cast("uint8_t *", pointer), lambda _: handle)
        return memoryview(ffi.buffer(owner, size)).cast("B")

    def add_bank(self, region: int, start: int, size: int) -> memoryview:
        out = ffi.new("uint8_t **")
        check(lib.vms_area_bank(self.handle, region, start, size, out))
        return self._view(out[0], size)

    def add_ram(self, region: int, start: int, size: int, *, mappable: bool = False) -> memoryview:
        out = ffi.new("uint8_t **")
        check(lib.vms_area_ram(self.handle, region, start, size, mappable, out))
        return self._view(out[0], size)

    def add_hook(self, region: int, start: int, size: int) -> None:
        check(lib.vms_area_hook(self.handle, region, start, size))

    def set_policy(self, region: int, start: int, policy: Policy) -> None:
        """Sets the policy of the bytes from `start` on; all of them in one bank."""
        arrays = [ffi.from_buffer("uint8_t[]", array) for array in policy.arrays()]
        check(lib.vms_bank_policy(self.handle, region, start, len(policy), ffi.new("vms_policy *", arrays)))

    def region_fd(self, region: int) -> int | None:
        out = ffi.new("int *")
        try:
            check(lib.vms_region_fd(self.handle, region, out))
        except FileNotFoundError:
            return None
        return int(out[0])

    def plain_read(self, region: int, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        check(lib.vms_region_read(self.handle, region, offset, ffi.from_buffer("uint8_t[]", buffer), count))
        return bytes(buffer)

    def plain_write(self, region: int, offset: int, data: bytes) -> None:
        check(lib.vms_region_write(self.handle, region, offset, data, len(data)))

    def wake(self) -> None:
        """Any thread: ends the wait of the function's loop."""
        check(lib.vms_wake(self.handle))

    def watch(self, eventfd: int, cookie: int) -> None:
        check(lib.vms_watch(self.handle, eventfd, cookie))

    def unwatch(self, eventfd: int) -> None:
        check(lib.vms_unwatch(self.handle, eventfd))

    def signal(self, eventfd: int) -> None:
        """Adds 1 to a client's eventfd, full or not; never waits."""
        rc = _signal(self.handle, eventfd)
        if rc:
            check(rc)

    def idle(self, listener: int, deadline_ns: int) -> tuple[int, int]:
        """Waits without a connection: (EXIT_*, cookie); EXIT_COMMAND means that the listener is readable."""
        cookie = ffi.new("uint16_t *")
        return check(lib.vms_idle(self.handle, listener, deadline_ns, cookie)), int(cookie[0])

    def stats(self) -> FunctionStats:
        lib.vms_func_stats_get(self.handle, self._stats)
        s = self._stats
        return FunctionStats(s.messages, s.reads, s.writes, s.served, s.exits, s.rejected)


def key(region: int, offset: int, count: int) -> int:
    """An access as one number; see vms_key."""
    return int(lib.vms_key(region, offset, count))


class Channel:
    """One vfio-user connection; belongs to one thread, but for `shutdown`."""

    def __init__(
        self, function: Function, memory: Memory, socket: int, max_xfer: int, max_fds: int, send_ms: int
    ) -> None:
        self.function = function
        self.memory = memory
        self.handle = _create(
            lib.vms_chan_create,
            lib.vms_chan_destroy,
            "vms_chan",
            function.handle,
            memory.handle,
            socket,
            max_xfer,
            max_fds,
            send_ms,
        )
        #: The C struct that `enter` fills; see vms_run.
        self.run = lib.vms_chan_run(self.handle)

    def open(self, peer_xfer: int, twin: int) -> None:
        check(lib.vms_chan_open(self.handle, peer_xfer, twin))

    def enter(self, deadline_ns: int) -> int:
        """Serves the client until Python is needed; the EXIT_* reason."""
        rc = _enter(self.handle, deadline_ns)
        if rc:
            check(rc)
        return self.run.reason  # type: ignore[no-any-return]

    def complete(self) -> None:
        """Completes the access at hand and sends what is still unsent."""
        check(lib.vms_complete(self.handle))

    def payload(self) -> bytes:
        """The payload of the COMMAND, REPLY or WRITE at hand."""
        run = self.run
        return bytes(ffi.buffer(run.data, run.len)) if run.len else b""

    def accesses(self) -> bytes:
        """The vms_access structs of the POSTED exit at hand, packed."""
        run = self.run
        return bytes(ffi.buffer(run.accesses, run.n_accesses * ACCESS.size))

    def fds(self) -> list[int]:
        """The fds of the COMMAND at hand, now the caller's to close."""
        run = self.run
        return [run.fds[i] for i in range(run.n_fds)]

    def fill(self, data: bytes) -> None:
        """The answer to a READ of more than 8 bytes."""
        ffi.memmove(self.run.data, data, len(data))

    def reply(self, id: int, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        check(lib.vms_reply(self.handle, id, command, 0, payload, len(payload), list(fds), len(fds)))

    def reply_error(self, id: int, command: int, code: int) -> None:
        check(lib.vms_reply(self.handle, id, command, code, ffi.NULL, 0, ffi.NULL, 0))

    def command(self, id: int, command: int, head: bytes, data: Any = b"", size: int = 0) -> None:
        check(lib.vms_command(self.handle, id, command, head, len(head), data, size))

    def shutdown(self) -> None:
        """Any thread: ends the connection."""
        lib.vms_chan_shutdown(self.handle)  # ENOTCONN: it is gone already, which is what was asked for

    def close(self) -> None:
        ffi.release(self.handle)
