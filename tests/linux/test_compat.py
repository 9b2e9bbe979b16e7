"""VFIO's calls on iommufd answer as the cases of Linux's iommufd selftest check them: each row of `compat`."""

from __future__ import annotations

import errno
import struct
import time

import pytest

from tests.linux.compat import ROWS, VERSIONS, Compat
from tests.linux.mock import APERTURE, BUFFER, MOCK_PAGE, PAGE, Row, by_variant, check, name
from tests.spaces.world import World, refused
from vmodel.iommu.iommufd import Context, Device, Ioas, VfioCompat
from vmodel.iommu.iommufd.vfio_compat import Extension
from vmodel.span import Span

#: struct vfio_iommu_type1_info, and its flags.
HEAD = "<IIQII"
PGSIZES, CAPS = 1, 2


@pytest.mark.parametrize(("row", "variant"), by_variant(ROWS), ids=name)
def test_compat(world: World, row: Row, variant: str) -> None:
    check(row, Compat(world, variant))


@pytest.mark.parametrize("variant", VERSIONS)
def test_get_info(world: World, variant: str) -> None:
    """TEST_F(vfio_compat_mock_domain, get_info): each size up to that of the whole answer, and beyond."""
    vfio = Compat(world, variant).vfio
    before = vfio.get_info(16)
    assert len(before) == 16
    total, flags, sizes = struct.unpack("<IIQ", before)
    assert (flags, sizes & -sizes) == (PGSIZES | CAPS, MOCK_PAGE)
    assert struct.unpack(HEAD, vfio.get_info(24)) == (total, flags, sizes, 0, 0)
    for argsz in range(24, total):
        data = vfio.get_info(argsz)
        assert len(data) == argsz
        assert struct.unpack_from(HEAD, data) == (total, flags, sizes, 0, 0)
    for argsz in (total, total + 100, (1 << 32) - 1):
        data = vfio.get_info(argsz)
        assert struct.unpack_from(HEAD, data) == (total, flags, sizes, 24, 0)
        assert chain(data) == [
            (3, 1, struct.pack("<II", (1 << 32) - 1, 0)),
            (1, 1, struct.pack("<IIQQ", 1, 0, APERTURE.start, APERTURE.last)),
        ]


def chain(data: bytes) -> list[tuple[int, int, bytes]]:
    """The capabilities: id, version and the rest."""
    found, at = [], struct.unpack_from(HEAD, data)[3]
    while at:
        kind, version, following = struct.unpack_from("<HHI", data, at)
        assert following == 0 or following > at
        found.append((kind, version, data[at + 8 : following or len(data)]))
        at = following
    return found


def test_ranges_that_fit(world: World) -> None:
    """Without room for all, iommufd_fill_cap_iova writes the ranges that fit, but not the header before them."""
    mock = Compat(world, "Ver1v2")
    ioas = mock.vfio.get_ioas()
    middle = APERTURE.start + (1 << 20)
    ioas.reserve(Span(middle, middle + PAGE - 1), mock)
    data = mock.vfio.get_info(24 + 16 + 16 + 16)
    first = struct.pack("<QQ", APERTURE.start, middle - 1)
    assert data[24:36] == struct.pack("<HHII", 3, 1, 40, (1 << 32) - 1)
    assert data[40:] == bytes(16) + first
    assert struct.unpack_from("<I", data)[0] == 24 + 16 + 16 + 32


def test_page_sizes_without_a_device() -> None:
    """All from the CPU's on (iommufd_get_pagesizes)."""
    vfio = VfioCompat(Context())
    vfio.create_ioas()
    assert struct.unpack_from(HEAD, vfio.get_info())[2] == (1 << 64) - PAGE // 2


def test_extensions(world: World) -> None:
    """iommufd_vfio_check_extension."""
    mock = Compat(world, "none")
    answers = {kind: mock.vfio.check_extension(kind) for kind in range(12) if kind != Extension.DMA_CC}
    assert [kind for kind, answer in answers.items() if answer] == [1, 3, 9]
    with refused(errno.ENODEV):
        mock.vfio.check_extension(Extension.DMA_CC)
    for snoops in (True, False):
        ioas = Ioas(mock.context)
        device = world.add(world.iommu(enforce_snoop=snoops))
        Device(mock.context, device.endpoint).attach(ioas)
        mock.vfio.set_ioas(ioas.id)
        assert mock.vfio.check_extension(Extension.DMA_CC) == snoops


def test_types_that_are_none(world: World) -> None:
    """iommufd_vfio_set_iommu: EINVAL comes before ENODEV."""
    mock = Compat(world, "none")
    for kind in (0, 2, 4, 6, 8, 99):
        with refused(errno.EINVAL):
            mock.vfio.set_iommu(kind)


def test_large_pages_stay_where_they_are(world: World) -> None:
    """iopt_disable_large_pages: EINVAL with mappings in a HWPT."""
    mock = Compat(world, "Ver1v2")
    mock.map(PAGE)
    with refused(errno.EINVAL):
        mock.vfio.set_iommu(Extension.TYPE1)
    with refused(errno.ENOENT):
        mock.unmap(MOCK_PAGE)
    mock.unmap(PAGE)
    mock.vfio.set_iommu(Extension.TYPE1)
    mock.map(PAGE)
    mock.vfio.set_iommu(Extension.TYPE1)  # it is already
    assert mock.unmap(MOCK_PAGE) == MOCK_PAGE
    assert (mock.reads(0), mock.reads(MOCK_PAGE)) == (None, BUFFER + MOCK_PAGE)


def test_cuts(world: World) -> None:
    """Of both ends of a range at once; not within a page (iopt_area_split), whatever the range is."""
    mock = Compat(world, "Ver1v0")
    mock.map(8 * PAGE)
    with refused(errno.EINVAL):
        mock.unmap(100, at=PAGE)
    with refused(errno.EINVAL):
        mock.unmap(PAGE, at=PAGE + 100)
    assert mock.unmap(2 * PAGE, at=3 * PAGE) == 2 * PAGE
    assert [mock.reads(n * PAGE) for n in range(2, 6)] == [BUFFER + 2 * PAGE, None, None, BUFFER + 5 * PAGE]
    for iova, size, code in ((0, 0, errno.EINVAL), (1 << 63, 1 << 63 | PAGE, errno.EOVERFLOW), (-PAGE, PAGE, None)):
        with pytest.raises(OSError) as caught:
            mock.vfio.unmap_dma(iova, size)
        assert code in (None, caught.value.errno)
    assert mock.unmap_all() == 6 * PAGE


def test_a_hwpt_that_comes_later_has_no_large_pages(world: World) -> None:
    mock = Compat(world, "none")
    ioas = mock.vfio.create_ioas()
    assert mock.vfio.create_ioas() is ioas
    mock.vfio.set_iommu(Extension.TYPE1)
    mock.map(2 << 20)
    device = world.add(world.iommu())
    Device(mock.context, device.endpoint).attach(ioas)
    assert mock.unmap(PAGE, at=PAGE) == PAGE
    at = [device.reads(APERTURE.start + n * PAGE) for n in range(3)]
    assert at == [BUFFER, None, BUFFER + 2 * PAGE]


def test_no_dirty_tracking(world: World) -> None:
    with refused(errno.ENOTTY):
        Compat(world, "Ver1v2").vfio.dirty_pages()


def test_an_object_that_is_no_ioas(world: World) -> None:
    mock = Compat(world, "Ver1v2")
    device = mock.context.devices[0]
    with refused(errno.ENOENT):
        mock.vfio.set_ioas(device.id)


def test_a_mapping_that_has_no_room(world: World) -> None:
    """Page by page it takes many mappings; if there are too many, none of them stays."""
    mock = Compat(world, "none")
    ioas = mock.vfio.create_ioas()
    mock.vfio.set_iommu(Extension.TYPE1)
    device = world.add(world.iommu(max_mappings=3))
    hwpt = Device(mock.context, device.endpoint).attach(ioas)
    with refused(errno.ENOSPC):
        mock.map(4 * MOCK_PAGE)
    assert (len(hwpt.paging), ioas.mappings()) == (0, [])
    mock.map(3 * MOCK_PAGE)
    assert mock.unmap(MOCK_PAGE, at=MOCK_PAGE) == MOCK_PAGE
    assert len(hwpt.paging) == 2


def test_a_mapping_of_too_many_pages(world: World) -> None:
    """It is refused at once."""
    mock = Compat(world, "none")
    ioas = mock.vfio.create_ioas()
    mock.vfio.set_iommu(Extension.TYPE1)
    Device(mock.context, world.add(world.iommu()).endpoint).attach(ioas)
    began = time.monotonic()
    for size in (8 << 30, 1 << 46):
        with refused(errno.ENOMEM):
            mock.vfio.map_dma(1 << 32, 0, size)
    assert time.monotonic() - began < 5
    assert ioas.mappings() == []
    mock.map(PAGE)
    assert mock.unmap_all() == PAGE
