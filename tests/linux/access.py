"""Checks of kernel accesses: the selftest's cases of IOMMU_TEST_OP_CREATE_ACCESS, and lines of iommufd/device.c."""

from __future__ import annotations

from collections.abc import Callable

from tests.linux.mock import BUFFER, BUFFER_SIZE, LAST, PAGE, Mock, Row
from tests.spaces.world import World
from vmodel.errors import Access
from vmodel.iommu.iommufd import Ioas, KernelAccess

R, W = Access.READ, Access.WRITE


class Driver:
    """The kernel driver of the selftest: it keeps what it has pinned, and unpins it when notified (selftest.c)."""

    def __init__(self, mock: Mock, ioas: Ioas | None = None, *, pins: bool = True) -> None:
        self.pinned: list[tuple[int, int]] = []
        self.notified: list[tuple[int, int]] = []
        self.access = KernelAccess(mock.context, mock.world.memory, self.unmap if pins else None)
        self.access.attach(ioas or mock.ioas)

    def pin(self, iova: int, size: int, access: Access = R) -> bool:
        """Pins a range; whether the buffer is there (IOMMU_TEST_OP_ACCESS_PAGES)."""
        spans = self.access.pin_pages(iova, size, access)
        self.pinned.append((iova, size))
        return spans[0].start == BUFFER and sum(span.size for span in spans) == size

    def unpin(self) -> None:
        """Unpins what was pinned last."""
        self.access.unpin_pages(*self.pinned.pop())

    def unmap(self, iova: int, size: int) -> None:
        self.notified.append((iova, size))
        for at in [at for at in self.pinned if at[0] <= iova + size - 1 and iova <= sum(at) - 1]:
            self.pinned.remove(at)
            self.access.unpin_pages(*at)


def check_rw(mock: Mock, access: KernelAccess, iova: int) -> None:
    """Reads and writes around the end of a page, and reads all (check_access_rw)."""
    ram = mock.world.ram
    ram[BUFFER : BUFFER + BUFFER_SIZE] = bytes(n * 7 % 251 for n in range(BUFFER_SIZE))
    for at in range(PAGE - 50, PAGE + 50):
        for size in range(1, 64):
            start = BUFFER + at
            assert access.read(iova + at, size) == ram[start : start + size]
            data = bytes((at + size + n) & 0xFF for n in range(size))
            before, after = ram[start - 1], ram[start + size]
            access.write(iova + at, data)
            assert ram[start - 1 : start + size + 1] == bytes([before]) + data + bytes([after])
    assert access.read(iova, BUFFER_SIZE) == ram[BUFFER : BUFFER + BUFFER_SIZE]


class Opened(Mock):
    """A mock with a driver, and three mappings: a page to read and write, one to read, and one after a hole."""

    def __init__(self, world: World, devices: int) -> None:
        super().__init__(world, devices)
        self.map(0)
        self.ioas.map(BUFFER + PAGE, PAGE, R, self.base + PAGE)
        self.map(3)
        self.driver = Driver(self)
        self.access = self.driver.access


def detached(mock: Opened) -> None:
    mock.access.detach()


def nothing(mock: Opened) -> None:
    """Before a call that needs nothing."""


def unaligned(mock: Opened) -> None:
    """An IOAS with a mapping of three bytes."""
    mock.other = Ioas(mock.context)  # type: ignore[attr-defined]
    mock.other.map(BUFFER, 3)  # type: ignore[attr-defined]


Call = Callable[[Opened], object]
#: Where the checks are in drivers/iommu/iommufd/device.c, what they say, before, call, and answer.
_LINES: list[tuple[str, str, Call, Call, object]] = [
    ("1500", "pin without `unmap`", nothing, lambda m: Driver(m, pins=False).pin(m.base, PAGE), "EINVAL"),
    ("1503", "pin of no bytes", detached, lambda m: m.driver.pin(m.base, 0), "EINVAL"),
    ("1505", "pin past the end", detached, lambda m: m.driver.pin(LAST, 2), "EOVERFLOW"),
    ("1510", "pin, not attached", detached, lambda m: m.driver.pin(m.base, PAGE), "ENOENT"),
    ("1523", "pin from the middle of a page", nothing, lambda m: m.driver.pin(m.base + 1, PAGE), "EINVAL"),
    ("1528", "pin to write what is read-only", nothing, lambda m: m.driver.pin(m.base, 2 * PAGE, W), "EPERM"),
    ("1528", "pin to read what is read-only", nothing, lambda m: m.driver.pin(m.base, 2 * PAGE), True),
    ("1539", "pin over a hole", nothing, lambda m: m.driver.pin(m.base, 4 * PAGE), "ENOENT"),
    ("1539", "pin of a hole", nothing, lambda m: m.driver.pin(m.base + 2 * PAGE, PAGE), "ENOENT"),
    ("1587", "read of no bytes", detached, lambda m: m.access.read(m.base, 0), "EINVAL"),
    ("1589", "read past the end", detached, lambda m: m.access.read(LAST, 2), "EOVERFLOW"),
    ("1594", "read, not attached", detached, lambda m: m.access.read(m.base, 1), "ENOENT"),
    ("1609", "write of what is read-only", nothing, lambda m: m.access.write(m.base + PAGE - 1, b"ab"), "EPERM"),
    ("1621", "read over a hole", nothing, lambda m: m.access.read(m.base + 2 * PAGE - 1, 2), "ENOENT"),
    ("1321", "attach twice", nothing, lambda m: m.access.attach(m.ioas), "EINVAL"),
    ("1353", "replace of nothing", detached, lambda m: m.access.replace(m.ioas), "ENOENT"),
    ("1162", "replace by the same", nothing, lambda m: [m.access.replace(m.ioas), m.driver.notified][1], []),
    ("1182", "detach", nothing, lambda m: [m.access.detach(), m.driver.notified][1], [(0, LAST)]),
    ("1233", "IOMMU_DESTROY by a user", nothing, lambda m: m.context.destroy(m.access.id), "EBUSY"),
    ("1176", "IOMMU_DESTROY of its IOAS", nothing, lambda m: Ioas.destroy(m.ioas), "EBUSY"),
    ("1171", "attach where a mapping is not aligned", unaligned, lambda m: m.access.replace(m.other), "EADDRINUSE"),  # type: ignore[attr-defined]
]
LINES = [
    Row(f"drivers/iommu/iommufd/device.c:{line}", says, call, expect, before=before)
    for line, says, before, call, expect in _LINES
]


ROWS: list[Row] = []
DIFFERENCES: list[Row] = []
#: Cases of functions of test_access.py.
WHOLE = [
    "iommufd_ioas.access_domain_destory",
    "iommufd_ioas.access_pin",
    "iommufd_ioas.access_pin_unmap",
    "iommufd_ioas.access_rw",
    "iommufd_ioas.access_rw_unaligned",
    "iommufd_mock_domain.user_copy",
]
