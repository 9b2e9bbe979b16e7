"""How scripts/bench measures: rows of its table, and medians of repeated runs."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Samples of each figure.
REPEAT = 7
#: Counts of operations are divided by this.
_shorter = 1


def only_try() -> None:
    """Makes each measurement short: whether all of it runs; the figures mean nothing."""
    global REPEAT, _shorter
    REPEAT, _shorter = 1, 1000


def times(count: int) -> int:
    """`count`, or what it is when all is only tried."""
    return max(1, count // _shorter)


@dataclass(frozen=True)
class Row:
    """One line of the table; `measured` and `reach` in `unit`."""

    number: int
    what: str
    measured: float
    reach: float
    unit: str
    more_is_better: bool = False

    @property
    def good(self) -> bool:
        return self.measured >= self.reach if self.more_is_better else self.measured <= self.reach


class Program:
    """A measuring C program: compiled from `sources`, run on one CPU."""

    def __init__(self, folder: Path, cpu: int, name: str, sources: Sequence[Path], *flags: str) -> None:
        self._program = folder / name
        self._cpu = cpu
        subprocess.run(["cc", "-std=gnu11", "-O2", *flags, "-o", self._program, *sources, "-lpthread"], check=True)

    def lines(self, *args: object) -> list[float]:
        """The numbers that it prints."""
        done = subprocess.run(
            [str(self._program), *map(str, args)],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
            preexec_fn=lambda: os.sched_setaffinity(0, {self._cpu}),
        )
        return [float(value) for value in done.stdout.split()]

    def __call__(self, what: object, *args: object, count: int) -> float:
        """Median nanoseconds of one operation."""
        return statistics.median(self.lines(what, REPEAT, times(count), *args))


def timed(call: Callable[[], object], count: int) -> float:
    """Median nanoseconds of one call."""
    count, samples = times(count), []
    for _ in range(REPEAT):
        start = time.perf_counter_ns()
        for _ in range(count):
            call()
        samples.append((time.perf_counter_ns() - start) / count)
    return statistics.median(samples)
