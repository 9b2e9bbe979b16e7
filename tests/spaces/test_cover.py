"""Cover against a list of counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmodel.iommu.iommufd.cover import Cover

END = 20
INTERVALS = st.builds(lambda a, n: (a, min(a + n, END - 1)), st.integers(0, END - 1), st.integers(0, 9))


@given(st.lists(st.tuples(INTERVALS, st.integers(0, 5)), max_size=30), INTERVALS)
def test_what_comes_and_goes(steps: list[tuple[tuple[int, int], int]], asked: tuple[int, int]) -> None:
    cover, counts, held = Cover(), [0] * END, list[tuple[int, int]]()
    for interval, drop in steps:
        pages = range(interval[0], interval[1] + 1)
        assert cover.add(*interval) == sum(not counts[n] for n in pages)
        for n in pages:
            counts[n] += 1
        held.append(interval)
        if drop < len(held):
            gone = held.pop(drop)
            pages = range(gone[0], gone[1] + 1)
            for n in pages:
                counts[n] -= 1
            assert cover.remove(*gone) == sum(not counts[n] for n in pages)
        assert cover.covers(*asked) == all(counts[asked[0] : asked[1] + 1])
    for interval in held:
        cover.remove(*interval)
    assert cover._at == cover._count == [], "nothing is left"
