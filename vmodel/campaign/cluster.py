"""A Dask cluster that is there already: `Cluster` here, and `perform_there`, which runs in its workers.

Artefacts travel back with the result, so that the workers need not see the campaign's folder.  What a case reads
(machine file, programs, kernels) they must have at the same paths.
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

#: Seconds after which a process that has nothing to do is ended, with its guest.
_IDLE = 30.0
#: Seconds for the scheduler to answer at first.
_CONNECT = 10.0


class Cluster:
    """Runs tasks on a cluster's workers, one a thread of theirs: see Executor."""

    def __init__(self, rig: str, address: str) -> None:
        """ConfigError: Dask is not installed, or no scheduler answers."""
        if not re.fullmatch(r"[a-z]+://[^/\s]+", address):
            raise ConfigError(f"--scheduler {address}: must be an address, as tcp://host:8786")
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError as error:
            raise ConfigError(f"--scheduler needs Dask ({error}): pip install 'vmodel[cluster]'") from error
        try:
            self._client = distributed.Client(address, timeout=_CONNECT, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"--scheduler {address}: no scheduler answers there: {text}") from error
        self._address = address
        self._rig = rig
        self._session = uuid.uuid4().hex[:8]
        self._tasks: dict[Any, Task] = {}
        self._done: Any = distributed.as_completed(loop=self._client.loop)

    @property
    def free(self) -> int:
        # Some more than it has threads for, so that none waits for us.
        threads = sum(map(int, self._client.nthreads().values()))
        return max(2 * threads, 2) - len(self._tasks)

    def submit(self, task: Task) -> None:
        name = f"vmodel-{self._session}-{task.id}-{uuid.uuid4().hex[:8]}"
        future = self._client.submit(perform_there, self._rig, plain(task.case), key=name, pure=False)
        self._tasks[future] = task
        self._done.add(future)

    def wait(self) -> Sequence[Answer]:
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
            # The scheduler has tried it on several workers by then.
            return Answer(task, None, died=f"{type(error).__name__}: {error}", again=False)
        if self._client.status != "running" or future.status == "cancelled":
            raise ConfigError(f"--scheduler {self._address}: the scheduler has gone")
        # It was done, but its worker has died before the result was here: the scheduler has it made anew.
        self._tasks[future] = task
        self._done.add(future)
        return None

    def close(self) -> None:
        for future in self._tasks:
            with contextlib.suppress(OSError, RuntimeError):  # the scheduler may have gone
                future.cancel(force=True)
        self._tasks.clear()
        self._client.close(timeout=_CONNECT)


# ---- in the cluster's workers -----------------------------------------------------------------------


class _Shelf:
    """Worker processes between two tasks: kept for a while, as booting a guest takes longer than most cases."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[str, Processes, threading.Timer]] = []

    def take(self, rig: str) -> Processes:
        """One that nobody uses."""
        with self._lock:
            for entry in self._idle:
                if entry[0] == rig:
                    entry[2].cancel()
                    self._idle.remove(entry)
                    return entry[1]
        # What models print goes where the cluster's worker prints.
        return Processes(rig, 1, os.fdopen(os.dup(2), "ab"))

    def put(self, rig: str, processes: Processes) -> None:
        """It is used no longer."""
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


_shelf = _Shelf()


def perform_there(rig: str, case: dict[str, Any]) -> tuple[dict[str, Any] | None, str, str, bytes]:
    """Runs a case in a process of its own: its result, the rig's id, or how it died; and its artefacts."""
    processes = _shelf.take(rig)
    with tempfile.TemporaryDirectory(prefix="vmodel-run-") as name:
        folder = Path(name)
        try:
            processes.submit(Task(0, Case.model_validate(case), folder))
            (answer,) = processes.wait()
        except BaseException:
            processes.close()
            raise
        _shelf.put(rig, processes)
        result = None if answer.result is None else answer.result.model_dump(mode="json")
        return result, answer.rig, answer.died, pack(folder)


def pack(folder: Path) -> bytes:
    """The files of a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=3) as archive:
        archive.add(folder, arcname=".", filter=lambda member: member if member.isfile() or member.isdir() else None)
    return out.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """The files of `pack`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        archive.extractall(folder, filter="data")
