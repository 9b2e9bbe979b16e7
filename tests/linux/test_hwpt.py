"""HWPTs, dirty tracking, page requests and PASIDs answer as the cases of Linux's iommufd selftest check them."""

from __future__ import annotations

import threading

import pytest

from tests.iommu.tables import TO_PAGE, TO_TABLE, index
from tests.linux.hwpt import ALLOC, ALLOC_NESTED, ATTACH, DEVICE_GONE, REPLACE, TRACK
from tests.linux.mock import (
    APERTURE,
    BUFFER,
    DEVICES,
    MOCK_PAGE,
    PAGE,
    PAGE_SIZES,
    Mock,
    Row,
    Stacked,
    answer,
    by_variant,
    check,
    name,
)
from tests.spaces.world import World
from tests.waiting import until
from vmodel.iommu.domain import AllocFlags
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.iommufd import Hwpt
from vmodel.iommu.pgtable import TableFormat
from vmodel.span import KiB, MiB, Span

#: An IOVA that nested tables translate.
IOVA = 64 * MiB


@pytest.mark.parametrize(("row", "variant"), by_variant(ALLOC_NESTED), ids=name)
def test_nested(world: World, row: Row, variant: str) -> None:
    check(row, Stacked(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(DEVICE_GONE + ALLOC), ids=name)
def test_hwpt_alloc(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(REPLACE), ids=name)
def test_replace(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


@pytest.mark.parametrize(("row", "variant"), by_variant(ATTACH), ids=name)
def test_pasids(world: World, row: Row, variant: str) -> None:
    mock = Stacked(world, DEVICES[variant])
    row.before(mock)
    before = mock.domain(100)
    assert answer(row, mock) == row.expect
    if isinstance(row.expect, str):
        assert mock.domain(100) is before, "a call that is refused changes nothing"


@pytest.mark.parametrize(("row", "variant"), by_variant(TRACK), ids=name)
def test_set_dirty_tracking(world: World, row: Row, variant: str) -> None:
    check(row, Mock(world, DEVICES[variant]))


def put_tables(mock: Mock, target: int) -> None:
    """A user's tables of four levels in the buffer: four pages from IOVA on lead to the pages after `target`."""
    ram, at = mock.world.ram, BUFFER
    for level in (4, 3, 2):
        entry = TO_TABLE[TableFormat.X86](0) | (APERTURE.start + at - BUFFER + MOCK_PAGE)
        slot = at + 8 * index(IOVA, level)
        ram[slot : slot + 8] = entry.to_bytes(8, "little")
        at += MOCK_PAGE
    for n in range(4):
        entry = TO_PAGE[TableFormat.X86](1) | (APERTURE.start + target + n * MOCK_PAGE)
        slot = at + 8 * index(IOVA + n * MOCK_PAGE, 1)
        ram[slot : slot + 8] = entry.to_bytes(8, "little")


def seen(mock: Mock) -> list[int]:
    """What the device reads at each of the four pages: the page's number in the buffer."""
    return [int.from_bytes(mock.devices[0].dma.read(IOVA + n * MOCK_PAGE, 8), "little") for n in range(4)]


def test_cached_translations_of_a_nested_hwpt(world: World) -> None:
    """iommufd_ioas.alloc_hwpt_nested: only what is invalidated is walked again (IOMMU_TEST_OP_MD_CHECK_IOTLB)."""
    mock = Stacked(world, 1)
    mock.ioas.map(BUFFER, MiB, iova=APERTURE.start)
    for n in range(MiB // MOCK_PAGE):
        world.ram[BUFFER + n * MOCK_PAGE : BUFFER + n * MOCK_PAGE + 8] = n.to_bytes(8, "little")
    put_tables(mock, 16 * MOCK_PAGE)
    hwpt = mock.nested[0]
    mock.device.replace(hwpt)
    assert seen(mock) == [16, 17, 18, 19]
    put_tables(mock, 32 * MOCK_PAGE)
    assert seen(mock) == [16, 17, 18, 19]
    hwpt.invalidate(Span.sized(IOVA, MOCK_PAGE))
    assert seen(mock) == [32, 17, 18, 19]
    hwpt.invalidate(Span.sized(IOVA + MOCK_PAGE, MOCK_PAGE))
    assert seen(mock) == [32, 33, 18, 19]
    hwpt.invalidate(Span.sized(IOVA + 2 * MOCK_PAGE, 2 * MOCK_PAGE))
    assert seen(mock) == [32, 33, 34, 35]
    put_tables(mock, 48 * MOCK_PAGE)
    hwpt.invalidate()
    assert seen(mock) == [48, 49, 50, 51]


@pytest.mark.parametrize("pasid", [None, 2048])
def test_a_page_request(world: World, pasid: int | None) -> None:
    """iommufd_ioas.alloc_hwpt_nested, and iommufd_device_pasid.pasid_attach for a PASID: the request arrives."""
    mock = Stacked(world, 1)
    mock.ioas.map(BUFFER, MiB, iova=APERTURE.start)
    mock.device.replace(mock.special)
    if pasid is None:
        mock.device.replace(mock.waiting)
    else:
        mock.device.attach(mock.waiting, pasid)
    got = list[int | None]()
    thread = threading.Thread(target=lambda: got.append(mock.devices[0].reads(IOVA, pasid)))
    thread.start()
    found: list[PageRequest] = until(lambda: mock.fault.read(0.01), "the page request")
    assert [(request.pasid, request.iova) for request in found] == [(pasid, IOVA)]
    mock.fault.respond(found[0], PageResponse.INVALID)
    thread.join()
    assert got == [None]
    mock.device.replace(mock.special, pasid)
    assert mock.device.group.domain_of(pasid) is mock.special.domain
    mock.waiting.destroy()
    mock.fault.destroy()


def pages(hwpt: Hwpt, span: Span, clear: bool) -> set[int]:
    """The dirty pages of the IOMMU in `span`."""
    bitmap = int.from_bytes(hwpt.get_dirty_bitmap(span, MOCK_PAGE, clear=clear), "little")
    return {n for n in range(span.size // MOCK_PAGE) if bitmap >> n & 1}


@pytest.mark.parametrize("clear", [True, False], ids=["get_dirty_bitmap", "get_dirty_bitmap_no_clear"])
@pytest.mark.parametrize(
    ("size", "entry"),
    [
        (16 * KiB, PAGE),
        (32 * KiB, PAGE),
        (128 * KiB, PAGE),
        (256 * KiB, PAGE),
        (640 * KiB, PAGE),
        (128 * MiB, PAGE),
        (128 * MiB, 512 * MOCK_PAGE),
        (256 * MiB, PAGE),
        (256 * MiB, 512 * MOCK_PAGE),
    ],
)
def test_dirty_pages(world: World, size: int, entry: int, clear: bool) -> None:
    """iommufd_dirty_tracking.get_dirty_bitmap(_no_clear): a write to each other entry of the table dirties all of it.

    Without huge pages a mapping is made of the CPU's pages, two of the IOMMU each (IOMMU_OPTION_HUGE_PAGES is 0).
    """
    sizes = PAGE_SIZES if entry > PAGE else frozenset((MOCK_PAGE, PAGE))
    mock = Mock(world, 1, sizes)
    span, piece = Span.sized(APERTURE.start, size), min(size, 2 * MiB)
    for at in range(0, size, piece):
        mock.ioas.map(BUFFER, piece, iova=span.start + at)
    hwpt = mock.bound[0].hwpt_alloc(mock.ioas, AllocFlags.DIRTY_TRACKING)
    mock.bound[0].replace(hwpt)
    hwpt.set_dirty_tracking(True)
    for _ in range(2):
        for at in range(0, size, 2 * entry):
            mock.devices[0].dma.write(span.start + at, b"x")
        written = {n for n in range(size // MOCK_PAGE) if n * MOCK_PAGE % (2 * entry) < entry}
        assert pages(hwpt, span, clear) == written
        assert pages(hwpt, span, clear) == (set() if clear else written)
