"""Checks of VFIO's calls on iommufd, from the cases of Linux's iommufd selftest.

Linux 7.3: tools/testing/selftests/iommu/iommufd.c, drivers/iommu/iommufd/vfio_compat.c.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.linux.mock import APERTURE, BUFFER, BUFFER_SIZE, PAGE, PAGE_SIZES, Row
from tests.spaces.world import Device, World
from vmodel.iommu.iommufd import Context, Ioas, VfioCompat
from vmodel.iommu.iommufd import Device as Bound
from vmodel.iommu.iommufd.vfio_compat import Extension, VfioUnmapFlags
from vmodel.span import MiB

#: VFIO_TYPE1_IOMMU can unmap a part of a mapping, VFIO_TYPE1v2_IOMMU cannot.
VERSIONS = {"Ver1v2": Extension.TYPE1V2, "Ver1v0": Extension.TYPE1}
NONE = ("none",)
COMPAT = "vfio_compat_mock_domain."
#: mmap of two huge pages of the CPU, in sixteen parts (huge_map).
HUGE = 4 * MiB
PART = HUGE // 16
#: An order other than ascending.
SHUFFLED = [n * 7 % 16 for n in range(16)]


class Compat:
    """What the cases call; with a version, over an IOAS that a device is attached to."""

    def __init__(self, world: World, version: str) -> None:
        self.context = Context()
        self.vfio = VfioCompat(self.context)
        self.devices: list[Device] = []
        if version in VERSIONS:
            ioas = Ioas(self.context)
            self.devices.append(world.add(world.iommu(page_sizes=PAGE_SIZES, aperture=APERTURE, reserved=())))
            Bound(self.context, self.devices[0].endpoint).attach(ioas)
            self.vfio.set_ioas(ioas.id)
            self.vfio.set_iommu(VERSIONS[version])

    def map(self, size: int = BUFFER_SIZE, at: int = 0, argsz: int = 32, flags: int = 3) -> None:
        self.vfio.map_dma(APERTURE.start + at, BUFFER + at, size, flags, argsz=argsz)

    def unmap(self, size: int = BUFFER_SIZE, at: int = 0, argsz: int = 24, flags: int = 0) -> int:
        return self.vfio.unmap_dma(APERTURE.start + at, size, flags, argsz=argsz)

    def unmap_all(self) -> int:
        return self.vfio.unmap_dma(0, 0, VfioUnmapFlags.ALL)

    def reads(self, at: int) -> int | None:
        return self.devices[0].reads(APERTURE.start + at)


def page_by_page(mock: Compat) -> int:
    """Maps 16 pages one by one, and unmaps them in another order; the bytes unmapped."""
    for n in range(16):
        mock.map(PAGE, n * PAGE)
    return sum(mock.unmap(PAGE, n * PAGE) for n in SHUFFLED)


def parts(mock: Compat) -> list[int | None]:
    """Unmaps a mapping of huge pages in parts; what each part still leads to, before it is unmapped."""
    found = []
    for n in SHUFFLED:
        found.append(mock.reads(n * PART))
        assert mock.unmap(PART, n * PART) == PART
        assert mock.reads(n * PART) is None
    return found


def id_of_set(mock: Compat) -> bool:
    """Whether the id that was set comes back."""
    ioas = Ioas(mock.context)
    mock.vfio.set_ioas(ioas.id)
    return mock.vfio.get_ioas().id == ioas.id


def clear(mock: Compat) -> None:
    id_of_set(mock)
    mock.vfio.clear_ioas()


def destroy(mock: Compat) -> None:
    id_of_set(mock)
    mock.vfio.get_ioas().destroy()


def _nothing(mock: Compat) -> None:
    pass


_Call = Callable[[Compat], object]
_BARE: list[tuple[str, str, _Call, _Call, object]] = [
    ("simple_ioctls", "version", _nothing, lambda mock: mock.vfio.get_api_version(), 0),
    ("simple_ioctls", "type 1, version 2", _nothing, lambda mock: mock.vfio.check_extension(Extension.TYPE1V2), 1),
    ("unmap_cmd", "argsz", _nothing, lambda mock: mock.unmap(PAGE, argsz=1), "EINVAL"),
    ("unmap_cmd", "flags", _nothing, lambda mock: mock.unmap(PAGE, flags=1 << 31), "EINVAL"),
    ("unmap_cmd", "no IOAS", _nothing, lambda mock: mock.unmap(PAGE), "ENODEV"),
    ("map_cmd", "argsz", _nothing, lambda mock: mock.map(PAGE, argsz=1), "EINVAL"),
    ("map_cmd", "flags", _nothing, lambda mock: mock.map(PAGE, flags=1 << 31), "EINVAL"),
    ("map_cmd", "no IOAS", _nothing, lambda mock: mock.map(PAGE), "ENODEV"),
    ("info_cmd", "argsz", _nothing, lambda mock: mock.vfio.get_info(1), "EINVAL"),
    ("info_cmd", "no IOAS", _nothing, lambda mock: mock.vfio.get_info(), "ENODEV"),
    ("set_iommu_cmd", "version 2", _nothing, lambda mock: mock.vfio.set_iommu(Extension.TYPE1V2), "ENODEV"),
    ("set_iommu_cmd", "version 1", _nothing, lambda mock: mock.vfio.set_iommu(Extension.TYPE1), "ENODEV"),
    ("vfio_ioas", "get without one", _nothing, lambda mock: mock.vfio.get_ioas(), "ENODEV"),
    ("vfio_ioas", "set of an id that is none", _nothing, lambda mock: mock.vfio.set_ioas(0), "ENOENT"),
    ("vfio_ioas", "set and get", _nothing, id_of_set, True),
    ("vfio_ioas", "get after clear", clear, lambda mock: mock.vfio.get_ioas(), "ENODEV"),
    ("vfio_ioas", "get after its end (main.c)", destroy, lambda mock: mock.vfio.get_ioas(), "ENODEV"),
]
_MAPS: list[tuple[str, str, _Call, _Call, object]] = [
    ("map", "unmap", Compat.map, Compat.unmap, BUFFER_SIZE),
    ("map", "unmap of nothing", _nothing, Compat.unmap, 0),
    ("map", "unmap of all with a range", Compat.map, lambda mock: mock.unmap(flags=VfioUnmapFlags.ALL), "EINVAL"),
    ("map", "unmap of all", Compat.map, Compat.unmap_all, BUFFER_SIZE),
    ("map", "page by page", _nothing, page_by_page, BUFFER_SIZE),
    ("simple_close", "close", _nothing, lambda mock: mock.context.close(), None),
]
ROWS = [
    *(Row(f"iommufd.{case}", says, call, expect, before, NONE) for case, says, before, call, expect in _BARE),
    *(Row(COMPAT + case, says, call, expect, before, tuple(VERSIONS)) for case, says, before, call, expect in _MAPS),
    Row(
        f"{COMPAT}huge_map",
        "parts, version 1",
        parts,
        # Beyond the first part is no memory, as RAM is small here.
        [BUFFER + n * PART if BUFFER + n * PART < 4 * MiB else None for n in SHUFFLED],
        lambda mock: mock.map(HUGE),
        ("Ver1v0",),
    ),
    *(
        Row(
            f"{COMPAT}huge_map",
            f"part {n}, version 2",
            lambda mock, n=n: mock.unmap(PART, n * PART),  # type: ignore[misc]
            "ENOENT",
            lambda mock: mock.map(HUGE),
            ("Ver1v2",),
        )
        for n in range(16)
    ),
]
DIFFERENCES: list[Row] = []
#: A function of test_compat.py has all of it.
WHOLE = [f"{COMPAT}get_info"]
