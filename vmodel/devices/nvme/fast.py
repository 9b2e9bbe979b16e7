"""The fast path: the shim carries out plain Reads and Writes without Python (see c_shim/nvme.c).

The shim has the rings of all queues; the general path in `queue` works on the same rings.  Only commands on the general
path can change which namespaces are plain, so that is updated after each of those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vmodel._shim import FunctionRegions
from vmodel._shim.nvme import BUSY, EMPTY, FULL, OTHER, READ, SYNC, TURN, WRITE, Rings
from vmodel._shim.store import Workers
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.health import Health
from vmodel.devices.nvme.status import CommandError
from vmodel.dma import Dma
from vmodel.span import MiB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmodel.devices.nvme.arbiter import Arbiter
    from vmodel.devices.nvme.io import IoNamespace
    from vmodel.devices.nvme.queue import CompletionQueue, SubmissionQueue

__all__ = ["BUSY", "EMPTY", "FULL", "OTHER", "TURN", "FastPath"]

#: Worker threads: as many commands can wait for the disk at a time.
_THREADS = 4
#: Bytes of jobs given to workers above which queues wait; one limit for the shim's commands and one for Python's.
HELD = 64 * MiB


class FastHost(Protocol):
    """The controller as the fast path sees it."""

    @property
    def function(self) -> FunctionRegions:
        """The shim's function, which workers wake."""

    arbiter: Arbiter
    dma: Dma
    health: Health
    page_size: int
    max_transfer: int

    @property
    def write_cache(self) -> bool:
        """As in IoHost."""

    def namespace(self, nsid: int) -> IoNamespace:
        """As in IoHost."""

    def namespaces(self) -> Iterable[IoNamespace]:
        """As in IoHost."""


class FastPath:
    """The rings, the workers, and the loop over both.  `enabled` False: all commands take the general path."""

    def __init__(self, host: FastHost, *, enabled: bool = True) -> None:
        self._host = host
        self.enabled = enabled
        self.workers = Workers(host.function, _THREADS)
        self._rings = Rings(host.dma.requester, self.workers)
        self._known: set[int] = set()
        self._stale = True
        #: The shim's commands that workers have.
        self._deferred = 0
        #: Bytes of the jobs of Python's commands that workers have, and the queues that wait until that is less.
        self._held = 0
        self._waiting: dict[int, SubmissionQueue] = {}
        self._submission: dict[int, SubmissionQueue] = {}
        self._completion: dict[int, CompletionQueue] = {}

    def add_submission(self, queue: SubmissionQueue) -> Any:
        """Adds a submission queue; returns its ring, a vms_nvme_sq."""
        self._submission[queue.qid] = queue
        return self._rings.submission(queue.qid)

    def add_completion(self, queue: CompletionQueue) -> Any:
        """Adds a completion queue; returns its ring, a vms_nvme_cq."""
        self._completion[queue.qid] = queue
        return self._rings.completion(queue.qid)

    @property
    def busy(self) -> bool:
        """Whether workers have as many jobs as they may, so that no command is taken from I/O queues."""
        return self._held >= HELD or (self._deferred > 0 and self._rings.held() >= HELD)

    def hold(self, size: int) -> None:
        """Counts a job of Python's that workers have as `size` bytes, until `release`."""
        self._held += size

    def release(self, size: int) -> None:
        """Ends the count of a job that is done or cancelled."""
        self._held -= size
        self._go_on()

    def wait(self, queue: SubmissionQueue) -> None:
        """Rings a queue once workers are not busy any more."""
        self._waiting[queue.qid] = queue

    def _go_on(self) -> None:
        if self._waiting and not self.busy:
            waiting, self._waiting = self._waiting, {}
            for queue in waiting.values():
                self._host.arbiter.ring(queue)

    def changed(self) -> None:
        """Requests an update of the plain namespaces, which a command may have changed."""
        self._stale = True

    def run(self, qid: int, count: int) -> tuple[int, int]:
        """Carries out up to `count` plain commands; returns (why it has stopped, how many there were)."""
        if self._stale:
            self._refresh()
        stop = self._rings.run(qid, count)
        result = self._rings.result
        taken: int = result.taken
        if taken:
            self._deferred += result.deferred
            self._count()
        return stop, taken

    def _count(self) -> None:
        result, health = self._rings.result, self._host.health
        health.reads += result.reads
        health.writes += result.writes
        health.written |= result.writes > 0
        health.bytes_read += result.read_bytes
        health.bytes_written += result.write_bytes

    def _refresh(self) -> None:
        host, found = self._host, set()
        self._rings.set(host.page_size, host.max_transfer)
        for namespace in host.namespaces():
            flags = 0 if namespace.uncorrectable else READ if namespace.read_only else READ | WRITE
            try:
                host.namespace(namespace.nsid)
            except CommandError:
                flags = 0
            if flags:
                if not host.write_cache:
                    flags |= SYNC
                found.add(namespace.nsid)
                shift, blocks = namespace.lba_shift, namespace.blocks
                self._rings.namespace(namespace.nsid, namespace.backend.store, shift, blocks, flags)
        self._remove(self._known - found)
        self._known, self._stale = found, False

    def _remove(self, nsids: set[int]) -> None:
        for nsid in nsids:
            self._rings.namespace(nsid, None, 9, 0, 0)

    def collect(self) -> None:
        """Completes the commands that workers have finished."""
        self.workers.collect()
        if self._deferred:
            self._collect()
            self._go_on()

    def _collect(self) -> None:
        while self._deferred:
            stop, result = self._rings.collect(), self._rings.result
            self._deferred -= result.taken
            self._count()
            for n, bits in enumerate(result.posted):
                while bits:
                    lowest = bits & -bits
                    self._completion[64 * n + lowest.bit_length() - 1].posted()
                    bits ^= lowest
            if stop == EMPTY:
                return
            # The job has failed: the general path repeats it, and reports the error.
            self._submission[result.sq].carry_out(NvmeCommand.parse(self._rings.command()))

    def settle(self) -> None:
        """Waits until workers have finished all jobs, and completes their commands."""
        while self._deferred or len(self.workers):
            self.workers.settle()
            self.collect()

    def abort(self, qid: int, cid: int) -> bool:
        """Cancels a command that waits for a worker; returns False if none waits, or a worker has begun it."""
        done = self._deferred > 0 and self._rings.abort(qid, cid)
        self._deferred -= done
        self._go_on()
        return done

    def reset(self) -> None:
        """Removes all queues; returns when no worker uses their memory any more."""
        self._rings.reset()
        self._deferred = 0
        self._waiting.clear()
        self._submission.clear()
        self._completion.clear()
        self._stale = True

    def close(self) -> None:
        """Removes all queues and releases the namespaces."""
        self.reset()
        self._remove(self._known)
        self._known.clear()
