"""Domains of windows: Linux 3.14 to 5.12, drivers/iommu/fsl_pamu_domain.c; each test names its function."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from tests.iommu.world import RAM, World, group_of, iommu
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, IommuError
from vmodel.iommu import Coverage, Endpoint, Group
from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.drivers.pamu import StashCache
from vmodel.iommu.drivers.pamu_domain import PamuDomain, PamuWindow, pamu_domain_alloc
from vmodel.span import GiB, KiB, MiB, Span

RW = Access.READ | Access.WRITE
#: 64 windows of 1 MiB.
GEOMETRY, COUNT, SIZE = Span.sized(64 * MiB, 64 * MiB), 64, MiB
HERE = GEOMETRY.start


class Setup:
    """A device that is attached to a domain of windows, of which none is enabled."""

    def __init__(self) -> None:
        stash = {"l3": 3, "l1.0": 16, "l2.1": 33}
        one = iommu("pamu", params={"liodns": {"dma0": 1, "dma1": 2}, "stash": stash}, max_memory=64 * KiB)
        one.covers.append(Coverage.platform("dma0", "dma1"))
        self.world = World(one)
        self.endpoint = self.world.plug(PlatformDevice("dma0"))
        self.dma: Dma = self.world.dmas["dma0"]
        self.domain = pamu_domain_alloc(self.endpoint)
        self.group.attach(self.domain)

    @property
    def group(self) -> Group:
        return group_of(self.endpoint)

    def windows(self, count: int = COUNT) -> PamuDomain:
        self.domain.set_geometry(GEOMETRY)
        self.domain.set_windows(count)
        return self.domain

    def reads(self, iova: int) -> int | None:
        """The GPA that a read at an IOVA gets to; None: it faults."""
        for gpa in range(0, RAM, 64 * KiB):
            self.world.put(gpa, gpa)
        try:
            return int.from_bytes(self.dma.read(iova, 8), "little")
        except DmaFault:
            return None


@pytest.fixture
def made() -> Iterator[Setup]:
    setup = Setup()
    yield setup
    setup.world.close()


def refused(code: int, call: Callable[..., object], *args: object, **more: object) -> None:
    with pytest.raises(IommuError) as caught:
        call(*args, **more)
    assert caught.value.errno == code, caught.value


def test_windows(made: Setup) -> None:
    domain = made.windows()
    domain.enable_window(0, 0x10_0000, SIZE)
    domain.enable_window(3, 0x40_0000, 64 * KiB, Access.READ)
    assert made.reads(HERE) is None  # the domain is not enabled yet
    domain.set_enabled(True)
    assert (made.reads(HERE), made.reads(HERE + SIZE - 64 * KiB)) == (0x10_0000, 0x1F_0000)
    assert made.reads(HERE + SIZE) is None
    assert (made.reads(HERE + 3 * SIZE), made.reads(HERE + 3 * SIZE + 64 * KiB)) == (0x40_0000, None)
    with pytest.raises(DmaFault):
        made.dma.write(HERE + 3 * SIZE, b"x")
    domain.enable_window(4, 0x20_0000, SIZE, Access(0))  # of several windows each can be enabled at any time
    assert made.reads(HERE + 4 * SIZE) is None
    assert domain.windows[3:6] == (
        PamuWindow(0x40_0000, 64 * KiB, Access.READ),
        PamuWindow(0x20_0000, SIZE, Access(0)),
        None,
    )
    domain.disable_window(0)
    assert (made.reads(HERE), made.reads(HERE + 3 * SIZE)) == (None, 0x40_0000)
    domain.disable_window(0)
    domain.set_enabled(False)
    assert made.reads(HERE + 3 * SIZE) is None
    domain.set_enabled(True)
    assert made.reads(HERE + 3 * SIZE) == 0x40_0000
    assert domain.iova_to_phys(HERE + 3 * SIZE + 5) == 0x40_0005


def test_one_window(made: Setup) -> None:
    """fsl_pamu_window_enable and disable_domain_win, win_cnt == 1: it is the domain's own entry."""
    domain = made.windows(1)
    domain.enable_window(0, 0, 4 * MiB)
    domain.set_enabled(True)
    domain.set_enabled(True)
    assert (made.reads(HERE + 0x10_0000), made.reads(HERE + 4 * MiB)) == (0x10_0000, None)
    refused(errno.EBUSY, domain.enable_window, 0, 0, 4 * MiB)
    domain.disable_window(0)
    assert not domain.enabled and made.reads(HERE) is None
    domain.enable_window(0, 2 * MiB, 2 * MiB)
    assert made.reads(HERE) is None
    domain.set_enabled(True)
    assert made.reads(HERE) == 2 * MiB


@pytest.mark.parametrize(
    ("span", "force", "code"),
    [
        (Span.sized(0, 12 * MiB), True, errno.EINVAL),  # check_size: a power of two
        (Span.sized(0, 2 * KiB), True, errno.EINVAL),  # check_size: PAMU_PAGE_SIZE
        (Span.sized(4 * MiB, 8 * MiB), True, errno.EINVAL),  # check_size: aligned
        (GEOMETRY, False, errno.EINVAL),  # configure_domain_geometry: force_aperture
        (Span.sized(64 * GiB, 64 * GiB), True, errno.EINVAL),  # beyond 36 bits
        (Span.sized(0, 64 * GiB), True, 0),
    ],
)
def test_geometry(made: Setup, span: Span, force: bool, code: int) -> None:
    assert made.domain.aperture == Span(0, (1 << 36) - 1)  # fsl_pamu_domain_alloc
    if code:
        refused(code, made.domain.set_geometry, span, force_aperture=force)
        refused(errno.EINVAL, made.domain.set_windows, 1)  # fsl_pamu_set_windows: geometry first
    else:
        made.domain.set_geometry(span, force_aperture=force)
        made.domain.set_windows(1)
    assert made.domain.aperture == (Span(0, (1 << 36) - 1) if code else span)


@pytest.mark.parametrize(("count", "code"), [(0, 22), (-2, 22), (3, 22), (512, 22), (256, 0), (1, 0)])
def test_number_of_windows(made: Setup, count: int, code: int) -> None:
    """fsl_pamu_set_windows."""
    made.domain.set_geometry(GEOMETRY)
    if code:
        refused(code, made.domain.set_windows, count)
    else:
        made.domain.set_windows(count)
    assert len(made.domain.windows) == (0 if code else count)


def test_windows_of_less_than_a_page(made: Setup) -> None:
    """pamu_config_spaace: PAMU_PAGE_SIZE."""
    made.domain.set_geometry(Span.sized(0, 64 * KiB))
    refused(errno.EINVAL, made.domain.set_windows, 32)
    made.domain.set_windows(16)


@pytest.mark.parametrize(
    ("number", "gpa", "size", "code"),
    [
        (COUNT, 0, SIZE, errno.EINVAL),  # "Invalid window index"
        (-1, 0, SIZE, errno.EINVAL),
        (1, 0, 2 * SIZE, errno.EINVAL),  # "Invalid window size"
        (1, 0, 3 * 64 * KiB, errno.EINVAL),  # pamu_config_spaace: a power of two
        (1, 0, 0, errno.EINVAL),
        (1, 0, -4096, errno.EINVAL),
        (1, 0x800, SIZE, errno.EINVAL),
        (1, -SIZE, SIZE, errno.EINVAL),
        (1, 1 << 36, SIZE, errno.ERANGE),
        (2, 0, SIZE, errno.EBUSY),  # "Disable the window before updating the mapping"
    ],
)
@pytest.mark.parametrize("enabled", [False, True])
def test_window_enable_refused(made: Setup, enabled: bool, number: int, gpa: int, size: int, code: int) -> None:
    """fsl_pamu_window_enable; nothing changes."""
    domain = made.windows()
    domain.enable_window(2, 0x20_0000, SIZE)
    domain.set_enabled(enabled)
    before = domain.windows, list(domain.mappings())
    refused(code, domain.enable_window, number, gpa, size)
    assert (domain.windows, list(domain.mappings())) == before


def test_order_of_calls(made: Setup) -> None:
    domain = made.domain
    refused(errno.ENODEV, domain.enable_window, 0, 0, SIZE)  # "Number of windows not configured"
    refused(errno.ENODEV, domain.set_enabled, True)  # configure_domain_dma_state: no valid mapping
    refused(errno.EINVAL, domain.disable_window, 0)
    made.windows()
    refused(errno.ENODEV, domain.set_enabled, True)
    domain.enable_window(0, 0, SIZE)
    domain.set_enabled(True)
    refused(errno.EBUSY, domain.set_geometry, GEOMETRY)  # "Can't set geometry attributes as domain is active"
    refused(errno.EBUSY, domain.set_windows, 1)
    assert made.reads(HERE) == 0
    domain.set_enabled(False)
    domain.set_windows(1)
    assert domain.windows == (None,)
    domain.enable_window(0, 0, SIZE)
    domain.set_geometry(Span.sized(0, MiB))
    assert domain.windows == ()
    domain.set_enabled(False)


def test_stash(made: Setup) -> None:
    """get_stash_id: the cache must have a cache-stash-id; update_liodn_stash: with devices, windows must be there."""
    domain, stash = made.domain, made.domain.set_stash
    refused(errno.EINVAL, stash, StashCache.L3)  # a device is attached, and there are no windows
    made.windows()
    stash(StashCache.L3, 99)
    assert domain.stash == 3
    stash(StashCache.L1, 0)
    assert domain.stash == 16
    stash(StashCache.L2, 1)
    for cache, cpu in ((StashCache.L1, 1), (StashCache.L2, 0), (StashCache.L2, -1)):
        refused(errno.EINVAL, stash, cache, cpu)
    assert domain.stash == 33
    free = pamu_domain_alloc(made.endpoint)
    free.set_stash(StashCache.L3)
    assert (free.stash, free.users) == (3, 0)


def test_maps(made: Setup) -> None:
    """iommu_map and iommu_unmap: the driver has neither."""
    domain = made.windows()
    refused(errno.ENODEV, domain.map, HERE, 0, SIZE)
    assert domain.unmap(HERE, SIZE) == 0
    domain.enable_window(0, 0, SIZE)
    domain.set_enabled(True)
    assert domain.unmap(HERE, SIZE) == 0
    assert made.reads(HERE) == 0


def test_no_memory_to_enable(made: Setup) -> None:
    """All windows are there, or none."""
    whole = made.domain
    whole.set_geometry(Span.sized(0, 64 * GiB))
    domains = []
    with pytest.raises(IommuError) as caught:
        for _ in range(64):
            whole = pamu_domain_alloc(made.endpoint)
            whole.set_geometry(Span.sized(0, 64 * GiB))
            whole.set_windows(256)
            for n in range(256):
                whole.enable_window(n, 0, 4 * KiB)
            whole.set_enabled(True)
            domains.append(whole)
    assert caught.value.errno == errno.ENOMEM
    assert not whole.enabled and list(whole.mappings()) == []
    assert all(domain.enabled for domain in domains)


def test_two_devices_and_detach(made: Setup) -> None:
    other = made.world.plug(PlatformDevice("dma1"))
    domain = made.windows()
    domain.enable_window(0, 0, SIZE)
    domain.set_enabled(True)
    group_of(other).attach(domain)
    assert made.world.dmas["dma1"].read(HERE, 1) == made.dma.read(HERE, 1)
    group_of(other).detach()
    assert made.reads(HERE) == 0


def test_for_pamus_only(world: World) -> None:
    endpoint: Endpoint = world.device("00:03.0")[0]
    refused(errno.EOPNOTSUPP, pamu_domain_alloc, endpoint)
    alone = world.plug(PlatformDevice("uart"))
    refused(errno.ENODEV, pamu_domain_alloc, alone)
