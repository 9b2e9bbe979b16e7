"""Programs in process groups of their own: they end with all that they have started."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


@contextlib.contextmanager
def output(
    line: Sequence[str], *, environ: Mapping[str, str], folder: Path, seconds: float, most: int
) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[bytes]]]:
    """A program in a group of its own, and its lines, stderr too, as `lines` yields them; it ends with the context.

    Ctrl-C reaches only this process, which then ends the program.
    """
    process = subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environ,
        cwd=folder,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield process, lines(process, seconds, most)
    finally:
        end(process)
        process.stdout.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends `process`, the leader of its group, and all of the group: by SIGTERM, after 5 s by SIGKILL."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    # Also what still runs without its leader.  No other group has its number as long as there is any.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines(process: subprocess.Popen[bytes], seconds: float, most: int) -> Iterator[bytes]:
    """Yields the lines of stdout, a pipe, until `process` ends, without their ends.

    Others that it has started may keep the pipe open: they are not waited for.  TimeoutError: it has not ended in
    `seconds`.  OSError EFBIG: it has written more than `most` bytes.
    """
    assert process.stdout is not None
    pipe, deadline, rest, total = process.stdout.fileno(), time.monotonic() + seconds, b"", 0
    ended = os.pidfd_open(process.pid)
    try:
        while True:
            readable = _readable(deadline, pipe, ended)
            if pipe not in readable:
                break
            data = os.read(pipe, 1 << 16)
            if not data:
                break
            if (total := total + len(data)) > most:
                raise OSError(errno.EFBIG, f"more than {most >> 20} MiB of output")
            *whole, rest = (rest + data).split(b"\n")
            yield from whole
        if rest:
            yield rest
        _readable(deadline, ended)  # a program may run on without its stdout
        process.wait()
    finally:
        os.close(ended)


def _readable(deadline: float, *fds: int) -> set[int]:
    """Waits until one of these is readable or closed; returns which.  TimeoutError."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    found = {fd for fd, _ in poll.poll(max(deadline - time.monotonic(), 0) * 1000)}
    if not found or time.monotonic() > deadline:
        raise TimeoutError
    return found
