"""VFIO's container for POWER: Linux drivers/vfio/vfio_iommu_spapr_tce.c and arch/powerpc/platforms/powernv/pci-ioda.c.

Each test names the function whose rule it is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from tests.spaces.world import RAM, Device, World, refused
from vmodel.errors import Access
from vmodel.iommu.spapr import SpaprContainer, SpaprInfo, TceWindow
from vmodel.span import GiB, KiB, MiB, Span

R = Access.READ
#: Where the second window begins: TVE 1 is selected by address bit 59 (pnv_pci_ioda2_setup_dma_pe).
HIGH = 1 << 59
DEFAULT = TceWindow(Span.sized(0, 2 * GiB), 4 * KiB)
TiB = 1024 * GiB


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture
def device(world: World) -> Device:
    return world.add(world.iommu("power-pe"))


@pytest.fixture
def container(device: Device) -> SpaprContainer:
    """Of version 2, with the device's group, and all RAM registered."""
    made = SpaprContainer()
    made.add_group(device.group)
    made.register_memory(0, RAM)
    return made


def test_default_window(device: Device, container: SpaprContainer) -> None:
    """tce_iommu_create_default_window: made when it is first needed."""
    assert container.windows == (None, None)
    container.map(64 * KiB, 128 * KiB, 64 * KiB)
    assert container.windows == (DEFAULT, None)
    assert (device.reads(64 * KiB), device.reads(124 * KiB), device.reads(128 * KiB)) == (128 * KiB, 188 * KiB, None)
    assert device.writes(64 * KiB) == 128 * KiB
    container.map(2 * GiB - 4 * KiB, 0, 4 * KiB, R)
    assert (device.reads(2 * GiB - 4 * KiB), device.writes(2 * GiB - 4 * KiB)) == (0, None)
    with refused(errno.ENXIO):  # tce_iommu_find_table
        container.map(2 * GiB, 0, 4 * KiB)


def test_replaced(device: Device, container: SpaprContainer) -> None:
    """tce_iommu_build_v2: entries are exchanged, whatever they were; not EEXIST as in type 1."""
    container.map(0, 0, 64 * KiB)
    container.map(8 * KiB, 256 * KiB, 4 * KiB, R)
    assert [device.reads(n * 4 * KiB) for n in range(4)] == [0, 4 * KiB, 256 * KiB, 12 * KiB]
    assert device.writes(8 * KiB) is None
    container.unmap(4 * KiB, 8 * KiB)
    assert [device.reads(n * 4 * KiB) for n in range(4)] == [0, None, None, 12 * KiB]
    container.unmap(0, 2 * GiB)  # whatever is mapped
    container.unmap(0, 2 * GiB)
    assert device.reads(0) is None


def test_high_window(device: Device, container: SpaprContainer) -> None:
    start = container.create(16, 4 * GiB)
    assert start == HIGH and container.windows == (DEFAULT, TceWindow(Span.sized(HIGH, 4 * GiB), 64 * KiB))
    container.map(HIGH + 64 * KiB, 128 * KiB, 64 * KiB)
    container.map(0, 0, 4 * KiB)
    assert (device.reads(HIGH + 64 * KiB), device.reads(0), device.reads(HIGH)) == (128 * KiB, 0, None)
    for iova, gpa, size in ((HIGH, 0, 4 * KiB), (HIGH, 4 * KiB, 64 * KiB), (HIGH + 4 * KiB, 0, 64 * KiB)):
        with refused(errno.EINVAL):  # IOMMU_PAGE_MASK of the window; iommu_tce_check_ioba
            container.map(iova, gpa, size)
    with refused(errno.EINVAL):
        container.unmap(HIGH, 4 * KiB)
    container.remove(HIGH + 5)  # any address of it: tce_iommu_find_table
    assert container.windows == (DEFAULT, None)
    assert (device.reads(HIGH + 64 * KiB), device.reads(0)) == (None, 0)
    with refused(errno.ENXIO):
        container.unmap(HIGH, 64 * KiB)
    with refused(errno.EINVAL):
        container.remove(HIGH)


def test_a_large_default_window(device: Device, container: SpaprContainer) -> None:
    """Guests with enough memory remove the default window for one of all memory at 0, as QEMU does."""
    container.remove(0)  # pending: nothing is made
    assert container.windows == (None, None)
    with refused(errno.ENXIO):
        container.map(0, 0, 64 * KiB)
    assert container.create(16, 256 * GiB, 2) == 0
    container.map(128 * GiB, 64 * KiB, 64 * KiB)
    assert device.reads(128 * GiB) == 64 * KiB


@pytest.mark.parametrize(
    ("shift", "size", "levels", "code"),
    [
        (13, 4 * GiB, 1, errno.EINVAL),  # tce_iommu_create_window: pgsizes
        (-1, 4 * GiB, 1, errno.EINVAL),
        (64, 4 * GiB, 1, errno.EINVAL),
        (16, 3 * GiB, 1, errno.EINVAL),  # pnv_pci_ioda2_get_table_size: is_power_of_2
        (16, 0, 1, errno.EINVAL),
        (24, 64 * KiB, 1, errno.EINVAL),
        (16, -GiB, 1, errno.EINVAL),
        (16, 4 * GiB, 0, errno.EINVAL),  # POWERNV_IOMMU_MAX_LEVELS
        (16, 4 * GiB, 6, errno.EINVAL),
        (16, TiB, 3, errno.EINVAL),  # pnv_pci_ioda2_table_alloc_pages: (level_shift - 3) * levels + page_shift >= 55
        (16, TiB, 2, 0),
        (16, TiB, 1, errno.ENOMEM),  # 2**24 entries in one piece
        (24, TiB, 1, 0),
        (12, 1 << 63, 1, errno.EINVAL),
    ],
)
def test_create(container: SpaprContainer, shift: int, size: int, levels: int, code: int) -> None:
    if code:
        with refused(code):
            container.create(shift, size, levels)
        assert container.windows == (DEFAULT, None)
    else:
        assert container.create(shift, size, levels) == HIGH


def test_no_third_window(container: SpaprContainer) -> None:
    """tce_iommu_find_free_table: IOMMU_TABLE_GROUP_MAX_TABLES."""
    container.create(12, GiB)
    with refused(errno.ENOSPC):
        container.create(12, GiB)
    container.remove(0)
    assert container.create(12, MiB) == 0


@pytest.mark.parametrize(
    ("iova", "gpa", "size", "access", "code"),
    [
        (4 * KiB, 0, 6 * KiB, Access.READ, errno.EINVAL),
        (4 * KiB, 0x800, 4 * KiB, Access.READ, errno.EINVAL),
        (0x800, 0, 4 * KiB, Access.READ, errno.EINVAL),
        (4 * KiB, 0, 4 * KiB, Access(0), errno.EINVAL),  # tce_iommu_ioctl: neither flag
        (4 * KiB, 0, -4 * KiB, Access.READ, errno.EINVAL),
        (2 * GiB - 4 * KiB, 0, 8 * KiB, Access.READ, errno.EINVAL),  # its end is beyond the window
        (4 * KiB, RAM, 4 * KiB, Access.READ, errno.EINVAL),  # tce_iommu_prereg_ua_to_hpa
        (4 * KiB, RAM - 4 * KiB, 8 * KiB, Access.READ, errno.EINVAL),
        (4 * KiB, -4 * KiB, 4 * KiB, Access.READ, errno.EINVAL),
        (1 << 63, 0, 4 * KiB, Access.READ, errno.ENXIO),
        (-4 * KiB, 0, 4 * KiB, Access.READ, errno.ENXIO),
        (4 * KiB, 0, 0, Access.READ, 0),
    ],
)
def test_map_refused(container: SpaprContainer, iova: int, gpa: int, size: int, access: Access, code: int) -> None:
    container.map(0, 0, 4 * KiB)
    if code:
        with refused(code):
            container.map(iova, gpa, size, access)
    else:
        container.map(iova, gpa, size, access)
    assert container._domain is not None and len(container._domain) == 1


def test_registered_memory(device: Device) -> None:
    """tce_iommu_register_pages, tce_iommu_unregister_pages, mm_iommu_put."""
    container = SpaprContainer()
    container.add_group(device.group)
    with refused(errno.EPERM):  # not enabled
        container.map(0, 0, 4 * KiB)
    for gpa, size in ((4 * KiB, 64 * KiB), (0, 4 * KiB), (0, -64 * KiB), ((1 << 64) - 64 * KiB, 128 * KiB)):
        with refused(errno.EINVAL):
            container.register_memory(gpa, size)
    with refused(errno.ENOMEM):
        container.register_memory(0, 0)
    assert not container.enabled
    container.register_memory(MiB, MiB)
    with refused(errno.EBUSY):
        container.register_memory(MiB, MiB)
    with refused(errno.EINVAL):  # mm_iommu_do_alloc: overlap
        container.register_memory(MiB, 64 * KiB)
    container.register_memory(2 * MiB, MiB)
    with refused(errno.EINVAL):  # in two regions
        container.map(0, 2 * MiB - 4 * KiB, 8 * KiB)
    container.map(0, MiB, 4 * KiB)
    for gpa, size, code in ((MiB, 64 * KiB, errno.ENOENT), (MiB, 0, errno.ENOENT), (1, MiB, errno.EINVAL)):
        with refused(code):
            container.unregister_memory(gpa, size)
    with refused(errno.EBUSY):
        container.unregister_memory(MiB, MiB)
    container.unmap(0, 4 * KiB)
    container.unregister_memory(MiB, MiB)
    with refused(errno.EINVAL):
        container.map(0, MiB, 4 * KiB)


def test_several_groups(world: World, device: Device, container: SpaprContainer) -> None:
    """Version 2 programs its tables to all groups; tce_iommu_release_ownership clears them for each that leaves."""
    second = world.add(world.iommu("power-pe"))
    container.map(0, 64 * KiB, 4 * KiB)
    container.add_group(second.group)
    assert container.groups == [device.group, second.group]
    assert (device.reads(0), second.reads(0)) == (64 * KiB, 64 * KiB)
    container.remove_group(device.group)
    assert device.group.owner is None and device.reads(0) == 0  # the kernel's again
    assert second.reads(0) is None
    assert container.windows == (DEFAULT, None)
    container.map(0, 64 * KiB, 4 * KiB)
    assert second.reads(0) == 64 * KiB
    with refused(errno.EINVAL):
        container.remove_group(device.group)
    with refused(errno.EINVAL):
        container.add_group(second.group)


def test_groups_that_cannot_be_in(world: World, device: Device, container: SpaprContainer) -> None:
    other = world.add(world.iommu("vt-d"))
    narrow = world.add(world.iommu("power-pe", input_bits=40))
    owned = world.add(world.iommu("power-pe"))
    owned.group.claim_dma_owner("somebody")
    for group, code in ((other.group, errno.ENODEV), (narrow.group, errno.EPERM), (owned.group, errno.EPERM)):
        with refused(code):
            container.add_group(group)
    assert other.group.owner is None and narrow.group.owner is None
    assert container.groups == [device.group]


def test_version_1(world: World, device: Device) -> None:
    """One group for each container, the default window only, and enabling by hand."""
    container = SpaprContainer(v2=False)
    with refused(errno.ENODEV):  # tce_iommu_enable
        container.enable()
    container.add_group(device.group)
    second = world.add(world.iommu("power-pe"))
    with refused(errno.EBUSY):  # tce_iommu_attach_group
        container.add_group(second.group)
    assert second.group.owner is None and second.reads(0) == 0
    assert container.get_info() == SpaprInfo(0, 2 * GiB)
    with refused(errno.EPERM):
        container.map(0, 0, 4 * KiB)
    container.enable()
    with refused(errno.EBUSY):
        container.enable()
    container.map(0, 64 * KiB, 4 * KiB)  # no memory is registered
    with refused(errno.ERANGE):
        container.map(0, 1 << 52, 4 * KiB)
    container.disable()
    with refused(errno.EPERM):
        container.unmap(0, 4 * KiB)
    assert device.reads(0) == 64 * KiB
    calls: list[Callable[[], object]] = [
        lambda: container.create(12, GiB),
        lambda: container.remove(0),
        lambda: container.register_memory(0, MiB),
        lambda: container.unregister_memory(0, MiB),
    ]
    for call in calls:
        with refused(errno.ENOTTY):
            call()


def test_version_2_has_no_enable(container: SpaprContainer) -> None:
    for call in (container.enable, container.disable):
        with refused(errno.ENOTTY):
            call()


def test_get_info(container: SpaprContainer) -> None:
    assert container.get_info() == SpaprInfo(0, 2 * GiB, frozenset((4 * KiB, 64 * KiB, 16 * MiB)), 2, 5)


def test_without_a_group() -> None:
    container = SpaprContainer()
    container.register_memory(0, MiB)
    for call in (container.get_info, lambda: container.create(12, GiB), lambda: container.remove(0)):
        with refused(errno.ENXIO):
            call()
    with refused(errno.ENXIO):
        container.map(0, 0, 4 * KiB)


def test_close(device: Device, container: SpaprContainer) -> None:
    container.map(0, 64 * KiB, 4 * KiB)
    container.close()
    assert device.group.owner is None and device.reads(0) == 0
    with refused(errno.EBADF):
        container.add_group(device.group)
