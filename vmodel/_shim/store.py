"""Blocks in memory or in a file, and the threads that wait for them; see vms_store_* and vms_workers_*."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from vmodel._shim.function import FunctionRegions
from vmodel._shim.handle import check, create
from vmodel._vmshim import ffi, lib

READ: int = lib.VMS_STORE_READ
WRITE: int = lib.VMS_STORE_WRITE
COMPARE: int = lib.VMS_STORE_COMPARE
COMPARE_WRITE: int = lib.VMS_STORE_COMPARE_WRITE
ZERO: int = lib.VMS_STORE_ZERO
DISCARD: int = lib.VMS_STORE_DISCARD
VERIFY: int = lib.VMS_STORE_VERIFY
SYNC: int = lib.VMS_STORE_SYNC

#: Jobs that are collected at once.
_ROOM = 64

#: (operation, offset, length, data, expected, sync), as the members of vms_job.
Job = tuple[int, int, int, Any, Any, bool]


class _Filled:
    """A vms_job, and what must not go away before it is done."""

    def __init__(self, job: Job, cookie: int = 0) -> None:
        op, offset, length, data, expected, sync = job
        self._data, self._expected = (
            ffi.NULL if buffer is None else ffi.from_buffer(buffer) for buffer in (data, expected)
        )
        for buffer in (self._data, self._expected):
            if buffer != ffi.NULL and len(buffer) < length:
                raise ValueError(f"{len(buffer)} bytes for a job of {length}")
        self.struct = ffi.new("vms_job *", (op, sync, offset, length, self._data, self._expected, cookie, 0))

    def release(self) -> None:
        for buffer in (self._data, self._expected):
            if buffer != ffi.NULL:
                ffi.release(buffer)


class Store:
    """`size` bytes; `view` is the bytes themselves, None for a file."""

    def __init__(self, handle: Any, size: int) -> None:
        self.handle = handle
        self.size = size
        memory = lib.vms_store_memory(handle)
        self.view: memoryview | None = None
        if memory != ffi.NULL:
            # The view keeps the store alive, not only its memory's address.
            owner = ffi.gc(memory, lambda _: handle)
            self.view = memoryview(ffi.buffer(owner, size)).cast("B")

    @classmethod
    def memory(cls, size: int) -> Store:
        """Zeros.  OSError(ENOMEM)."""
        return cls(create(lib.vms_store_create_memory, lib.vms_store_destroy, "vms_store", size), size)

    @classmethod
    def file(cls, fd: int, size: int) -> Store:
        """The first `size` bytes of a file; `fd` stays the caller's."""
        return cls(create(lib.vms_store_create_file, lib.vms_store_destroy, "vms_store", fd, size), size)

    def run(self, job: Job) -> int:
        """Does a job now: 0, or an errno."""
        filled = _Filled(job)
        rc = lib.vms_store_run(self.handle, filled.struct)
        filled.release()
        return -int(rc)


class Workers:
    """Threads; they wake `function` when something is done.  All methods belong to the device's thread."""

    def __init__(self, function: FunctionRegions, threads: int) -> None:
        self._pending: dict[int, tuple[_Filled, Callable[[int], None]]] = {}
        self.handle = create(lib.vms_workers_create, lib.vms_workers_destroy, "vms_workers", function.handle, threads)
        self._cookies = itertools.count(1)
        self._out = ffi.new("vms_job[]", _ROOM)

    def __len__(self) -> int:
        """Jobs that are not collected yet."""
        return len(self._pending)

    def submit(self, store: Store, job: Job, done: Callable[[int], None]) -> int:
        """Has a job done; `collect` will call `done` with 0 or an errno.  A number for `revoke`."""
        cookie = next(self._cookies)
        filled = _Filled(job, cookie)
        check(lib.vms_workers_submit(self.handle, store.handle, filled.struct))
        self._pending[cookie] = filled, done
        return cookie

    def revoke(self, cookie: int) -> bool:
        """Takes a job back: its `done` is not called; False: it has begun, or is done."""
        if cookie not in self._pending or lib.vms_workers_revoke(self.handle, cookie):
            return False
        self._pending.pop(cookie)[0].release()
        return True

    def collect(self) -> None:
        """Ends what is done.  To be called after each wake-up: the next one comes only after that."""
        while n := lib.vms_workers_collect(self.handle, self._out, _ROOM):
            for cookie, error in [(job.cookie, job.error) for job in self._out[0:n]]:
                filled, done = self._pending.pop(cookie)
                filled.release()
                done(error)

    def settle(self) -> None:
        """Waits until all is done; it is still to be collected."""
        lib.vms_workers_settle(self.handle)

    def __del__(self) -> None:
        # Buffers of jobs that are under way must not go before those have ended.
        if self._pending:
            for cookie in list(self._pending):
                self.revoke(cookie)
            self.settle()
