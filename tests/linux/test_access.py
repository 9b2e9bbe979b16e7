"""Kernel accesses answer as the cases of Linux's iommufd selftest check them: each row of `access`, and whole cases."""

from __future__ import annotations

import errno

import pytest

from tests.linux.access import LINES, Driver, Opened, check_rw
from tests.linux.mock import (
    APERTURE,
    BUFFER,
    BUFFER_SIZE,
    DEVICES,
    MOCK_PAGE,
    PAGE,
    VARIANTS,
    Mock,
    Row,
    by_variant,
    check,
    name,
)
from tests.spaces.world import RAM, World, refused
from vmodel.iommu.iommufd import Device as Bound
from vmodel.iommu.iommufd import Ioas, MemoryFile
from vmodel.span import KiB, MiB


@pytest.mark.parametrize(("row", "variant"), by_variant(LINES), ids=name)
def test_lines_of_linux(world: World, row: Row, variant: str) -> None:
    check(row, Opened(world, DEVICES[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_iommu_goes_before_what_is_pinned(world: World, variant: str) -> None:
    """iommufd_ioas.access_domain_destory."""
    mock = Mock(world, DEVICES[variant])
    mock.ioas.map(0, RAM, iova=mock.base)
    driver = Driver(mock)
    [span] = driver.access.pin_pages(mock.base + PAGE, PAGE)
    assert span.start == PAGE and span.size == PAGE
    for bound in mock.bound:
        bound.detach()
    driver.access.unpin_pages(mock.base + PAGE, PAGE)
    driver.access.destroy()
    assert mock.ioas.unmap_all() == RAM and not driver.notified[:-1], "only notified that it is detached"


@pytest.mark.parametrize("variant", VARIANTS)
def test_pinned_once_and_twice_and_beside_an_iommu(world: World, variant: str) -> None:
    """iommufd_ioas.access_pin."""
    mock = Mock(world, DEVICES[variant])
    driver = Driver(mock)
    late = world.add(mock.iommu, slot=9)
    bound = Bound(mock.context, late.endpoint)
    for size in range(PAGE, BUFFER_SIZE, PAGE):
        mock.ioas.map(BUFFER, BUFFER_SIZE, iova=APERTURE.start)
        for times in (1, 2):
            assert all(driver.pin(APERTURE.start, size) for _ in range(times))
            for _ in range(times):
                driver.unpin()
        assert driver.pin(APERTURE.start, size)
        bound.attach(mock.ioas)
        assert late.reads(APERTURE.start + size - MOCK_PAGE) == BUFFER + size - MOCK_PAGE
        bound.detach()
        driver.unpin()
        assert mock.ioas.unmap(APERTURE.start, BUFFER_SIZE) == BUFFER_SIZE and not driver.notified
    driver.access.destroy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_unmap_of_what_is_pinned(world: World, variant: str) -> None:
    """iommufd_ioas.access_pin_unmap: the driver has unpinned it."""
    mock = Mock(world, DEVICES[variant])
    driver = Driver(mock)
    mock.ioas.map(BUFFER, BUFFER_SIZE, iova=APERTURE.start)
    driver.pin(APERTURE.start, BUFFER_SIZE)
    assert mock.ioas.unmap(APERTURE.start, BUFFER_SIZE) == BUFFER_SIZE
    assert driver.pinned == [] and driver.notified == [(APERTURE.start, BUFFER_SIZE)]
    with refused(errno.EINVAL):
        driver.access.unpin_pages(APERTURE.start, BUFFER_SIZE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_read_and_write(world: World, variant: str) -> None:
    """iommufd_ioas.access_rw."""
    mock = Mock(world, DEVICES[variant])
    driver = Driver(mock, pins=False)
    iova = mock.map_any(BUFFER_SIZE)
    check_rw(mock, driver.access, iova)
    assert mock.ioas.unmap(iova, BUFFER_SIZE) == BUFFER_SIZE and not driver.notified
    driver.access.destroy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_read_and_write_of_half_pages(world: World, variant: str) -> None:
    """iommufd_ioas.access_rw_unaligned, and without an IOMMU at any byte."""
    mock = Mock(world, DEVICES[variant])
    driver = Driver(mock, pins=False)
    for iova in [mock.base + MOCK_PAGE, *([] if mock.devices else [3 * KiB, 1])]:
        mock.ioas.map(BUFFER, BUFFER_SIZE, iova=iova)
        check_rw(mock, driver.access, iova)
        assert mock.ioas.unmap(iova, BUFFER_SIZE) == BUFFER_SIZE
    driver.access.destroy()


@pytest.mark.parametrize("of_file", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_copy_of_what_is_pinned(world: World, devices: int, of_file: bool) -> None:
    """iommufd_mock_domain.user_copy: an IOAS without an IOMMU, an access that moves to another, and copies."""
    mock, file = Mock(world, devices), MemoryFile(BUFFER, BUFFER_SIZE)
    first, second = Ioas(mock.context), Ioas(mock.context)

    def map_buffer(ioas: Ioas) -> int:
        return ioas.map_file(file, 0, BUFFER_SIZE) if of_file else ioas.map(BUFFER, BUFFER_SIZE)

    iova = map_buffer(first)
    driver = Driver(mock, first)
    assert driver.pin(iova, BUFFER_SIZE)
    mock.ioas.copy(first, iova, BUFFER_SIZE, iova=APERTURE.start)
    assert mock.reaches(APERTURE.start, BUFFER_SIZE)
    iova = map_buffer(second)
    driver.access.replace(second)
    assert driver.pinned == []
    assert mock.ioas.unmap(APERTURE.start, BUFFER_SIZE) == BUFFER_SIZE
    first.destroy()
    assert driver.pin(iova, BUFFER_SIZE)
    mock.ioas.copy(second, iova, BUFFER_SIZE, iova=APERTURE.start)
    assert mock.reaches(APERTURE.start, BUFFER_SIZE)
    driver.unpin()
    driver.access.destroy()
    second.destroy()


def test_memory_that_is_not_there(world: World) -> None:
    """drivers/iommu/iommufd/pages.c:2405: EFAULT."""
    mock = Mock(world, 0)
    driver = Driver(mock, pins=False)
    mock.ioas.map(RAM - PAGE, 1 << 50, iova=MiB)
    assert len(driver.access.read(MiB, PAGE)) == PAGE
    with refused(errno.EFAULT):
        driver.access.read(MiB, 1 << 49)
    with refused(errno.EFAULT):
        driver.access.write(MiB + PAGE - 1, b"ab")
