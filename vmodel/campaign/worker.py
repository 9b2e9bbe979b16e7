"""Worker processes on this machine: `Processes` starts them, `main` runs in each of them.

Both sides exchange lines of JSON over a socket pair, one for each task and answer.  If a process dies, or does not
answer in time, its task is answered with how it died, the next task gets a new process, and other tasks go on.
Its temporary files are in a folder of its own, which is removed when it has ended, however that was.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from vmodel.campaign.executor import Answer, Task
from vmodel.campaign.rig import is_full, load_rig, perform, plain
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case, Result
from vmodel.guest.keeper import removing
from vmodel.patience import patience

#: Seconds that a worker may take for a case beyond the case's own limits.
_GRACE = 120.0
#: Seconds for a worker to end its guest.
_GRACE_END = 15.0


def time_limit(case: Case) -> float:
    """Seconds after which a worker that has not answered counts as stuck."""
    return case.boot_timeout + 3 * case.timeout + _GRACE


class _Process:
    """One worker process."""

    def __init__(self, rig: str, log: BinaryIO) -> None:
        ours, theirs = socket.socketpair()
        self.id = uuid.uuid4().hex[:12]
        self.socket = ours
        self.task: Task | None = None
        self.deadline = 0.0
        self._lines = ours.makefile("rb")
        path = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)
        self._scratch = tempfile.mkdtemp(prefix="vmodel-worker-")
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(self._remove_scratch)
            # A session of its own: Ctrl-C reaches only this process, and killpg() ends the worker's children, too.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vmodel.campaign.worker", rig, str(theirs.fileno()), self._scratch],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "TMPDIR": self._scratch},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            undo.pop_all()

    def _remove_scratch(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def send(self, task: Task) -> None:
        self.task = task
        self.deadline = time.monotonic() + time_limit(task.case)
        request = {"case": plain(task.case), "folder": str(task.folder.absolute())}
        with contextlib.suppress(OSError):  # the process has died: recv() returns None
            self.socket.sendall(json.dumps(request).encode() + b"\n")

    def recv(self) -> dict[str, Any] | None:
        """The next answer; None: the process has died."""
        try:
            line = self._lines.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def end(self, grace: float) -> str:
        """Waits `grace` seconds for the process to end, then kills it and its children; returns how it ended."""
        killed = ""
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            killed = "did not end"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._lines.close()
        self.socket.close()
        self._remove_scratch()
        return killed or (f"was killed by signal {-status}" if status < 0 else f"ended with status {status}")


class Processes:
    """Runs tasks in up to `jobs` processes: see Executor."""

    def __init__(self, rig: str, jobs: int, log: BinaryIO) -> None:
        """`log` receives the output of the processes; `close` closes it."""
        self._rig = rig
        self._jobs = jobs
        self._log = log
        self._workers: list[_Process] = []

    @property
    def free(self) -> int:
        """How many processes are idle, or not started yet."""
        return self._jobs - sum(worker.task is not None for worker in self._workers)

    def submit(self, task: Task) -> None:
        """Passes a task to an idle process, or to a new one; `free` must not be 0."""
        worker = next((worker for worker in self._workers if worker.task is None), None)
        if worker is None:
            worker = _Process(self._rig, self._log)
            self._workers.append(worker)
        worker.send(task)

    def wait(self) -> Sequence[Answer]:
        """Blocks until a process has answered, has died or has exceeded its time limit; returns the new answers.

        ConfigError: a rig found a mistake of the user's.  OSError: the disk is full.
        """
        busy = [worker for worker in self._workers if worker.task is not None]
        until = min(worker.deadline for worker in busy)
        ready, _, _ = select.select([worker.socket for worker in busy], [], [], max(until - time.monotonic(), 0))
        answers = []
        for worker in busy:
            task = worker.task
            assert task is not None
            if worker.socket in ready:
                answers.append(self._answer(worker, task))
            elif time.monotonic() >= worker.deadline:
                self._drop(worker, 0)
                answers.append(
                    Answer(task, None, worker.id, f"its worker did not answer in {time_limit(task.case):g} s")
                )
        return answers

    def _answer(self, worker: _Process, task: Task) -> Answer:
        answer = worker.recv()
        if answer is None:
            return Answer(task, None, worker.id, f"its worker process {self._drop(worker, 1.0)}")
        worker.task = None
        if "full" in answer:
            raise OSError(*answer["full"])
        if "error" in answer:
            raise ConfigError(answer["error"])
        return Answer(task, Result.model_validate(answer["result"]), worker.id)

    def _drop(self, worker: _Process, grace: float) -> str:
        self._workers.remove(worker)
        worker.ask_to_end()
        return worker.end(grace)

    def close(self) -> None:
        """Ends all processes, and their guests."""
        for worker in self._workers:
            worker.ask_to_end()
        for worker in self._workers:
            worker.end(_GRACE_END)
        self._workers.clear()
        self._log.close()


# ---- in the worker process --------------------------------------------------------------------------


def main(rig: str, descriptor: int, scratch: Path) -> None:
    """Runs the tasks that arrive; ends when the other side closes the socket, or on SIGTERM.

    `scratch`: the folder of this process's temporary files.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    pair = socket.socket(fileno=descriptor)
    # The other side removes it, too, unless it has been killed.
    with removing(scratch):
        _work(rig, pair)


def _work(rig: str, pair: socket.socket) -> None:
    #: None: there are no more.
    tasks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pair, tasks), daemon=True).start()
    try:
        made = load_rig(rig)
        with made() as lab:
            while (task := tasks.get()) is not None:
                result = perform(lab, Case.model_validate(task["case"]), Path(task["folder"]))
                _send(pair, {"result": result.model_dump(mode="json")})
    except ConfigError as error:
        _send(pair, {"error": str(error)})
    except OSError as error:
        if not is_full(error):
            raise
        place = None if error.filename is None else os.fsdecode(error.filename)
        _send(pair, {"full": [error.errno, error.strerror, place]})


def _read(pair: socket.socket, tasks: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    # ValueError: the other side died while it sent.
    with contextlib.suppress(OSError, ValueError), pair.makefile("rb") as lines:
        for line in lines:
            tasks.put(json.loads(line))
    # The other side has closed the socket or died, so the current task is not wanted any more.
    tasks.put(None)
    os.kill(os.getpid(), signal.SIGTERM)
    # A callback whose exceptions are ignored may have swallowed that, and nobody else ends this process.  It leads a
    # process group of its own, with its guest.
    time.sleep(patience(_GRACE_END))
    os.killpg(0, signal.SIGKILL)


def _send(pair: socket.socket, answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # closed: _read() ends this process
        pair.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
