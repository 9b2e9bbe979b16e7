"""Where an IOAS maps memory without an IOVA: the choice of Linux's iopt_alloc_iova, however many mappings there are."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmodel.errors import IommuError
from vmodel.iommu import runs
from vmodel.iommu.areas import holes, joined
from vmodel.iommu.iommufd import Context, Ioas
from vmodel.iommu.iommufd.iova_alloc import allocate_iova
from vmodel.iommu.runs import Runs
from vmodel.span import PAGE, MiB, Span

LAST = (1 << 64) - 1


def linux(room: Iterable[Span], taken: Iterable[Span], address: int, size: int) -> int | None:
    """iopt_alloc_iova: each hole in turn."""
    wanted = 1 << (size - 1).bit_length()
    align = min(wanted, address & -address or wanted, 2 * MiB)
    for hole in holes(room, [Span(0, PAGE - 1), Span(LAST - PAGE + 1, LAST), *taken]):
        start = ((hole.start + align - 1) & -align) | address % PAGE
        if start < hole.last and start + size - 1 <= hole.last:
            return start
    return None


def in_units(unit: int, first: int) -> st.SearchStrategy[list[Span]]:
    """Spans of units that do not overlap, from `first` on."""
    steps = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=40)

    def spans(found: list[tuple[int, int]]) -> list[Span]:
        made, at = [], first
        for gap, size in found:
            at += gap * unit
            made.append(Span.sized(at, size * unit))
            at += size * unit
        return made

    return steps.map(spans)


def made(spans: Iterable[Span]) -> Runs:
    found = Runs()
    for span in spans:
        found.add(span)
    return found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks of few runs."""
    monkeypatch.setattr(runs, "_BLOCK", 2)


@given(
    st.sampled_from((1, 100, PAGE, MiB)).flatmap(
        lambda unit: st.tuples(in_units(unit, 0), in_units(unit * 7, unit * 3), st.integers(1, 9 * unit))
    ),
    st.sampled_from((0, 1, PAGE, 3 * PAGE, 64 * MiB, 5 * MiB + 8)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_choice_is_linuxs(
    drawn: tuple[list[Span], list[Span], int], address: int, at_the_end: bool, order: object
) -> None:
    taken, room, size = drawn
    if at_the_end:  # mirrored: the last addresses
        taken = [Span(LAST - span.last, LAST - span.start) for span in taken]
        room = [Span(LAST - span.last, LAST - span.start) for span in room]
    room = sorted(room) or [Span(0, LAST)]
    shuffled = list(taken)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    expected = linux(room, taken, address, size)
    try:
        found: int | None = allocate_iova(room, made(shuffled), address, size, 1)
    except IommuError:
        found = None
    assert found == expected


@given(in_units(PAGE, 0), st.randoms(use_true_random=False), st.integers(1, 5 * PAGE))
def test_runs_and_gaps(spans: list[Span], order: object, size: int) -> None:
    """Added and removed in any order, they are what a sort of all says."""
    there: list[Span] = []
    found, left = Runs(), list(spans)
    order.shuffle(left)  # type: ignore[attr-defined]
    for n, span in enumerate([*left, *left[::2]]):
        if n < len(left):
            there.append(span)
            found.add(span)
        else:
            there.remove(span)
            found.remove(span)
        assert list(found) == joined(there)
        for within in (Span(0, LAST), Span(3 * PAGE, 20 * PAGE + 7), Span(0, 0), Span(LAST, LAST)):
            expected = [gap for gap in holes([within], there) if gap.size >= size]
            assert list(found.gaps(within, size)) == expected


def test_a_part_of_a_run() -> None:
    found = made([Span(0, LAST)])
    assert list(found.gaps(Span(0, LAST), 1)) == []
    found.remove(Span(PAGE, 2 * PAGE - 1))
    assert list(found) == [Span(0, PAGE - 1), Span(2 * PAGE, LAST)]
    for span in (Span(PAGE, PAGE), Span(PAGE - 1, PAGE), Span(2 * PAGE - 1, 2 * PAGE)):
        with pytest.raises(KeyError):
            found.remove(span)
    assert list(found.gaps(Span(0, LAST), PAGE)) == [Span(PAGE, 2 * PAGE - 1)]
    assert list(found.gaps(Span(0, LAST), PAGE + 1)) == []


def test_many_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a choice does not grow as the mappings do."""
    monkeypatch.undo()

    def best(count: int) -> float:
        ioas = Ioas(Context())
        for n in range(count):
            ioas.map(0, PAGE, iova=(n + 1) * 2 * PAGE)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            ioas.map(0, 4 * PAGE)
            times.append(time.perf_counter() - start)
        assert len(ioas.mappings()) == count + 20
        return min(times)

    assert best(32000) < 20 * best(500)
