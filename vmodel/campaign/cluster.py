"""A Dask cluster that is there already: `Cluster` here, and `perform_there`, which runs in its workers.

Artefacts travel back with the result, so that the workers need not see the campaign's folder.  What a case reads
(machine file, programs, kernels) they must have at the same paths.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmodel.campaign.executor import Answer, Task
from vmodel.campaign.rig import Rig, load_rig, perform, plain
from vmodel.errors import ConfigError
from vmodel.testing.case import Case, Result

#: Seconds after which a rig that nothing runs in is closed.
_IDLE = 30.0
#: Seconds for the scheduler to answer at first.
_CONNECT = 10.0


class Cluster:
    """Runs tasks on a cluster's workers, one a thread of theirs: see Executor."""

    def __init__(self, rig: str, address: str) -> None:
        """ConfigError: Dask is not installed, or no scheduler answers."""
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
        return [self._answer(future) for future in self._done.next_batch()]

    def _answer(self, future: Any) -> Answer:
        task = self._tasks.pop(future)
        if future.status == "finished":
            result, rig, packed = future.result()
            unpack(packed, task.folder)
            return Answer(task, Result.model_validate(result), rig)
        if future.status == "error":
            error = future.exception()
            if isinstance(error, ConfigError):
                raise error
            # The scheduler has tried it on several workers by then.
            return Answer(task, None, died=f"{type(error).__name__}: {error}", again=False)
        raise ConfigError(f"--scheduler {self._address}: the scheduler has gone")

    def close(self) -> None:
        for future in self._tasks:
            with contextlib.suppress(OSError, RuntimeError):  # the scheduler may have gone
                future.cancel(force=True)
        self._tasks.clear()
        self._client.close(timeout=_CONNECT)


# ---- in the cluster's workers -----------------------------------------------------------------------


class _Shelf:
    """Rigs between two tasks: kept for a while, as booting a guest takes longer than most cases."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rigs: dict[str, tuple[str, Rig, threading.Timer]] = {}

    def take(self, name: str) -> tuple[str, Rig]:
        """A rig that nobody uses, and its id."""
        with self._lock:
            for key, (kind, rig, timer) in list(self._rigs.items()):
                if kind == name:
                    timer.cancel()
                    del self._rigs[key]
                    return key, rig
        return uuid.uuid4().hex[:12], load_rig(name)().__enter__()

    def put(self, name: str, key: str, rig: Rig) -> None:
        """It is used no longer."""
        timer = threading.Timer(_IDLE, self._close, (key,))
        timer.daemon = True
        with self._lock:
            self._rigs[key] = (name, rig, timer)
        timer.start()

    def _close(self, key: str) -> None:
        with self._lock:
            found = self._rigs.pop(key, None)
        if found is not None:
            found[1].__exit__(None, None, None)


_shelf = _Shelf()


def perform_there(rig_name: str, case: dict[str, Any]) -> tuple[dict[str, Any], str, bytes]:
    """Runs a case: its result, the rig's id, and its artefacts."""
    key, rig = _shelf.take(rig_name)
    with tempfile.TemporaryDirectory(prefix="vmodel-run-") as folder:
        try:
            result = perform(rig, Case.model_validate(case), Path(folder))
        except BaseException:
            rig.__exit__(None, None, None)
            raise
        _shelf.put(rig_name, key, rig)
        artefacts = {
            name: str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path
            for name, path in result.artefacts.items()
        }
        said = result.model_copy(update={"artefacts": artefacts}).model_dump(mode="json")
        return said, key, pack(Path(folder))


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
