"""Checks of VFIO's type 1, from the cases of Linux's iommufd selftest for its VFIO compatibility.

`Container` answers as drivers/vfio/vfio_iommu_type1.c, which iommufd replaces there (`compat`); in what is
checked here both answer alike.
"""

from __future__ import annotations

from tests.linux.mock import APERTURE, BUFFER, BUFFER_SIZE, MOCK_PAGE, PAGE, PAGE_SIZES, Row
from tests.spaces.world import Device, World
from vmodel.iommu.container import Container

VERSION = ("Ver1v2",)
COMPAT = "vfio_compat_mock_domain."


class Type1:
    """A container with one group, or with none yet."""

    def __init__(self, world: World, devices: int) -> None:
        self.container = Container()
        self.devices: list[Device] = []
        for _ in range(devices):
            iommu = world.iommu(page_sizes=PAGE_SIZES, aperture=APERTURE, reserved=())
            self.devices.append(world.add(iommu))
            self.container.add_group(self.devices[-1].group)

    def map(self, size: int = BUFFER_SIZE, at: int = 0) -> None:
        self.container.map(APERTURE.start + at, BUFFER + at, size)

    def unmap(self, size: int = BUFFER_SIZE, at: int = 0) -> int:
        return self.container.unmap(APERTURE.start + at, size)


def page_by_page(mock: Type1) -> int:
    """Maps 16 pages one by one, and unmaps them in another order; the bytes unmapped."""
    for n in range(16):
        mock.map(PAGE, n * PAGE)
    assert mock.devices[0].reads(APERTURE.start + 15 * PAGE) == BUFFER + 15 * PAGE
    removed = sum(mock.unmap(PAGE, n * 7 % 16 * PAGE) for n in range(16))
    assert mock.devices[0].reads(APERTURE.start + 15 * PAGE) is None
    return removed


ROWS = [
    Row(COMPAT + case, says, call, expect, before=before, variants=VERSION)
    for case, says, before, call, expect in (
        ("simple_close", "a group", lambda mock: None, lambda mock: mock.container.close(), None),
        ("get_info", "one range", lambda mock: None, lambda mock: mock.container.iova_ranges, [APERTURE]),
        ("get_info", "pages", lambda mock: None, lambda mock: min(mock.container.page_sizes), MOCK_PAGE),
        ("get_info", "mappings left", Type1.map, lambda mock: mock.container.dma_avail, 65534),
        ("map", "unmap", Type1.map, Type1.unmap, BUFFER_SIZE),
        ("map", "unmap of nothing", lambda mock: None, Type1.unmap, 0),
        ("map", "unmap of all", Type1.map, lambda mock: mock.container.unmap_all(), BUFFER_SIZE),
        ("map", "page by page", lambda mock: None, page_by_page, BUFFER_SIZE),
    )
]
DIFFERENCES: list[Row] = []
WHOLE: list[str] = []
