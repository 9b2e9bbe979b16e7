"""Checks of an IOAS's calls, from the cases of iommufd_ioas and iommufd_mock_domain in Linux's iommufd selftest."""

from __future__ import annotations

import errno

from tests.linux.mock import (
    APERTURE,
    BUFFER,
    BUFFER_SIZE,
    LAST,
    MOCK_PAGE,
    PAGE,
    PASID_BITS,
    WITH_DOMAIN,
    Difference,
    Mock,
    Row,
)
from tests.spaces.world import RW
from vmodel.errors import Access, IommuError
from vmodel.iommu.iommufd import HwInfoType, Ioas
from vmodel.span import GiB, Span

NONE = ("no_domain",)
NO_ACCESS = Access(0)


def ten(mock: Mock) -> list[int]:
    """Ten mappings, one page each, side by side."""
    return [mock.map(n) for n in range(10)]


def four_of_eight(mock: Mock) -> None:
    """Four mappings of 8 pages, one each 16 pages, from the fifth page on."""
    for n in range(4):
        mock.map(4 + 16 * n, 8)


MAP = [
    Row(
        "iommufd_ioas.area",
        f"{pages} pages over a mapping of two",
        lambda mock, at=at, pages=pages: mock.map(at, pages),  # type: ignore[misc]
        "EEXIST",
        before=lambda mock: mock.map(16, 2),
    )
    for at, pages in ((16, 2), (16, 1), (17, 1), (15, 2), (15, 3))
] + [
    Row(
        "iommufd_ioas.ioas_iova_alloc",
        "a size that is not made of whole pages of the IOMMU",
        lambda mock: mock.map_any(MOCK_PAGE + 1),
        "EINVAL",
        variants=WITH_DOMAIN,
    ),
    Row(
        "iommufd_ioas.ioas_iova_alloc",
        "each size, of any number of bytes, without an IOMMU",
        lambda mock: [mock.ioas.unmap(mock.map_any(size), size) for size in range(1, 2 * PAGE)],
        list(range(1, 2 * PAGE)),
        variants=NONE,
    ),
    Row(
        "iommufd_ioas.ioas_iova_alloc",
        "a page of the IOMMU, half of one of the CPU",
        lambda mock: mock.ioas.unmap(mock.map_any(MOCK_PAGE), MOCK_PAGE),
        MOCK_PAGE,
    ),
    Row(
        "iommufd_ioas.ioas_iova_alloc",
        "three pages of the IOMMU",
        lambda mock: mock.ioas.unmap(mock.map_any(3 * MOCK_PAGE), 3 * MOCK_PAGE),
        3 * MOCK_PAGE,
    ),
    # PAGE_SIZE 4096: the hole after the reserved region has room, but none that is aligned to 32 KiB.
    Row(
        "iommufd_ioas.reserved_overflow",
        "the aligned IOVA would be 2**64",
        lambda mock: mock.map_any(0x5000),
        "ENOSPC",
        before=lambda mock: mock.reserve(6, 0xFFFF_FFFF_FFFF_8001),
    ),
    # drivers/iommu/iommufd/io_pagetable.c:147: no more alignment than a huge page of the CPU.
    Row(
        "iommufd_ioas.area_auto_iova",
        "1 GiB is aligned to 2 MiB only",
        lambda mock: mock.map_any(GiB, 0),
        BUFFER,
        before=lambda mock: mock.map_any(MOCK_PAGE),
        variants=NONE,
    ),
]

UNMAP = [
    Row("iommufd_ioas.area", f"nothing is mapped at page {at}", lambda mock, at=at: mock.unmap(at), "ENOENT")  # type: ignore[misc]
    for at in (0, 1, 9)
] + [
    Row(
        "iommufd_ioas.area",
        "each of ten mappings",
        lambda mock: [mock.unmap(n) for n in range(10)],
        [PAGE] * 10,
        before=ten,
    ),
    Row(
        "iommufd_ioas.area",
        "its first half",
        lambda mock: mock.unmap(16),
        "ENOENT",
        before=lambda mock: mock.map(16, 2),
    ),
    Row(
        "iommufd_ioas.area",
        "its second half",
        lambda mock: mock.unmap(17),
        "ENOENT",
        before=lambda mock: mock.map(16, 2),
    ),
    Row("iommufd_ioas.area", "all", lambda mock: mock.ioas.unmap(0, LAST), 10 * PAGE, before=ten),
    Row("iommufd_ioas.area", "all of an empty one", lambda mock: mock.ioas.unmap(0, LAST), 0),
    Row(
        "iommufd_ioas.unmap_fully_contained_areas",
        "the first is cut",
        lambda mock: mock.unmap(0, 8),
        "ENOENT",
        before=four_of_eight,
    ),
    Row(
        "iommufd_ioas.unmap_fully_contained_areas",
        "the last is cut",
        lambda mock: mock.unmap(4 + 3 * 16 + 8 - 4, 8),
        "ENOENT",
        before=four_of_eight,
    ),
    Row(
        "iommufd_ioas.unmap_fully_contained_areas",
        "all four, with the holes around them",
        lambda mock: mock.unmap(0, 3 * 16 + 8 + 4),
        32 * PAGE,
        before=four_of_eight,
    ),
]


def copied(mock: Mock, target: Ioas, iova: int) -> tuple[int, bool]:
    """Copies the page at `base`; where it is, and whether it is the same memory."""
    at = target.copy(mock.ioas, mock.base, PAGE, iova=iova)
    [page] = [mapping for mapping in target.mappings() if mapping.span.start == at]
    return at - mock.base, page.gpa == BUFFER


def sweep(mock: Mock, last: int) -> list[int]:
    """Copies a page of the IOMMU to another IOAS, from each 511th byte around a mapping that ends at `last`.

    Returns the offsets from which it went.
    """
    other, found = Ioas(mock.context), []
    for source in range(APERTURE.start - PAGE, last + 1, 511):
        try:
            at = other.copy(mock.ioas, source, MOCK_PAGE, iova=APERTURE.start)
        except IommuError as error:
            assert error.errno == errno.ENOENT
            continue
        [page] = other.mappings()
        assert page.gpa == BUFFER + source - APERTURE.start
        assert other.unmap(at, MOCK_PAGE) == MOCK_PAGE
        found.append(source - APERTURE.start)
    return found


def nothing(mock: Mock) -> None:
    """Before a call that needs nothing."""


def copy(mock: Mock, access: Access = RW, iova: int | None = None, source: int | None = None) -> int:
    """Copies a page inside of the IOAS, from `base` by default."""
    return mock.ioas.copy(mock.ioas, mock.base if source is None else source, PAGE, access, iova)


def read_only_copy(mock: Mock) -> None:
    """A writable page, and a read-only copy of it after it."""
    mock.map(0)
    copy(mock, Access.READ, mock.base + PAGE)


COPY = [
    Row(
        "iommufd_ioas.copy_area",
        "inside of an IOAS",
        lambda mock: copied(mock, mock.ioas, mock.base + PAGE),
        (PAGE, True),
        before=lambda mock: mock.map(0),
    ),
    Row(
        "iommufd_ioas.copy_area",
        "to another IOAS, at 0",
        lambda mock: copied(mock, Ioas(mock.context), 0)[1],
        True,
        before=lambda mock: mock.map(0),
    ),
]
COPY += [
    Row(
        "iommufd_ioas.copy_sweep",
        f"from offsets in a mapping of {size:#x}",
        lambda mock, size=size: sweep(mock, APERTURE.start + size - 1),  # type: ignore[misc]
        [offset for offset in range(-PAGE, size, 511) if 0 <= offset <= size - MOCK_PAGE],
        before=lambda mock, size=size: mock.ioas.map(BUFFER, size, iova=APERTURE.start),  # type: ignore[misc]
        variants=variants,
    )
    for size, variants in ((BUFFER_SIZE, WITH_DOMAIN), (BUFFER_SIZE - 1, NONE))
]

APERTURE_ONLY = [(APERTURE.start, APERTURE.last)]
RANGES = [
    Row("iommufd_ioas.iova_ranges", "all", Mock.ranges, [(0, LAST)], variants=NONE),
    Row("iommufd_ioas.iova_ranges", "the aperture", Mock.ranges, APERTURE_ONLY, variants=WITH_DOMAIN),
    Row("iommufd_ioas.iova_ranges", "its alignment", lambda mock: mock.ioas.alignment, MOCK_PAGE, variants=WITH_DOMAIN),
    Row("iommufd_ioas.iova_ranges", "alignment without an IOMMU", lambda mock: mock.ioas.alignment, 1, variants=NONE),
    Row(
        "iommufd_ioas.iova_ranges",
        "two, around what is reserved",
        Mock.ranges,
        [(0, PAGE - 1), (2 * PAGE, LAST)],
        before=lambda mock: mock.reserve(PAGE, PAGE),
        variants=NONE,
    ),
    Row(
        "iommufd_ioas.iova_ranges",
        "the aperture, what is reserved is outside",
        Mock.ranges,
        APERTURE_ONLY,
        before=lambda mock: mock.reserve(PAGE, PAGE),
        variants=WITH_DOMAIN,
    ),
]


def allow(mock: Mock, *spans: Span) -> None:
    mock.ioas.allow_iovas(spans)


def wide(mock: Mock) -> Span:
    return Span(mock.base, mock.base + 600 * PAGE)


ALLOW = [
    Row(
        "iommufd_ioas.area_auto_iova",
        "over a reserved region, or outside of the aperture",
        lambda mock: allow(mock, Span(PAGE, 600 * PAGE)),
        "EADDRINUSE",
        before=lambda mock: mock.reserve(4 * PAGE, 100 * PAGE),
    ),
    Row("iommufd_ioas.area_allowed", "what may be mapped", lambda mock: allow(mock, wide(mock)), None),
    Row("iommufd_ioas.area_allowed", "none: anywhere", allow, None, before=lambda mock: allow(mock, wide(mock))),
    Row(
        "iommufd_ioas.area_allowed",
        "over a reserved region",
        lambda mock: allow(mock, wide(mock)),
        "EADDRINUSE",
        before=lambda mock: mock.reserve(mock.base + PAGE, PAGE),
    ),
]

RESERVE = [
    Row(
        "iommufd_ioas.area_allowed",
        "in an allowed range",
        lambda mock: mock.reserve(mock.base + PAGE, PAGE),
        "EADDRINUSE",
        before=lambda mock: allow(mock, wide(mock)),
    ),
    Row(
        "iommufd_ioas.area_allowed",
        "what was allowed once",
        lambda mock: mock.reserve(mock.base + PAGE, PAGE),
        None,
        before=lambda mock: (allow(mock, wide(mock)), allow(mock)),
    ),
]

DESTROY = [
    Row("iommufd_ioas.ioas_destroy", "free", lambda mock: mock.ioas.destroy(), None, variants=NONE),
    Row("iommufd_ioas.ioas_destroy", "in use", lambda mock: mock.ioas.destroy(), "EBUSY", variants=WITH_DOMAIN),
    Row(
        "iommufd_ioas.ioas_area_destroy",
        "with a mapping",
        lambda mock: mock.ioas.destroy(),
        None,
        before=lambda mock: mock.map(0),
        variants=NONE,
    ),
    Row(
        "iommufd_ioas.ioas_area_destroy",
        "with a mapping, in use",
        lambda mock: mock.ioas.destroy(),
        "EBUSY",
        before=lambda mock: mock.map(0),
        variants=WITH_DOMAIN,
    ),
    Row("iommufd.cmd_fail", "no such object", lambda mock: mock.context.destroy(0), "ENOENT", variants=NONE),
    Row("iommufd.cmd_ex_fail", "no such object", lambda mock: mock.context.destroy(0), "ENOENT", variants=NONE),
]

CLOSE = [
    Row("iommufd.simple_close", "nothing in it", lambda mock: None, None, variants=NONE),
    Row("iommufd_ioas.ioas_auto_destroy", "an IOAS, and its devices", lambda mock: None, None),
    Row("iommufd_ioas.ioas_area_auto_destroy", "ten mappings", lambda mock: len(ten(mock)), 10),
]

ATTACH = [
    Row(
        "iommufd_ioas.hwpt_attach",
        "another device to the HWPT of the first",
        lambda mock: mock.add().attach(mock.hwpts[0]) is mock.hwpts[0],
        True,
        variants=WITH_DOMAIN,
    ),
    Row("iommufd_ioas.hwpt_attach", "no such HWPT", lambda mock: mock.context[0], "ENOENT", variants=NONE),
]

INFO = [
    Row(
        "iommufd_ioas.get_hw_info",
        "a device without PASIDs",
        lambda mock: mock.bound[0].get_info().pasid_bits,
        0,
        variants=WITH_DOMAIN,
    ),
    Row(
        "iommufd_ioas.get_hw_info",
        "a device with PASIDs",
        lambda mock: mock.add(max_pasids=1 << PASID_BITS).get_info().pasid_bits,
        PASID_BITS,
        variants=WITH_DOMAIN,
    ),
    # drivers/iommu/iommufd/device.c:1722: the logarithm of the device's own number, rounded down.
    Row(
        "iommufd_ioas.get_hw_info",
        "a device with fewer PASIDs than the IOMMU",
        lambda mock: mock.add(max_pasids=100).get_info().pasid_bits,
        6,
        variants=WITH_DOMAIN,
    ),
    Row(
        "iommufd_ioas.get_hw_info",
        "a type that it has not",
        lambda mock: mock.bound[0].get_info(0xFEEDBEEF),
        "EOPNOTSUPP",
        variants=WITH_DOMAIN,
    ),
    Row(
        "iommufd_ioas.get_hw_info",
        "its own type",
        lambda mock: len(mock.bound[0].get_info(HwInfoType.INTEL_VTD).data),
        24,
        variants=WITH_DOMAIN,
    ),
]

DIFFERENCES: list[Row] = [
    Difference(
        "iommufd_mock_domain.basic",
        "an address without memory behind it",
        lambda mock: mock.map_any(PAGE, GiB) and mock.devices[0].reads(APERTURE.start),
        None,
        variants=WITH_DOMAIN,
        linux="EFAULT",
        why="a GPA need not be memory: it may be the BAR of a device, or be plugged later; DMA to it faults",
    ),
]

#: Checks that the selftest does not have: `case` is the line of Linux that they are from.
LINES = [
    Row("drivers/iommu/iommufd/" + line, says, call, expect, before=before, variants=("mock_domain",))
    for line, says, before, call, expect in (
        ("ioas.c:257", "map of 2**64 - 1 bytes", nothing, lambda mock: mock.ioas.map(0, LAST, NO_ACCESS), "EOVERFLOW"),
        (
            "ioas.c:257",
            "map at the last IOVA",
            nothing,
            lambda mock: mock.ioas.map(0, 1, NO_ACCESS, LAST),
            "EOVERFLOW",
        ),
        (
            "ioas.c:261",
            "map without access",
            nothing,
            lambda mock: mock.ioas.map(1, 0, NO_ACCESS),
            "EINVAL",
        ),
        ("ioas.c:301", "copy to the last IOVA", nothing, lambda mock: copy(mock, iova=LAST), "EOVERFLOW"),
        (
            "ioas.c:305",
            "copy without access, of nothing",
            nothing,
            lambda mock: copy(mock, NO_ACCESS),
            "EINVAL",
        ),
        ("ioas.c:356", "unmap of the last byte", nothing, lambda mock: mock.ioas.unmap(LAST, 1), "EOVERFLOW"),
        ("ioas.c:356", "unmap of no bytes", nothing, lambda mock: mock.ioas.unmap(LAST, 0), "EOVERFLOW"),
        (
            "io_pagetable.c:216",
            "copy, writable, over a mapping: what is read-only comes last",
            lambda mock: mock.map(0, access=Access.READ),
            lambda mock: copy(mock, iova=mock.base),
            "EEXIST",
        ),
        (
            "io_pagetable.c:216",
            "copy, writable, of what was mapped read-only",
            lambda mock: mock.map(0, access=Access.READ),
            copy,
            "EPERM",
        ),
        (
            "io_pagetable.c:216",
            "copy, writable, of a read-only copy of what is writable",
            read_only_copy,
            lambda mock: copy(mock, iova=mock.base + 2 * PAGE, source=mock.base + PAGE) - mock.base,
            2 * PAGE,
        ),
        (
            "io_pagetable.c:221",
            "memory that is not aligned, over a mapping: alignment comes last",
            lambda mock: mock.map(0),
            lambda mock: mock.ioas.map(BUFFER + 1, PAGE, iova=mock.base),
            "EEXIST",
        ),
        (
            "io_pagetable.c:153",
            "memory that is not aligned, at an IOVA that is allocated",
            nothing,
            lambda mock: mock.map_any(PAGE, BUFFER + 1),
            "EINVAL",
        ),
    )
]

ROWS = [*MAP, *UNMAP, *COPY, *RANGES, *ALLOW, *RESERVE, *DESTROY, *CLOSE, *ATTACH, *INFO]
#: Cases of functions of test_ioas.py, in which each step counts on those before it.
WHOLE = ["iommufd_ioas.area_auto_iova", "iommufd_mock_domain.all_aligns", "iommufd_mock_domain.all_aligns_copy"]
