"""Runs cases on an existing Dask cluster: `Cluster` is the client's side, `perform_remotely` runs in its workers.

Artefacts return with the result, so the workers need no access to the campaign's folder.  Files that a case reads
(machine file, programs, kernels) must exist on the workers at the same paths.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmodel.campaign.executor import Answer, Task
from vmodel.campaign.rig import plain
from vmodel.campaign.worker import Processes
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case, Result
from vmodel.guest.keeper import removing
from vmodel.patience import patience

#: Seconds after which an idle process is ended, with its guest.
_IDLE = 30.0
#: Seconds to wait for the scheduler's first answer.
_CONNECT = 10.0


class Cluster:
    """Runs tasks on a cluster's workers, one in each of their threads: see Executor."""

    def __init__(self, rig: str, address: str) -> None:
        """ConfigError: Dask is not installed, or no scheduler answers."""
        if not re.fullmatch(r"[a-z]+://[^/\s]+", address):
            raise ConfigError(f"--scheduler {address}: must be an address, as tcp://host:8786")
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError as error:
            raise ConfigError(f"--scheduler needs Dask ({error}): pip install distributed") from error
        try:
            self._client = distributed.Client(address, timeout=patience(_CONNECT), set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"--scheduler {address}: no scheduler answers: {text}") from error
        self._address = address
        self._rig = rig
        self._session = uuid.uuid4().hex[:8]
        self._tasks: dict[Any, Task] = {}
        self._done: Any = distributed.as_completed(loop=self._client.loop)

    @property
    def free(self) -> int:
        """How many more tasks can be submitted now."""
        # Twice the number of threads, so that no thread idles until the next submit().
        threads = sum(map(int, self._client.nthreads().values()))
        return max(2 * threads, 2) - len(self._tasks)

    def submit(self, task: Task) -> None:
        """Submits a task to the scheduler."""
        name = f"vmodel-{self._session}-{task.id}-{uuid.uuid4().hex[:8]}"
        future = self._client.submit(perform_remotely, self._rig, plain(task.case), key=name, pure=False)
        self._tasks[future] = task
        self._done.add(future)

    def wait(self) -> Sequence[Answer]:
        """Blocks until a task has ended; returns the new answers.

        ConfigError: a rig found a mistake of the user's, or the connection to the scheduler is lost.
        """
        answers = [self._answer(future) for future in self._done.next_batch()]
        return [answer for answer in answers if answer is not None]

    def _answer(self, future: Any) -> Answer | None:
        task = self._tasks.pop(future)
        if future.status == "finished":
            result, rig, died, packed = future.result()
            unpack(packed, task.folder)
            return Answer(task, None if result is None else Result.model_validate(result), rig, died)
        if future.status == "error":
            error = future.exception()
            if isinstance(error, ConfigError):
                raise error
            # The scheduler has already tried the task on several workers.
            return Answer(task, None, died=f"{type(error).__name__}: {error}", retry=False)
        if self._client.status != "running" or future.status == "cancelled":
            raise ConfigError(f"--scheduler {self._address}: the connection to the scheduler is lost")
        # The task ended, but its worker died before the result arrived: the scheduler runs the task again.
        self._tasks[future] = task
        self._done.add(future)
        return None

    def close(self) -> None:
        """Cancels the tasks that are running, and disconnects."""
        for future in self._tasks:
            with contextlib.suppress(OSError, RuntimeError):  # the connection may be lost
                future.cancel(force=True)
        self._tasks.clear()
        self._client.close(timeout=patience(_CONNECT))


# ---- in the cluster's workers -----------------------------------------------------------------------


class _Pool:
    """Idle worker processes, kept for `_IDLE` seconds: booting a guest takes longer than most cases."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[str, Processes, threading.Timer]] = []

    def take(self, rig: str) -> Processes:
        """An idle process for this rig, or a new one."""
        with self._lock:
            for entry in self._idle:
                if entry[0] == rig:
                    entry[2].cancel()
                    self._idle.remove(entry)
                    return entry[1]
        # Output of models goes to the stderr of the cluster's worker.
        return Processes(rig, 1, os.fdopen(os.dup(2), "ab"))

    def put(self, rig: str, processes: Processes) -> None:
        """Returns a process to the pool."""
        timer = threading.Timer(_IDLE, self._end, (processes,))
        timer.daemon = True
        with self._lock:
            self._idle.append((rig, processes, timer))
        timer.start()

    def _end(self, processes: Processes) -> None:
        with self._lock:
            kept = [entry for entry in self._idle if entry[1] is not processes]
            taken = len(kept) == len(self._idle)
            self._idle = kept
        if not taken:
            processes.close()


_pool = _Pool()


def perform_remotely(rig: str, case: dict[str, Any]) -> tuple[dict[str, Any] | None, str, str, bytes]:
    """Runs a case in a process of its own, on a cluster's worker.

    Returns (result or None, the rig's id, how the process died or "", the artefacts as by `pack`).
    """
    processes = _pool.take(rig)
    folder = Path(tempfile.mkdtemp(prefix="vmodel-run-"))
    with removing(folder):
        try:
            processes.submit(Task(0, Case.model_validate(case), folder))
            (answer,) = processes.wait()
        except BaseException:
            processes.close()
            raise
        _pool.put(rig, processes)
        result = None if answer.result is None else answer.result.model_dump(mode="json")
        return result, answer.rig, answer.died, pack(folder)


def pack(folder: Path) -> bytes:
    """The regular files and folders below `folder`, as a gzipped tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=3) as archive:
        archive.add(folder, arcname=".", filter=lambda member: member if member.isfile() or member.isdir() else None)
    return out.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Extracts the files of `pack` into `folder`, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        archive.extractall(folder, filter="data")
