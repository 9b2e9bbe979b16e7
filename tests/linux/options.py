"""Checks of IOMMU_OPTION, and of files and dma-bufs that are mapped, from the cases of Linux's iommufd selftest."""

from __future__ import annotations

from collections.abc import Callable

from tests.linux.mock import APERTURE, BUFFER, LAST, PAGE, VARIANTS, WITH_DOMAIN, Mock, Row
from vmodel.iommu.iommufd import Context, DmaBuf, KernelAccess, MemoryFile, Option, Process, VfioCompat
from vmodel.iommu.iommufd.vfio_compat import Extension
from vmodel.span import PAGE as SMALLEST

RLIMIT, HUGE = Option.RLIMIT_MODE, Option.HUGE_PAGES
NONE = ("no_domain",)
SIZE = 4 * PAGE


class Opened(Mock):
    """A context without objects beside the mock, a dma-buf and a file."""

    def __init__(self, world: object, devices: int) -> None:
        super().__init__(world, devices)  # type: ignore[arg-type]
        self.empty = Context()
        self.plain = Context(process=Process())
        self.dmabuf, self.file = DmaBuf(BUFFER, SIZE), MemoryFile(BUFFER, SIZE)

    def get(self) -> int:
        return self.context.get_option(HUGE, self.ioas.id)

    def set(self, value: int) -> int:
        """Sets HUGE_PAGES; what it is then."""
        self.context.set_option(HUGE, value, self.ioas.id)
        return self.get()


def set_mode(context: Context, value: int) -> int:
    context.set_option(RLIMIT, value)
    return context.get_option(RLIMIT)


def nothing(mock: Opened) -> None:
    """Before a call that needs nothing."""


def half_page(mock: Opened) -> int:
    """A page in the middle of two: a CPU's page has 4 KiB here, as the mock's without an IOMMU need not be doubled."""
    return mock.ioas.map(BUFFER + SMALLEST // 2, SMALLEST, iova=APERTURE.start + SMALLEST)


def after_off(mock: Opened) -> int:
    mock.set(0)
    return half_page(mock)


def off_and_on(mock: Opened) -> int:
    mock.set(0)
    mock.set(1)
    return half_page(mock) - APERTURE.start


def device_access(mock: Opened, pin: bool) -> object:
    """A kernel access to a dma-buf."""
    access = KernelAccess(mock.context, mock.world.memory, lambda iova, size: None)
    access.attach(mock.ioas)
    iova = mock.ioas.map_file(mock.dmabuf, 0, PAGE)
    return access.pin_pages(iova, PAGE) if pin else access.read(iova, 1)


def compat(version: Extension) -> Callable[[Opened], int]:
    """The option of the IOAS of a VFIO version."""

    def huge_pages(mock: Opened) -> int:
        vfio = VfioCompat(mock.context)
        vfio.set_ioas(mock.ioas.id)
        vfio.set_iommu(version)
        return mock.get()

    return huge_pages


OF_COMPAT = "vfio_compat_mock_domain.option_huge_pages"
ROWS = [
    Row(f"{case}", says, call, expect, before=before, variants=variants)
    for case, says, before, call, expect, variants in (
        ("iommufd.global_options", "at first", nothing, lambda m: m.empty.get_option(RLIMIT), 0, NONE),
        ("iommufd.global_options", "on", nothing, lambda m: set_mode(m.empty, 1), 1, NONE),
        ("iommufd.global_options", "neither", nothing, lambda m: set_mode(m.empty, 2), "EINVAL", NONE),
        (
            "iommufd.global_options",
            "off again",
            lambda m: set_mode(m.empty, 1),
            lambda m: set_mode(m.empty, 0),
            0,
            NONE,
        ),
        ("iommufd.global_options", "huge pages of 0", nothing, lambda m: m.empty.get_option(HUGE), "ENOENT", NONE),
        ("iommufd.global_options", "set them", nothing, lambda m: m.empty.set_option(HUGE, 1), "ENOENT", NONE),
        (OF_COMPAT, "version 2", nothing, compat(Extension.TYPE1V2), 1, WITH_DOMAIN),
        (OF_COMPAT, "version 1", nothing, compat(Extension.TYPE1), 0, WITH_DOMAIN),
        ("iommufd_ioas.ioas_option_huge_pages", "at first", nothing, Opened.get, 1, tuple(VARIANTS)),
        ("iommufd_ioas.ioas_option_huge_pages", "off", nothing, lambda m: m.set(0), 0, tuple(VARIANTS)),
        ("iommufd_ioas.ioas_option_huge_pages", "neither", nothing, lambda m: m.set(2), "EINVAL", tuple(VARIANTS)),
        (
            "iommufd_ioas.ioas_option_huge_pages",
            "on again",
            lambda m: m.set(0),
            lambda m: m.set(1),
            1,
            tuple(VARIANTS),
        ),
        (
            "iommufd_ioas.ioas_align_change",
            "whole pages",
            lambda m: m.ioas.map(BUFFER, PAGE, iova=APERTURE.start),
            lambda m: m.set(0),
            0,
            NONE,
        ),
        ("iommufd_ioas.ioas_align_change", "half a page after that", nothing, after_off, "EINVAL", NONE),
        ("iommufd_ioas.ioas_align_change", "off and on", nothing, off_and_on, SMALLEST, NONE),
        ("iommufd_ioas.ioas_align_change", "half a page before", half_page, lambda m: m.set(0), "EADDRINUSE", NONE),
        (
            "iommufd_ioas.dmabuf_simple",
            "no bytes",
            nothing,
            lambda m: m.ioas.map_file(m.dmabuf, 0, 0),
            "EINVAL",
            tuple(VARIANTS),
        ),
        (
            "iommufd_ioas.dmabuf_simple",
            "after its end",
            nothing,
            lambda m: m.ioas.map_file(m.dmabuf, SIZE, SIZE),
            "EINVAL",
            tuple(VARIANTS),
        ),
        (
            "iommufd_ioas.dmabuf_simple",
            "a byte too many",
            nothing,
            lambda m: m.ioas.map_file(m.dmabuf, 0, SIZE + 1),
            "EINVAL",
            tuple(VARIANTS),
        ),
        (
            "iommufd_ioas.dmabuf_simple",
            "all of it",
            nothing,
            lambda m: m.ioas.unmap(m.ioas.map_file(m.dmabuf, 0, SIZE), SIZE),
            SIZE,
            tuple(VARIANTS),
        ),
    )
]
#: Checks that the selftest does not have: `case` is the line of Linux that they are from.
LINES = [
    Row("drivers/iommu/iommufd/" + line, says, call, expect, before=before, variants=variants)
    for line, says, before, call, expect, variants in (
        ("ioas.c:633", "the mode of an object", nothing, lambda m: m.empty.get_option(RLIMIT, 1), "EOPNOTSUPP", NONE),
        ("ioas.c:643", "an ordinary process", nothing, lambda m: set_mode(m.plain, 2), "EPERM", NONE),
        ("ioas.c:647", "with an object", nothing, lambda m: set_mode(m.context, 2), "EBUSY", NONE),
        ("main.c:425", "an unknown option", nothing, lambda m: m.empty.get_option(7), "EOPNOTSUPP", NONE),
        (
            "io_pagetable.c:1531",
            "off, with a mapping and an IOMMU",
            lambda m: m.map(0),
            lambda m: m.set(0),
            "EINVAL",
            WITH_DOMAIN,
        ),
        (
            "io_pagetable.c:1526",
            "off, when it is",
            lambda m: [m.set(0), m.map(0)],
            lambda m: m.set(0),
            0,
            tuple(VARIANTS),
        ),
        ("io_pagetable.c:493", "a file: none of it", nothing, lambda m: m.ioas.map_file(m.file, 0, 0), "EINVAL", NONE),
        (
            "io_pagetable.c:495",
            "a file, past the end",
            nothing,
            lambda m: m.ioas.map_file(m.file, LAST - 1, PAGE),
            "EOVERFLOW",
            NONE,
        ),
        (
            "pages.c:929",
            "more than a file has, with an IOMMU",
            nothing,
            lambda m: m.ioas.map_file(m.file, 0, SIZE + PAGE),
            "EINVAL",
            WITH_DOMAIN,
        ),
        (
            "pages.c:929",
            "more than a file has",
            nothing,
            lambda m: m.ioas.unmap(m.ioas.map_file(m.file, 0, SIZE + PAGE), SIZE + PAGE),
            SIZE + PAGE,
            NONE,
        ),
        ("pages.c:2460", "pin of a dma-buf", nothing, lambda m: device_access(m, True), "EINVAL", tuple(VARIANTS)),
        ("pages.c:2371", "read of a dma-buf", nothing, lambda m: device_access(m, False), "EINVAL", tuple(VARIANTS)),
    )
]
DIFFERENCES: list[Row] = []
#: Cases of functions of test_options.py.
WHOLE = [
    "change_process.basic",
    "iommufd_ioas.fork_gone",
    "iommufd_ioas.fork_present",
    "iommufd_ioas.dmabuf_revoke",
]
