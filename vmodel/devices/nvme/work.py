"""Background work on whole namespaces, piece by piece: Format, Sanitize, Device Self-test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from vmodel.devices.nvme.backend import Job
from vmodel.devices.nvme.namespace import Namespace

#: Bytes of a piece that moves data, and of one that only frees space.
PIECE, LARGE_PIECE = 1 << 20, 1 << 28


class _Host(Protocol):
    def defer(self, call: Callable[[], None]) -> None: ...


class Work:
    """A sequence of jobs; commands are served between two jobs."""

    def __init__(
        self,
        host: _Host,
        jobs: Iterable[tuple[Namespace, Job]],
        done: Callable[[Failure | None], None],
        *,
        total: int = 0,
    ) -> None:
        """`done` is called once, when all jobs are done or one has failed; `total`: bytes of all, for `progress`.

        The work starts at the first `resume`.
        """
        self._host = host
        self._jobs = iter(jobs)
        self._current: tuple[Namespace, Job] | None = None
        self._total, self._bytes = total, 0
        self._done: Callable[[Failure | None], None] | None = done
        self._turn = 0

    @property
    def progress(self) -> float:
        """The completed part, from 0 to 1."""
        return self._bytes / self._total if self._total else 0.0

    def resume(self) -> None:
        """Starts the work, or continues it after a reset, which drops deferred calls; a piece may be repeated."""
        self._turn += 1
        turn = self._turn
        self._host.defer(lambda: self._step(turn))

    def cancel(self) -> None:
        """Stops the work: no further piece is begun, and `done` is not called."""
        self._turn += 1
        self._done = None

    def _step(self, turn: int) -> None:
        if turn != self._turn or self._done is None:
            return
        if self._current is None:
            self._current = next(self._jobs, None)
        if self._current is None:
            self._end(None)
            return
        namespace, job = self._current

        def ended(code: int) -> None:
            if turn != self._turn or self._done is None:
                return
            if code:
                self._end(Failure(namespace, job, code))
                return
            self._current = None
            self._bytes += job.length
            self._host.defer(lambda: self._step(turn))

        namespace.backend.submit(job, ended)

    def _end(self, failure: Failure | None) -> None:
        done, self._done = self._done, None
        assert done is not None
        done(failure)


class Failure:
    """The job that has failed; `code` is an errno."""

    def __init__(self, namespace: Namespace, job: Job, code: int) -> None:
        self.namespace = namespace
        self.job = job
        self.code = code

    @property
    def lba(self) -> int:
        """The first block of the failed piece."""
        return self.job.offset >> self.namespace.lba_shift


def pieces(size: int, piece: int) -> Iterable[tuple[int, int]]:
    """Splits `size` bytes into pieces: (offset, length) of each, at most `piece` bytes long."""
    return ((at, min(piece, size - at)) for at in range(0, size, piece))
