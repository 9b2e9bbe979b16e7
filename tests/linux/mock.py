"""What the cases of Linux's iommufd selftest start from, and rows that say what each case checks.

Linux 7.3: tools/testing/selftests/iommu/iommufd.c, with the device and the IOMMU of drivers/iommu/iommufd/selftest.c.
That IOMMU has pages of half the size of the CPU's; the smallest here is 4 KiB, so all sizes are twice those of Linux.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.spaces.world import RW, Device, World
from vmodel.errors import Access, IommuError
from vmodel.iommu import Iommu
from vmodel.iommu.domain import AllocFlags
from vmodel.iommu.iommufd import Context, FaultObject, Hwpt, Ioas
from vmodel.iommu.iommufd import Device as Bound
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.span import KiB, MiB, Span

#: The IOMMU's smallest page and its IOVAs (iommufd_test.h, MOCK_PAGE_SIZE and MOCK_APERTURE_*); the CPU's page.
MOCK_PAGE = 4 * KiB
APERTURE = Span(1 << 24, (1 << 31) - 1)
PAGE = 2 * MOCK_PAGE
LAST = (1 << 64) - 1
#: The memory that is mapped: aligned to a huge page, and 16 pages long (setup_sizes).
BUFFER = 2 * MiB
BUFFER_SIZE = 16 * PAGE
PASID_BITS = 20
#: As AMD's first format: any power of two.
PAGE_SIZES = frozenset(MOCK_PAGE << n for n in range(19))
#: Variants of fixtures: how many devices are attached to the IOAS.  First those of iommufd_ioas.
VARIANTS = {"no_domain": 0, "mock_domain": 1, "two_mock_domain": 2}
WITH_DOMAIN = ("mock_domain", "two_mock_domain")
DEVICES = {**VARIANTS, "one_domain": 1, "two_domains": 2, "no_pasid": 2, "has_pasid": 1}


#: A user's table, at the first IOVA of the aperture.
TABLE = Table(TableFormat.X86, 4, APERTURE.start, 48, 48)


class Mock:
    """One IOMMU, an IOAS, and devices in groups of their own that are attached to it."""

    def __init__(self, world: World, devices: int, page_sizes: frozenset[int] = PAGE_SIZES) -> None:
        self.world = world
        self.context = Context()
        self.ioas = Ioas(self.context)
        self.page_sizes = page_sizes
        self.iommu = self.make_iommu()
        self.devices: list[Device] = []
        self.bound: list[Bound] = []
        self.hwpts: list[Hwpt] = []
        for _ in range(devices):
            bound = self.add()
            self.hwpts.append(bound.attach(self.ioas))
        #: Where cases map first.
        self.base = APERTURE.start if devices else 0

    def make_iommu(self, **changes: object) -> Iommu:
        return self.world.iommu(
            page_sizes=self.page_sizes,
            aperture=APERTURE,
            output_bits=51,
            pasid_bits=PASID_BITS,
            reserved=(),
            **changes,
        )

    def add(self, iommu: Iommu | None = None, max_pasids: int = 0) -> Bound:
        """Another device, bound to the context; without PASIDs unless `max_pasids` says how many."""
        device = self.world.add(iommu or self.iommu, slot=len(self.devices))
        device.endpoint.max_pasids = max_pasids
        self.devices.append(device)
        self.bound.append(Bound(self.context, device.endpoint))
        return self.bound[-1]

    def map(self, at: int, pages: int = 1, access: Access = RW) -> int:
        """Maps `pages` of the buffer, `at` pages after `base`."""
        return self.ioas.map(BUFFER, pages * PAGE, access, self.base + at * PAGE)

    def map_any(self, size: int, gpa: int = BUFFER) -> int:
        """Maps `size` bytes at an IOVA that is allocated."""
        return self.ioas.map(gpa, size)

    def unmap(self, at: int, pages: int = 1) -> int:
        return self.ioas.unmap(self.base + at * PAGE, pages * PAGE)

    def reserve(self, start: int, size: int) -> None:
        """IOMMU_TEST_OP_ADD_RESERVED."""
        self.ioas.reserve(Span.sized(start, size), self)

    def ranges(self) -> list[tuple[int, int]]:
        return [(span.start, span.last) for span in self.ioas.iova_ranges()]

    def reaches(self, iova: int, size: int, gpa: int = BUFFER) -> bool:
        """Whether DMA of each device gets to the memory (check_mock_iova), at the first and at the last page."""
        last = size - MOCK_PAGE
        return all(d.reads(iova) == gpa and d.reads(iova + last) == gpa + last for d in self.devices)


class Stacked(Mock):
    """A mock with HWPTs of each sort for its first device, which has PASIDs."""

    def __init__(self, world: World, devices: int) -> None:
        super().__init__(world, devices)
        self.device = self.bound[0]
        self.devices[0].endpoint.max_pasids = 1 << PASID_BITS
        self.fault = FaultObject(self.context)
        self.parent = self.device.hwpt_alloc(self.ioas, AllocFlags.NEST_PARENT)
        self.plain = self.device.hwpt_alloc(self.ioas)
        self.special = self.device.hwpt_alloc(self.ioas, AllocFlags.PASID)
        self.nested = [self.nest(AllocFlags.PASID) for _ in range(2)]
        self.waiting = self.nest(AllocFlags.PASID, self.fault)

    def nest(self, flags: AllocFlags = AllocFlags.NONE, fault: FaultObject | None = None, **changes: Any) -> Hwpt:
        """A HWPT of a user's table over `parent`, or with one of the arguments of hwpt_alloc changed."""
        arguments = {"parent": self.parent, **self.tables(), **changes}
        return self.device.hwpt_alloc(flags=flags, fault=fault, **arguments)

    def tables(self) -> dict[str, Any]:
        """A user's table for hwpt_alloc."""
        return {"table": TABLE, "memory": self.world.memory}

    def domain(self, pasid: int) -> object:
        """The domain of a PASID of the device (IOMMU_TEST_OP_PASID_CHECK_HWPT)."""
        return self.device.group.domain_of(pasid)


@dataclass(frozen=True)
class Row:
    """One check of a case: after `before`, `call` returns `expect`, or is refused with its errno.

    `case` is "fixture.name" of TEST_F; `variants` are those of the fixture in which it is checked.
    """

    case: str
    says: str
    call: Callable[[Any], object]
    expect: object
    before: Callable[[Any], object] = lambda mock: None
    variants: tuple[str, ...] = tuple(VARIANTS)


@dataclass(frozen=True)
class Difference(Row):
    """A check that has another answer here: `expect` here, `linux` in Linux."""

    linux: object = None
    why: str = ""


def answer(row: Row, mock: object) -> object:
    """What the call returns; the name of the errno if it is refused."""
    try:
        return row.call(mock)
    except IommuError as error:
        # Linux's name: Python's is ENOTSUP.
        return "EOPNOTSUPP" if error.errno == errno.EOPNOTSUPP else errno.errorcode[error.errno or 0]


def check(row: Row, mock: object) -> None:
    """The check of a row."""
    row.before(mock)
    assert answer(row, mock) == row.expect


def by_variant(rows: list[Row]) -> list[tuple[Row, str]]:
    """Each row with each of its variants, for parametrize."""
    return [(row, variant) for row in rows for variant in row.variants]


def name(value: object) -> str | None:
    """Names of rows in pytest's output."""
    return f"{value.case}: {value.says}" if isinstance(value, Row) else None
