"""Calls of an IOAS answer as the cases of Linux's iommufd selftest check them: each row of `ioas`, and whole cases."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest

from tests.linux.ioas import (
    ALLOW,
    ATTACH,
    CLOSE,
    COPY,
    DESTROY,
    DIFFERENCES,
    INFO,
    LINES,
    MAP,
    RANGES,
    RESERVE,
    UNMAP,
    allow,
)
from tests.linux.mock import (
    APERTURE,
    BUFFER,
    BUFFER_SIZE,
    DEVICES,
    MOCK_PAGE,
    PAGE,
    VARIANTS,
    Difference,
    Mock,
    Row,
    by_variant,
    check,
    name,
)
from tests.spaces.world import World, refused
from vmodel.errors import Access
from vmodel.iommu.iommufd import MemoryFile
from vmodel.span import Span


@pytest.mark.parametrize(("row", "variant"), by_variant(MAP), ids=name)
def test_map(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(UNMAP), ids=name)
def test_unmap(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(COPY), ids=name)
def test_copy(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(RANGES), ids=name)
def test_iova_ranges(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(ALLOW), ids=name)
def test_allow_iovas(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(RESERVE), ids=name)
def test_reserve(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(DESTROY), ids=name)
def test_destroy(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(CLOSE), ids=name)
def test_close(world: World, row: Row, variant: str) -> None:
    mock = Mock(world, DEVICES[variant])
    check(row, mock)
    mock.context.close()
    assert not mock.context._objects and all(device.group.owner is None for device in mock.devices)


@pytest.mark.parametrize(("row", "variant"), by_variant(ATTACH), ids=name)
def test_attach(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(INFO), ids=name)
def test_get_info(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(LINES), ids=name)
def test_lines_of_linux(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(DIFFERENCES), ids=name)
def test_a_difference_is_still_there(world: World, row: Difference, variant: str) -> None:
    """If it has gone, the row is one of the tables above."""
    assert row.why
    check(row, Mock(world, DEVICES[variant]))
    assert row.expect != row.linux


@pytest.mark.parametrize("variant", VARIANTS)
def test_allocated_iovas(world: World, variant: str) -> None:
    """iommufd_ioas.area_auto_iova: aligned as the size is, apart, not reserved, and in what is allowed."""
    mock = Mock(world, DEVICES[variant])
    reserved = Span.sized(4 * PAGE, 100 * PAGE)
    start = APERTURE.start + PAGE if mock.devices else 200 * PAGE
    allowed = Span(start, start + 599 * PAGE - 1)

    def rounds(gpa: int = BUFFER) -> list[Span]:
        found = [Span.sized(mock.map_any(n * PAGE, gpa), n * PAGE) for n in range(1, 11)]
        assert all(span.start % (span.size & -span.size) == 0 for span in found)
        assert not any(a.overlaps(b) for a, b in pairwise(sorted(found)))
        assert mock.reaches(found[-1].start, found[-1].size) or gpa != BUFFER
        for span in found:
            assert mock.ioas.unmap(span.start, span.size) == span.size
        return found

    rounds(BUFFER if mock.devices else 1 << 31)
    mock.reserve(reserved.start, reserved.size)
    assert not any(span.overlaps(reserved) for span in rounds())
    with refused(errno.EADDRINUSE):
        allow(mock, Span(PAGE, 600 * PAGE))
    allow(mock, allowed)
    assert all(allowed.covers(span) for span in rounds())


@pytest.mark.parametrize("copies", [False, True], ids=["all_aligns", "all_aligns_copy"])
@pytest.mark.parametrize("of_file", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_each_size_at_each_alignment(world: World, devices: int, of_file: bool, copies: bool) -> None:
    """iommufd_mock_domain.all_aligns: DMA gets to what was mapped; all_aligns_copy: also through a HWPT made later."""
    mock, file = Mock(world, devices), MemoryFile(BUFFER, BUFFER_SIZE)
    whole = 4 * PAGE
    for start in range(0, whole, MOCK_PAGE):
        for end in range(start + MOCK_PAGE, whole, MOCK_PAGE):
            size, gpa = end - start, BUFFER + start
            iova = mock.ioas.map_file(file, start, size) if of_file else mock.map_any(size, gpa)
            assert mock.reaches(iova, size, gpa)
            if copies:
                later = mock.bound[0].hwpt_alloc(mock.ioas)
                mock.bound[0].replace(later)
                assert mock.reaches(iova, size, gpa)
                mock.bound[0].replace(mock.ioas)
                later.destroy()
            assert mock.ioas.unmap(iova, size) == size
            assert not any(device.reads(iova) is not None for device in mock.devices)


def test_dma_gets_to_a_page(world: World) -> None:
    """iommufd_mock_domain.basic, apart from memory that is not there: see DIFFERENCES."""
    mock = Mock(world, 2)
    iova = mock.map_any(PAGE)
    assert mock.reaches(iova, PAGE) and mock.devices[0].reads(iova + PAGE) is None
    assert mock.ioas.mappings()[0].access == Access.READ | Access.WRITE
