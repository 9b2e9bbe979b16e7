"""The hot loop of an NVMe controller; see vms_nvme_*."""

from __future__ import annotations

import errno
from typing import Any

from vmodel._shim.handle import check, create
from vmodel._shim.requester import Requester
from vmodel._shim.store import Store, Workers
from vmodel._vmshim import ffi, lib

QUEUES: int = lib.VMS_NVME_QUEUES
NAMESPACES: int = lib.VMS_NVME_NAMESPACES
READ: int = lib.VMS_NVME_READ
WRITE: int = lib.VMS_NVME_WRITE
SYNC: int = lib.VMS_NVME_SYNC
EMPTY: int = lib.VMS_NVME_EMPTY
TURN: int = lib.VMS_NVME_TURN
FULL: int = lib.VMS_NVME_FULL
BUSY: int = lib.VMS_NVME_BUSY
OTHER: int = lib.VMS_NVME_OTHER

_run_queue = lib.vms_nvme_run_queue


class Rings:
    """Rings of all queues, and the loop over them.  All methods belong to the device's thread."""

    def __init__(self, requester: Requester, workers: Workers) -> None:
        self._requester = requester
        self._handle = create(lib.vms_nvme_create, lib.vms_nvme_destroy, "vms_nvme", requester.handle, workers.handle)
        #: What `run` and `collect` have come to: a vms_nvme_run.
        self.result: Any = ffi.new("vms_nvme_run *")

    def submission(self, qid: int) -> Any:
        """The vms_nvme_sq of a queue; lives as long as this object."""
        return lib.vms_nvme_sq_at(self._handle, qid)

    def completion(self, qid: int) -> Any:
        """The vms_nvme_cq of a queue, likewise."""
        return lib.vms_nvme_cq_at(self._handle, qid)

    def set(self, page_size: int, max_transfer: int) -> None:
        check(lib.vms_nvme_set(self._handle, page_size, max_transfer))

    def namespace(self, nsid: int, store: Store | None, shift: int, blocks: int, flags: int) -> None:
        handle = ffi.NULL if store is None else store.handle
        check(lib.vms_nvme_namespace(self._handle, nsid, handle, shift, blocks, flags))

    def run(self, qid: int, count: int) -> int:
        """Carries out plain commands of a queue; why it has stopped (EMPTY, ...)."""
        result = self.result
        rc = _run_queue(self._handle, qid, count, result)
        if rc:
            self._noted(rc)
        return result.stop  # type: ignore[no-any-return]

    def collect(self) -> int:
        """Completes what workers have done; EMPTY, or OTHER."""
        rc = lib.vms_nvme_collect(self._handle, self.result)
        if rc:
            self._noted(rc)
        return self.result.stop  # type: ignore[no-any-return]

    def command(self) -> bytes:
        """The command that `collect` has stopped at."""
        return bytes(ffi.buffer(self.result.command))

    def _noted(self, rc: int) -> None:
        check(rc)
        if self._requester.on_stale is not None and (notes := self._requester.stale()):
            self._requester.on_stale(notes)

    def abort(self, qid: int, cid: int) -> bool:
        """Takes a command back from the workers."""
        rc = lib.vms_nvme_abort(self._handle, qid, cid)
        if rc == -errno.ENOENT:
            return False
        check(rc)
        return True

    def held(self) -> int:
        """Bytes of the commands that workers have in hand."""
        return int(lib.vms_nvme_held(self._handle))

    def reset(self) -> None:
        """A reset: waits for workers, empties all rings."""
        lib.vms_nvme_reset(self._handle)
