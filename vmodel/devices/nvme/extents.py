"""Sets of blocks, kept as spans."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator


class Extents:
    """Blocks of a namespace, for example those that Write Uncorrectable has marked."""

    def __init__(self) -> None:
        #: Ascending, neither overlapping nor adjacent: first block of each span, and the one behind its last.
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        """How many spans there are."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first block, number of blocks) of each span, ascending."""
        for start, end in zip(self._starts, self._ends, strict=True):
            yield start, end - start

    def add(self, start: int, count: int) -> None:
        """Adds `count` (at least 1) blocks."""
        end = start + count
        # Spans that touch the new one become one with it.
        first, behind = bisect_left(self._ends, start), bisect_left(self._starts, end + 1)
        if first < behind:
            start, end = min(start, self._starts[first]), max(end, self._ends[behind - 1])
        self._starts[first:behind] = [start]
        self._ends[first:behind] = [end]

    def remove(self, start: int, count: int) -> None:
        """Takes `count` (at least 1) blocks out, whether they are in it or not."""
        end = start + count
        first, behind = bisect_left(self._ends, start + 1), bisect_left(self._starts, end)
        if first >= behind:
            return
        starts, ends = [], []
        if self._starts[first] < start:
            starts.append(self._starts[first])
            ends.append(start)
        if end < self._ends[behind - 1]:
            starts.append(end)
            ends.append(self._ends[behind - 1])
        self._starts[first:behind] = starts
        self._ends[first:behind] = ends

    def would_split(self, start: int, count: int) -> bool:
        """Whether taking these blocks out would leave one span more."""
        n = bisect_left(self._ends, start + 1)
        return n < len(self._starts) and self._starts[n] < start and start + count < self._ends[n]

    def would_join(self, start: int, count: int) -> bool:
        """Whether adding these blocks would leave no span more."""
        return bisect_left(self._ends, start) < bisect_left(self._starts, start + count + 1)

    def first_in(self, start: int, count: int) -> int | None:
        """The lowest of `count` blocks that is in the set, None when none is."""
        n = bisect_left(self._ends, start + 1)
        if n < len(self._starts) and self._starts[n] < start + count:
            return max(start, self._starts[n])
        return None

    def clear(self) -> None:
        """Empties it."""
        self._starts.clear()
        self._ends.clear()
