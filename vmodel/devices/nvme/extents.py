"""Sets of blocks, stored as sorted spans."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator


class Extents:
    """A set of blocks, for example those that Write Uncorrectable has marked."""

    def __init__(self) -> None:
        #: The first block of each span, and the block after its last; ascending, not overlapping, not adjacent.
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
        """Removes `count` (at least 1) blocks; they need not be in the set."""
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
        """Whether removing these blocks would split a span, so that there is one more."""
        n = bisect_left(self._ends, start + 1)
        return n < len(self._starts) and self._starts[n] < start and start + count < self._ends[n]

    def would_join(self, start: int, count: int) -> bool:
        """Whether adding these blocks would extend a span, so that there is no additional one."""
        return bisect_left(self._ends, start) < bisect_left(self._starts, start + count + 1)

    def first_in(self, start: int, count: int) -> int | None:
        """The lowest of `count` blocks that is in the set; None: none is."""
        n = bisect_left(self._ends, start + 1)
        if n < len(self._starts) and self._starts[n] < start + count:
            return max(start, self._starts[n])
        return None

    def clear(self) -> None:
        """Removes all blocks."""
        self._starts.clear()
        self._ends.clear()
