"""Waiting in tests: each wait has an end, and says what it was for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vmodel.patience import patience, spoken

_T = TypeVar("_T")


def until(what: Callable[[], _T], awaited: str, seconds: float = 5.0, pause: float = 0.002) -> _T:
    """Calls `what` until its result is true, and returns that.  After `seconds` it fails and says what was `awaited`.

    `pause`: seconds between calls.
    """
    deadline = time.monotonic() + patience(seconds)
    while not (found := what()):
        assert time.monotonic() < deadline, f"not in {spoken(seconds)}: {awaited}"
        time.sleep(pause)
    return found


@contextmanager
def meanwhile(*works: Callable[[], object]) -> Iterator[None]:
    """While the body runs, each of `works` is called again and again on a thread of its own; raises what one raises."""
    stop, errors = threading.Event(), list[BaseException]()

    def run(work: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(patience(10))
    assert not any(thread.is_alive() for thread in threads), "a call does not return"
    if errors:
        raise errors[0]


def runs(pid: int) -> bool:
    """Whether a process runs: one that ended may be left as a zombie, as nobody in a container waits for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
