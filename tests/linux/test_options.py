"""Options, processes, files and dma-bufs answer as the cases of Linux's iommufd selftest check them."""

from __future__ import annotations

import errno

import pytest

from tests.linux.access import Driver, check_rw
from tests.linux.mock import APERTURE, BUFFER, BUFFER_SIZE, DEVICES, PAGE, VARIANTS, Mock, Row, by_variant, check, name
from tests.linux.options import LINES, ROWS, SIZE, Opened
from tests.spaces.world import World, refused
from vmodel.iommu.iommufd import AccountMode, Context, Device, DmaBuf, Ioas, MemoryFile, Option, Process
from vmodel.span import PAGE as SMALLEST


@pytest.mark.parametrize(("row", "variant"), by_variant(ROWS + LINES), ids=name)
def test_rows(world: World, row: Row, variant: str) -> None:
    check(row, Opened(world, DEVICES[variant]))


@pytest.mark.parametrize("mode", [AccountMode.USER, AccountMode.MM])
def test_change_process(world: World, mode: AccountMode) -> None:
    """change_process.basic.  Without CAP_IPC_LOCK, its variant without accounting is that of the user."""
    parent, child = (Process(locked_limit=8 * PAGE, sys_resource=True) for _ in range(2))
    context = Context(process=parent)
    context.set_option(Option.RLIMIT_MODE, mode is AccountMode.MM)
    ioas = Ioas(context)
    Device(context, world.add(world.iommu()).endpoint).attach(ioas)
    iova = ioas.map(BUFFER, PAGE)
    with refused(errno.EINVAL):
        context.change_process(parent)
    ioas.unmap(iova, PAGE)
    ioas.map_file(MemoryFile(BUFFER, BUFFER_SIZE), 0, PAGE)
    context.change_process(parent)
    pages, locked = PAGE // SMALLEST, PAGE // SMALLEST if mode is AccountMode.MM else 0
    assert (parent.pinned, parent.locked, child.pinned, child.locked) == (pages, locked, 0, 0)
    context.change_process(child)
    assert (parent.pinned, parent.locked, child.pinned, child.locked) == (0, 0, pages, locked)
    assert context.process is child
    assert (parent.user.locked, child.user.locked) == (0, 0 if locked else pages)
    ioas.unmap_all()
    assert child.pinned == child.locked == child.user.locked == 0


def forked(mock: Mock) -> Process:
    """Another process maps the buffer at the start of the aperture."""
    parent, child = mock.context.process, Process()
    mock.context.process = child
    mock.ioas.map(BUFFER, BUFFER_SIZE, iova=APERTURE.start)
    mock.context.process = parent
    return child


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_process_that_has_gone(world: World, variant: str) -> None:
    """iommufd_ioas.fork_gone: what is pinned can still be used, and copied to another IOMMU; what is not is EFAULT."""
    mock = Mock(world, DEVICES[variant])
    driver = Driver(mock, pins=False)
    forked(mock).exit()
    if mock.devices:
        late = mock.add()
        late.attach(mock.ioas)
        assert mock.devices[-1].reads(APERTURE.start) == BUFFER
        check_rw(mock, driver.access, APERTURE.start)
        return
    late = mock.add()
    with refused(errno.EFAULT):
        late.attach(mock.ioas)
    assert mock.devices[0].reads(APERTURE.start) is None
    with refused(errno.EFAULT):
        driver.access.read(APERTURE.start, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_process(world: World, variant: str) -> None:
    """iommufd_ioas.fork_present."""
    mock = Mock(world, DEVICES[variant])
    driver = Driver(mock, pins=False)
    child = forked(mock)
    mock.add().attach(mock.ioas)
    assert mock.devices[-1].reads(APERTURE.start) == BUFFER and child.pinned == BUFFER_SIZE // SMALLEST
    check_rw(mock, driver.access, APERTURE.start)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dmabuf_is_revoked(world: World, variant: str) -> None:
    """iommufd_ioas.dmabuf_revoke; no DMA gets to it, also by a HWPT that is made later, or by a copy."""
    mock, dmabuf = Mock(world, DEVICES[variant]), DmaBuf(BUFFER, SIZE)
    iova = mock.ioas.map_file(dmabuf, 0, SIZE)
    other = mock.ioas.copy(mock.ioas, iova, PAGE)
    assert mock.reaches(iova, SIZE)
    dmabuf.revoke()
    dmabuf.revoke()

    def no_dma() -> bool:
        return not any(device.reads(at) is not None for device in mock.devices for at in (iova, other))

    assert no_dma() and len(mock.ioas.mappings()) == 2
    if mock.devices:
        mock.bound[0].replace(mock.bound[0].hwpt_alloc(mock.ioas))
        assert no_dma()
    with refused(errno.ENODEV):
        mock.ioas.map_file(dmabuf, 0, SIZE)
    again = mock.ioas.copy(mock.ioas, iova, PAGE)
    dmabuf.restore()
    assert no_dma() and not any(device.reads(again) is not None for device in mock.devices)
    later = mock.ioas.map_file(dmabuf, 0, SIZE)
    assert mock.reaches(later, SIZE)
    assert mock.ioas.unmap(iova, SIZE) == SIZE
    mock.ioas.map_file(dmabuf, 0, SIZE, iova=iova)
    assert mock.reaches(iova, SIZE) and mock.ioas.unmap_all() == 2 * SIZE + 2 * PAGE
