"""The fast path: plain Reads and Writes are carried out by the shim, without Python (see c_shim/nvme.c).

The rings of all queues live in the shim; the general path of `queue` works on the same ones.  Which namespaces are
plain is looked at anew after each command that went the general way: nothing else changes it.
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

#: Threads for files: as many commands can wait for the disk at a time.
_THREADS = 4
#: Bytes that workers have in hand before queues wait: those of the shim's commands, and as many of Python's.
HELD = 64 * MiB


class FastHost(Protocol):
    """The controller as the fast path sees it."""

    @property
    def function(self) -> FunctionRegions:
        """The shim's function, to which workers report."""

    arbiter: Arbiter
    dma: Dma
    health: Health
    page_size: int
    max_transfer: int

    @property
    def write_cache(self) -> bool:
        """As with IoHost."""

    def namespace(self, nsid: int) -> IoNamespace:
        """As with IoHost."""

    def namespaces(self) -> Iterable[IoNamespace]:
        """As with IoHost."""


class FastPath:
    """Rings, workers, and the loop over both.  `enabled` False: every command goes the general way."""

    def __init__(self, host: FastHost, *, enabled: bool = True) -> None:
        self._host = host
        self.enabled = enabled
        self.workers = Workers(host.function, _THREADS)
        self._rings = Rings(host.dma.requester, self.workers)
        self._known: set[int] = set()
        self._stale = True
        #: Commands that workers have in hand.
        self._deferred = 0
        #: Bytes of Python's commands that workers have in hand, and queues that wait until that is less.
        self._held = 0
        self._waiting: dict[int, SubmissionQueue] = {}
        self._submission: dict[int, SubmissionQueue] = {}
        self._completion: dict[int, CompletionQueue] = {}

    def add_submission(self, queue: SubmissionQueue) -> Any:
        """A queue is created: its ring, a vms_nvme_sq."""
        self._submission[queue.qid] = queue
        return self._rings.submission(queue.qid)

    def add_completion(self, queue: CompletionQueue) -> Any:
        """Likewise, a vms_nvme_cq."""
        self._completion[queue.qid] = queue
        return self._rings.completion(queue.qid)

    @property
    def busy(self) -> bool:
        """Workers have as much data in hand as they may: no command is taken from I/O queues."""
        return self._held >= HELD or (self._deferred > 0 and self._rings.held() >= HELD)

    def hold(self, size: int) -> None:
        """Workers have a job of Python's, which counts as `size` bytes until it is released."""
        self._held += size

    def release(self, size: int) -> None:
        """It is done, or was taken back."""
        self._held -= size
        self._go_on()

    def wait(self, queue: SubmissionQueue) -> None:
        """Lets a queue run when workers are not busy any more."""
        self._waiting[queue.qid] = queue

    def _go_on(self) -> None:
        if self._waiting and not self.busy:
            waiting, self._waiting = self._waiting, {}
            for queue in waiting.values():
                self._host.arbiter.ring(queue)

    def changed(self) -> None:
        """A command may have changed what is plain."""
        self._stale = True

    def run(self, qid: int, count: int) -> tuple[int, int]:
        """Carries out up to `count` plain commands: why it has stopped, and how many there were."""
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
        self._forget(self._known - found)
        self._known, self._stale = found, False

    def _forget(self, nsids: set[int]) -> None:
        for nsid in nsids:
            self._rings.namespace(nsid, None, 9, 0, 0)

    def collect(self) -> None:
        """Ends what workers have done."""
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
            # It has failed: once more the general way, which knows what that means.
            self._submission[result.sq].carry_out(NvmeCommand.parse(self._rings.command()))

    def settle(self) -> None:
        """Waits for all that workers have in hand, and ends it."""
        while self._deferred or len(self.workers):
            self.workers.settle()
            self.collect()

    def abort(self, qid: int, cid: int) -> bool:
        """Takes a command back from the workers; False: they do not have it, or have begun."""
        done = self._deferred > 0 and self._rings.abort(qid, cid)
        self._deferred -= done
        self._go_on()
        return done

    def reset(self) -> None:
        """The queues are gone.  Returns when no worker has anything of theirs any more."""
        self._rings.reset()
        self._deferred = 0
        self._waiting.clear()
        self._submission.clear()
        self._completion.clear()
        self._stale = True

    def close(self) -> None:
        """Lets go of the namespaces."""
        self.reset()
        self._forget(self._known)
        self._known.clear()
