"""Areas, and the sums over spans that address spaces are made of, against sets of addresses."""

from __future__ import annotations

import errno
import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from tests.spaces.world import RW, World, refused
from vmodel.iommu import paging_domain_alloc
from vmodel.iommu.areas import Areas, common, fill, holes, joined, map_in_all, merged_dirty, off_limits, unmap_in_all
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import AllocFlags, Mapping, PagingDomain
from vmodel.patience import patience
from vmodel.span import PAGE, Span

END = 40
SPANS = st.builds(lambda a, n: Span(a, min(a + n, END)), st.integers(0, END), st.integers(0, 9))


def addresses(spans: list[Span]) -> set[int]:
    return {at for span in spans for at in range(span.start, span.last + 1)}


def apart(spans: list[Span]) -> list[Span]:
    """Those that overlap none before them."""
    kept: list[Span] = []
    for span in spans:
        if not any(span.overlaps(other) for other in kept):
            kept.append(span)
    return kept


@given(st.lists(SPANS), SPANS)
def test_areas_keep_their_order(spans: list[Span], over: Span) -> None:
    areas, model = Areas[Mapping](), apart(spans)
    for span in model:
        areas.add(Mapping(span, span.start * 2, RW))
    assert [area.span for area in areas] == sorted(model)
    assert [area.span for area in areas.over(over)] == sorted(span for span in model if span.overlaps(over))
    assert list(areas.runs) == joined(model)
    assert areas.overlaps(over) == any(span.overlaps(over) for span in model)
    for span in model[::2]:
        areas.remove(Mapping(span, span.start * 2, RW))
    left = sorted(model[1::2])
    assert [area.span for area in areas] == left and len(areas) == len(left)
    assert list(areas.runs) == joined(left)


def test_areas_may_go_while_they_are_listed() -> None:
    areas = Areas[Mapping]()
    for n in range(5):
        areas.add(Mapping(Span(n, n), 0, RW))
    for area in areas:
        areas.remove(area)
    assert not len(areas)


def test_the_ends_of_64_bits() -> None:
    areas, everything = Areas[Mapping](), Span(0, 2**64 - 1)
    ends = [Span(0, 0), Span(2**64 - 1, 2**64 - 1)]
    for span in ends:
        areas.add(Mapping(span, 0, RW))
    assert [area.span for area in areas.over(everything)] == ends
    assert holes([everything], ends) == [Span(1, 2**64 - 2)]
    assert holes([everything], [everything]) == []
    assert common([everything], ends) == ends


@given(st.lists(SPANS), st.lists(SPANS))
def test_holes(usable: list[Span], taken: list[Span]) -> None:
    left = holes(apart(usable), taken)
    assert addresses(left) == addresses(apart(usable)) - addresses(taken)
    assert sum(span.size for span in left) == len(addresses(left)), "they overlap"


@given(st.lists(SPANS), st.lists(SPANS))
def test_common(one: list[Span], other: list[Span]) -> None:
    both = common(apart(one), apart(other))
    assert addresses(both) == addresses(apart(one)) & addresses(apart(other))
    assert both == sorted(both)


@given(st.lists(SPANS))
def test_joined(spans: list[Span]) -> None:
    found = joined(spans)
    assert addresses(found) == addresses(spans)
    assert all(a.last + 1 < b.start for a, b in itertools.pairwise(found))


def test_time_by_how_many_there_are() -> None:
    """Not by its square: a user may make as many mappings with gaps between them as it likes."""
    areas, n = Areas(), 50_000
    taken = [Span(2 * at, 2 * at) for at in range(n)]
    begin = time.monotonic()
    for span in taken:
        areas.add(Mapping(span, 0, RW))
    free = holes([Span(0, 2 * n - 1)], list(areas.runs))
    assert free == common(free, [Span(2 * at + 1, 2 * at + 1) for at in range(n)])
    assert all(areas.overlaps(span) for span in taken)
    for area in reversed(list(areas)):
        areas.remove(area)
    assert not list(areas.runs)
    assert time.monotonic() - begin < patience(15)


def test_off_limits() -> None:
    regions = [ReservedRegion(Span(n, n), kind) for n, kind in enumerate(RegionType)]
    relaxable = list(RegionType).index(RegionType.DIRECT_RELAXABLE)
    assert off_limits(regions) == [Span(n, n) for n in range(len(regions)) if n != relaxable]


# ---- domains ---------------------------------------------------------------------------------------


def domain(world: World, flags: AllocFlags = AllocFlags.NONE, **changes: object) -> PagingDomain:
    return paging_domain_alloc(world.add(world.iommu(**changes)).endpoint, flags)


AREAS = [Mapping(Span.sized(n * 2 * PAGE, PAGE), n * PAGE, RW) for n in range(4)]


def test_all_areas_or_none(world: World) -> None:
    small, large = domain(world, max_mappings=3), domain(world)
    with refused(errno.ENOSPC):
        fill(small, AREAS)
    assert not len(small)
    with refused(errno.ENOSPC):
        map_in_all([large, small], AREAS)
    assert not len(small) and not len(large)
    map_in_all([large, small], AREAS[:3])
    assert list(small.mappings()) == list(large.mappings()) == AREAS[:3]
    flushes = large.flushes
    unmap_in_all([large, small], AREAS[1:3])
    assert list(small.mappings()) == list(large.mappings()) == AREAS[:1]
    assert large.flushes == flushes + 1


def test_a_bitmap_of_several_domains(world: World) -> None:
    first, second = world.add(world.iommu()), world.add(world.iommu())
    domains = [paging_domain_alloc(device.endpoint, AllocFlags.DIRTY_TRACKING) for device in (first, second)]
    whole = Mapping(Span.sized(0, 80 * PAGE), 0, RW)
    map_in_all(domains, [whole])
    for device, tables in zip((first, second), domains, strict=True):
        tables.set_dirty_tracking(True)
        device.group.attach(tables)
    first.dma.write(0, b"x")
    second.dma.write(70 * PAGE, b"x")
    for clear in (False, True):
        bitmap = merged_dirty(domains, whole.span, PAGE, clear)
        assert len(bitmap) == 16 and int.from_bytes(bitmap, "little") == 1 | 1 << 70
    assert not any(merged_dirty(domains, whole.span, PAGE, True))
    assert merged_dirty([], whole.span, PAGE, True) == bytes(16)
    for bad in (0, 3, 1 << 11, PAGE * 128):
        for some in (domains, []):
            with refused(errno.EINVAL):
                merged_dirty(some, whole.span, bad, True)


def test_what_was_there_stays(world: World) -> None:
    tables = domain(world)
    map_in_all([tables], AREAS[2:])
    with refused(errno.EADDRINUSE):
        map_in_all([tables], AREAS)
    assert list(tables.mappings()) == AREAS[2:]
