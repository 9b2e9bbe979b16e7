"""`Cover`: how often each of a range's pages is held, as intervals come and go."""

from __future__ import annotations

from bisect import bisect_left


class Cover:
    """A step function from page numbers to counts, 0 at first."""

    def __init__(self) -> None:
        #: Where the count changes, ascending, and the count from there on.
        self._at: list[int] = []
        self._count: list[int] = []

    def add(self, first: int, last: int) -> int:
        """One more interval; returns how many of its pages no other covers."""
        return self._change(first, last, 1)

    def remove(self, first: int, last: int) -> int:
        """Takes back an interval that was added; returns how many of its pages nothing covers any more."""
        return self._change(first, last, -1)

    def covers(self, first: int, last: int) -> bool:
        """Whether each page of the interval is covered."""
        low = bisect_left(self._at, first + 1) - 1
        return low >= 0 and all(self._count[low : bisect_left(self._at, last + 1)])

    def _change(self, first: int, last: int, by: int) -> int:
        low, high = self._cut(first), self._cut(last + 1)
        moved = 0
        for n in range(low, high):
            if 0 in (self._count[n], self._count[n] + by):
                moved += self._at[n + 1] - self._at[n]
            self._count[n] += by
        for n in (high, low):
            if self._count[n] == (self._count[n - 1] if n else 0):
                del self._at[n], self._count[n]
        return moved

    def _cut(self, at: int) -> int:
        """The index of the step at `at`, which is made if need be."""
        n = bisect_left(self._at, at)
        if n == len(self._at) or self._at[n] != at:
            self._at.insert(n, at)
            self._count.insert(n, self._count[n - 1] if n else 0)
        return n
