"""`Runs`: what is mapped, as spans that do not touch, and the gaps between them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import sub

from vmodel.span import Span

_LAST = (1 << 64) - 1
#: Runs of a block; it is cut when it has twice as many.
_BLOCK = 128


class _Block:
    """Some runs, ascending.  `gaps`: the bytes behind each up to the next run; None: not known.  `most`: of a gap."""

    __slots__ = ("gaps", "lasts", "most", "starts")

    def __init__(self, starts: list[int], lasts: list[int]) -> None:
        self.starts, self.lasts = starts, lasts
        self.gaps: list[int] | None = None
        self.most = 0

    def measured(self, behind: int) -> list[int]:
        """The gaps; `behind`: the first address behind the last one."""
        if self.gaps is None:
            self.gaps = [gap - 1 for gap in map(sub, [*self.starts[1:], behind], self.lasts)]
            self.most = max(self.gaps)
        return self.gaps


class Runs:
    """A set of addresses.  Gaps of a size are found without a look at each: blocks with smaller ones are passed."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        #: The first address of each block.
        self._firsts: list[int] = []

    def add(self, span: Span) -> None:
        """Adds addresses, of which the set has none."""
        start, last = span.start, span.last
        block, at = self._before(start)
        if at >= 0 and self._blocks[block].lasts[at] + 1 == start:
            start = self._blocks[block].starts[at]
            self._delete(block, at)
            block, at = self._before(start)
        behind, first = self._after(block, at)
        if behind < len(self._blocks) and self._blocks[behind].starts[first] == last + 1:
            last = self._blocks[behind].lasts[first]
            self._delete(behind, first)
        self._insert(start, last)

    def remove(self, span: Span) -> None:
        """Removes addresses, all of which the set has.  KeyError: it has not."""
        block, at = self._before(span.start)
        if at < 0 or self._blocks[block].lasts[at] < span.last:
            raise KeyError(span)
        start, last = self._blocks[block].starts[at], self._blocks[block].lasts[at]
        self._delete(block, at)
        if start < span.start:
            self._insert(start, span.start - 1)
        if span.last < last:
            self._insert(span.last + 1, last)

    def __iter__(self) -> Iterator[Span]:
        """The runs, ascending."""
        return (Span(*pair) for block in list(self._blocks) for pair in zip(block.starts, block.lasts, strict=True))

    def gaps(self, within: Span, size: int) -> Iterator[Span]:
        """The parts of `within` that the set has not, of `size` bytes or more, ascending; the set must not change."""
        number, at = self._before(within.start)
        if at < 0:
            last = min(within.last, self._firsts[0] - 1 if self._firsts else _LAST)
            if last - within.start + 1 >= size:
                yield Span(within.start, last)
            number = at = 0
        while number < len(self._blocks) and self._firsts[number] <= within.last:
            block = self._blocks[number]
            gaps = block.measured(self._firsts[number + 1] if number + 1 < len(self._blocks) else _LAST + 1)
            for n in [n for n, gap in enumerate(gaps) if gap >= size and n >= at] if block.most >= size else ():
                start = max(within.start, block.lasts[n] + 1)
                last = min(within.last, block.lasts[n] + gaps[n])
                if last - start + 1 >= size:
                    yield Span(start, last)
            number, at = number + 1, 0

    # ---- blocks ----------------------------------------------------------------------------

    def _before(self, address: int) -> tuple[int, int]:
        """The place of the last run that begins at `address` or before it; (-1, -1): there is none."""
        block = bisect_right(self._firsts, address) - 1
        return (block, bisect_right(self._blocks[block].starts, address) - 1) if block >= 0 else (-1, -1)

    def _after(self, block: int, at: int) -> tuple[int, int]:
        """The next place; behind the last one the first of a block that is not there."""
        if block >= 0 and at + 1 < len(self._blocks[block].starts):
            return block, at + 1
        return block + 1, 0

    def _insert(self, start: int, last: int) -> None:
        number = max(0, bisect_right(self._firsts, start) - 1)
        if not self._blocks:
            self._blocks.append(_Block([], []))
            self._firsts.append(start)
        block = self._blocks[number]
        at = bisect_left(block.starts, start)
        block.starts.insert(at, start)
        block.lasts.insert(at, last)
        self._firsts[number] = block.starts[0]
        if len(block.starts) > 2 * _BLOCK:
            self._blocks.insert(number + 1, _Block(block.starts[_BLOCK:], block.lasts[_BLOCK:]))
            self._firsts.insert(number + 1, block.starts[_BLOCK])
            del block.starts[_BLOCK:], block.lasts[_BLOCK:]
        self._changed(number)

    def _delete(self, number: int, at: int) -> None:
        block = self._blocks[number]
        del block.starts[at], block.lasts[at]
        if block.starts:
            self._firsts[number] = block.starts[0]
        else:
            del self._blocks[number], self._firsts[number]
        self._changed(number)

    def _changed(self, number: int) -> None:
        """The gaps of a block, and the one in front of it, are not known any more."""
        for block in self._blocks[max(0, number - 1) : number + 1]:
            block.gaps = None
