"""`Container` (VFIO type1v2): groups behind several kinds of IOMMUs and one map, by what their DMA reaches."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.spaces.world import RW, Device, World, refused
from vmodel.errors import Access
from vmodel.iommu import paging_domain_alloc
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.container import DMA_LIMIT, Container
from vmodel.iommu.domain import DomainType, Mapping
from vmodel.iommu.group import can_attach
from vmodel.span import PAGE, GiB, KiB, MiB, Span

IOVA = 16 * MiB
R, W = Access.READ, Access.WRITE


def state(container: Container) -> object:
    """All that a call that fails must leave as it was."""
    return (
        container.groups,
        container.domains,
        container.mappings(),
        [list(domain.mappings()) for domain in container.domains],
        container.iova_ranges,
        container.page_sizes,
        container.dma_avail,
    )


def of(*devices: Device) -> Container:
    """A container with the devices' groups."""
    container = Container()
    for device in devices:
        container.add_group(device.group)
    return container


# ---- groups ----------------------------------------------------------------------------------------


def test_three_kinds_see_one_map(world: World) -> None:
    devices = [world.add(world.iommu(kind)) for kind in ("vt-d", "pamu", "smmu-v3")]
    container = of(*devices)
    assert len(container.domains) == 3 and container.groups == [device.group for device in devices]
    container.map(IOVA, PAGE, 2 * PAGE)
    container.map(IOVA + MiB, 0, PAGE, R)
    for device in devices:
        assert device.reads(IOVA + PAGE) == 2 * PAGE and device.writes(IOVA) == PAGE
        assert device.reads(IOVA + MiB) == 0 and device.writes(IOVA + MiB) is None
        assert device.reads(PAGE) is None, "not identity"
    assert container.unmap(IOVA, 2 * PAGE) == 2 * PAGE
    for device in devices:
        assert device.reads(IOVA) is None and device.reads(IOVA + MiB) == 0


def test_platform_devices_beside_pci(world: World) -> None:
    smmu = world.iommu("smmu-v3")
    pci, platform = world.add(smmu), world.platform(smmu, 1)
    container = of(pci, platform)
    assert len(container.domains) == 1, "one IOMMU, one set of tables"
    container.map(IOVA, PAGE, PAGE)
    assert pci.reads(IOVA) == platform.reads(IOVA) == PAGE


def test_equal_iommus_share_a_domain(world: World) -> None:
    # The depth of a fault queue, and more than a table needs, are no reason for tables of its own.
    first, same = world.iommu(), world.iommu(fault_queue_depth=9, input_bits=52)
    other = world.iommu(enforce_snoop=False)
    devices = [world.add(first), world.add(first, 1), world.add(same), world.add(other)]
    container = of(*devices)
    domains = [device.group.domain for device in devices]
    assert domains[0] is domains[1] is domains[2] is not domains[3]
    assert container.domains == [domains[0], domains[3]]
    container.map(IOVA, 0, PAGE)
    assert len(container.domains[0]) == len(container.domains[1]) == 1
    container.remove_group(devices[0].group)
    assert devices[0].reads(IOVA) is None and devices[1].reads(IOVA) == 0


@pytest.mark.parametrize("kind", ["smmu-v3", "virtio-iommu"])
def test_tables_of_one_instance(world: World, kind: str) -> None:
    """Linux arm_smmu_attach_dev, viommu_attach_dev: EINVAL for a domain of another instance."""
    first, second = world.add(world.iommu(kind)), world.add(world.iommu(kind))
    container = of(first, second)
    assert len(container.domains) == 2
    why = can_attach(container.domains[0], second.endpoint)
    assert why is not None and why.startswith("instance: ")


def test_dma_that_is_not_coherent(world: World) -> None:
    """Linux vfio_register_group_dev: IOMMU_CAP_CACHE_COHERENCY is required."""
    device = world.add(world.iommu("smmu-v3", coherent=False))
    with refused(errno.EINVAL):
        Container().add_group(device.group)
    assert device.group.owner is None


def test_msis_that_are_not_isolated(world: World) -> None:
    """Linux vfio_iommu_type1_attach_group: EPERM, unless the parameter allow_unsafe_interrupts is set."""
    device = world.add(world.iommu(isolated_msi=False))
    with refused(errno.EPERM):
        Container().add_group(device.group)
    assert device.group.owner is None
    Container(allow_unsafe_interrupts=True).add_group(device.group)


def test_a_port_below_the_same_bridge(world: World) -> None:
    """Linux pcieport has driver_managed_dma: a group with such a port is viable."""
    device = world.add(world.iommu())
    device.endpoint.bind("pcieport")
    of(device)
    device.endpoint.unbind()
    device.endpoint.bind("pcieport")  # also while it has an owner


def test_an_equal_iommu_of_another_kind_has_its_own(world: World) -> None:
    vtd = world.add(world.iommu("vt-d"))
    amd = world.add(world.iommu("amd-vi", **vars(vtd.group.iommu.capabilities)))
    assert amd.group.iommu.capabilities == vtd.group.iommu.capabilities
    assert len(of(vtd, amd).domains) == 2


def test_replay(world: World) -> None:
    first, late = world.add(world.iommu()), world.add(world.iommu("pamu"))
    container = of(first)
    container.map(IOVA, 0, PAGE)
    container.map(IOVA + 8 * PAGE, MiB, 2 * PAGE, R)
    container.add_group(late.group)
    assert list(late.group.domain.mappings()) == container.mappings()  # type: ignore[attr-defined]
    assert late.reads(IOVA) == 0 and late.reads(IOVA + 9 * PAGE) == MiB + PAGE
    assert late.writes(IOVA + 8 * PAGE) is None


def needs_a_group(container: Container) -> None:
    """vfio_fops_unl_ioctl: without an IOMMU driver, which VFIO_SET_IOMMU chooses, every ioctl of it is EINVAL."""
    calls: list[Callable[[], object]] = [
        lambda: container.map(IOVA, 0, PAGE),
        lambda: container.unmap(IOVA, PAGE),
        container.unmap_all,
        lambda: container.set_dirty_tracking(True),
        lambda: container.set_dirty_tracking(False),
        lambda: container.read_dirty(Span.sized(IOVA, PAGE)),
        lambda: container.page_sizes,
        lambda: container.iova_ranges,
        lambda: container.dma_avail,
    ]
    for call in calls:
        with refused(errno.EINVAL):
            call()
    assert container.mappings() == [] and container.domains == [] and not container.coherent


def test_nothing_goes_without_a_group(world: World) -> None:
    """vfio_ioctl_set_iommu refuses a container without a group; vfio_group_detach_container releases the driver, and
    with it all mappings, when the last group goes."""
    container, device = Container(), world.add(world.iommu())
    needs_a_group(container)
    container.add_group(device.group)
    container.map(IOVA, 0, PAGE)
    assert device.reads(IOVA) == 0
    container.remove_group(device.group)
    needs_a_group(container)
    container.add_group(device.group)
    assert device.reads(IOVA) is None and container.dma_avail == DMA_LIMIT
    container.map(IOVA, PAGE, PAGE)
    assert device.reads(IOVA) == PAGE


def test_a_group_goes(world: World) -> None:
    vtd, pamu = world.add(world.iommu()), world.add(world.iommu("pamu"))
    container = of(vtd, pamu)
    container.map(IOVA, 0, PAGE)
    assert container.iova_ranges[-1].last < 1 << 36
    container.remove_group(pamu.group)
    assert pamu.group.owner is None and pamu.group.domain is pamu.group.default_domain
    assert container.iova_ranges[-1].last == (1 << 48) - 1 and vtd.reads(IOVA) == 0
    with refused(errno.EINVAL):  # VFIO_GROUP_UNSET_CONTAINER of a group that has none
        container.remove_group(pamu.group)
    container.remove_group(vtd.group)
    assert container.mappings() == []
    container.add_group(vtd.group)
    assert vtd.reads(IOVA) is None


def test_whose_group_it_is(world: World) -> None:
    iommu = world.iommu()
    device, sibling = world.add(iommu), world.add(iommu, 0, 1)
    assert device.group is sibling.group
    container, other = of(device), Container()
    before = state(container)
    with refused(errno.EINVAL):
        container.add_group(device.group)
    with refused(errno.EINVAL):  # Linux vfio_group_has_iommu
        other.add_group(device.group)
    assert state(container) == before and other.groups == [] and device.group.owner is container
    with refused(errno.EINVAL):
        other.remove_group(device.group)
    container.remove_group(device.group)
    sibling.endpoint.bind("e1000e")
    with refused(errno.EPERM):
        container.add_group(device.group)
    assert device.group.owner is None
    sibling.endpoint.unbind()
    container.add_group(device.group)


def test_a_direct_region_keeps_users_away(world: World) -> None:
    span = Span.sized(MiB, PAGE)
    relaxable = world.add(world.iommu(), reserved=[ReservedRegion(span, RegionType.DIRECT_RELAXABLE)])
    direct = world.add(world.iommu(), reserved=[ReservedRegion(span, RegionType.DIRECT)])
    container = of(relaxable)
    container.map(MiB, 0, PAGE)
    with refused(errno.EINVAL):
        container.add_group(direct.group)
    assert container.groups == [relaxable.group] and direct.group.owner is None


@pytest.mark.parametrize("kind", [RegionType.RESERVED, RegionType.MSI, RegionType.SW_MSI])
def test_reserved_regions(world: World, kind: RegionType) -> None:
    plain = world.add(world.iommu(reserved=()))
    picky = world.add(world.iommu(reserved=()), reserved=[ReservedRegion(Span.sized(IOVA, 2 * PAGE), kind)])
    container = of(plain)
    container.map(IOVA + PAGE, 0, PAGE)
    before = state(container)
    with refused(errno.EINVAL):
        container.add_group(picky.group)
    assert state(container) == before and picky.group.owner is None
    container.unmap_all()
    container.add_group(picky.group)
    assert container.iova_ranges == [Span(0, IOVA - 1), Span(IOVA + 2 * PAGE, (1 << 48) - 1)]
    for iova in (IOVA - PAGE, IOVA, IOVA + PAGE):
        with refused(errno.EINVAL):
            container.map(iova, 0, 2 * PAGE)
    container.map(IOVA + 2 * PAGE, 0, PAGE)
    container.remove_group(picky.group)
    container.map(IOVA, 0, PAGE)


def test_apertures(world: World) -> None:
    wide, narrow = world.add(world.iommu()), world.add(world.iommu("pamu"))
    high = world.add(world.iommu(aperture=Span(1 << 40, (1 << 41) - 1)))
    container = of(wide)
    container.map(1 << 36, 0, PAGE)
    before = state(container)
    with refused(errno.EINVAL):
        container.add_group(narrow.group)
    assert state(container) == before and narrow.group.owner is None
    container.unmap(1 << 36, PAGE)
    container.add_group(narrow.group)
    with refused(errno.EINVAL):
        container.map((1 << 36) - PAGE, 0, 2 * PAGE)
    before = state(container)
    with refused(errno.EINVAL):  # they have no address in common
        container.add_group(high.group)
    assert state(container) == before and high.group.owner is None


def test_page_sizes(world: World) -> None:
    small, both, large = (
        world.add(world.iommu(page_sizes=frozenset(sizes)))
        for sizes in ((4 * KiB, 2 * MiB), (4 * KiB, 64 * KiB), (64 * KiB, GiB))
    )
    container = of(both)
    container.map(IOVA, 4 * KiB, 64 * KiB)
    before = state(container)
    with refused(errno.ENXIO):  # its GPA: what iommu_map returns (vfio_iommu_type1.c, vfio_iommu_replay)
        container.add_group(large.group)
    assert state(container) == before and large.group.owner is None
    container.unmap_all()
    container.add_group(large.group)
    assert container.page_sizes == {64 * KiB}
    with refused(errno.EINVAL):
        container.map(IOVA, 0, 4 * KiB)
    container.map(IOVA, 0, 64 * KiB)
    with refused(errno.EINVAL):
        container.unmap(IOVA, 4 * KiB)
    before = state(container)
    with refused(errno.EINVAL):  # none in common with `large`
        container.add_group(small.group)
    assert state(container) == before
    container.remove_group(large.group)
    container.add_group(small.group)
    assert container.page_sizes == {4 * KiB} and small.reads(IOVA) == 0


def test_replay_that_does_not_fit(world: World) -> None:
    first, few = world.add(world.iommu()), world.add(world.iommu(max_mappings=1, enforce_snoop=False))
    short = world.add(world.iommu(output_bits=32))
    container = of(first)
    container.map(IOVA, 0, PAGE)
    container.map(IOVA + PAGE, 1 << 32, PAGE)
    before = state(container)
    with refused(errno.ENOSPC):
        container.add_group(few.group)
    with refused(errno.ERANGE):
        container.add_group(short.group)
    assert state(container) == before and few.group.owner is None and short.group.owner is None
    assert few.group.domain.type is DomainType.IDENTITY


def test_coherency_follows_the_members(world: World) -> None:
    snooping = [world.add(world.iommu()), world.add(world.iommu())]
    not_so = world.add(world.iommu(enforce_snoop=False))
    container = of(*snooping)
    assert container.coherent
    container.add_group(not_so.group)
    assert not container.coherent and len(container.domains) == 2
    container.remove_group(not_so.group)
    assert container.coherent
    for device in snooping:
        container.remove_group(device.group)
    assert not container.coherent


# ---- the map ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iova", "gpa", "size", "code"),
    [
        (IOVA, 0, 0, errno.EINVAL),
        (IOVA, 0, -PAGE, errno.EINVAL),
        (IOVA + 1, 0, PAGE, errno.EINVAL),
        (IOVA, 512, PAGE, errno.EINVAL),
        (IOVA, 0, PAGE + 1, errno.EINVAL),
        (2**64 - PAGE, 0, 2 * PAGE, errno.EOVERFLOW),
        (2**64, 0, PAGE, errno.EOVERFLOW),
        (-PAGE, 0, PAGE, errno.EOVERFLOW),
        (IOVA, 2**64 - PAGE, 2 * PAGE, errno.EOVERFLOW),
        (IOVA, -PAGE, PAGE, errno.EOVERFLOW),
        (1 << 48, 0, PAGE, errno.EINVAL),
        (0xFEE0_0000, 0, PAGE, errno.EINVAL),
        (IOVA, 1 << 60, PAGE, errno.ERANGE),
        (4 * MiB, 0, PAGE, errno.EEXIST),
        (4 * MiB + PAGE, 0, 4 * PAGE, errno.EEXIST),
        (4 * MiB - PAGE, 0, 2 * PAGE, errno.EEXIST),
        (3 * MiB, 0, 4 * MiB, errno.EEXIST),
    ],
)
def test_map_refused(world: World, iova: int, gpa: int, size: int, code: int) -> None:
    container = of(world.add(world.iommu()), world.add(world.iommu("smmu-v3")))
    container.map(4 * MiB, 0, 2 * PAGE)
    before = state(container)
    with refused(code):
        container.map(iova, gpa, size)
    assert state(container) == before


def test_map_without_access(world: World) -> None:
    container = of(world.add(world.iommu()))
    with refused(errno.EINVAL):
        container.map(IOVA, 0, PAGE, Access(0))
    assert container.mappings() == []


def test_map_in_all_domains_or_none(world: World) -> None:
    """The second domain's output width does not do."""
    container = of(world.add(world.iommu()), world.add(world.iommu(output_bits=32)))
    before = state(container)
    with refused(errno.ERANGE):
        container.map(IOVA, 1 << 32, PAGE)
    assert state(container) == before
    container.map(IOVA, (1 << 32) - PAGE, PAGE)


def test_so_many_mappings(world: World) -> None:
    container = Container(dma_limit=2)
    container.add_group(world.add(world.iommu()).group)
    container.map(IOVA, 0, PAGE)
    container.map(IOVA + PAGE, 0, PAGE)
    assert container.dma_avail == 0
    with refused(errno.ENOSPC):
        container.map(IOVA + 2 * PAGE, 0, PAGE)
    with refused(errno.ENOSPC):  # comes before the valid ranges
        container.map(1 << 50, 0, PAGE)
    with refused(errno.EEXIST):  # comes first
        container.map(IOVA, 0, PAGE)
    container.unmap(IOVA, PAGE)
    container.map(IOVA + 2 * PAGE, 0, PAGE)


def test_unmap(world: World) -> None:
    device = world.add(world.iommu())
    container = of(device, world.add(world.iommu("pamu")))
    for n in range(4):
        container.map(IOVA + n * 4 * PAGE, n * 4 * PAGE, 2 * PAGE)
    before = state(container)
    for iova, size, code in (
        (IOVA, 0, errno.EINVAL),
        (IOVA + 1, PAGE, errno.EINVAL),
        (IOVA, PAGE - 1, errno.EINVAL),
        (IOVA, PAGE, errno.EINVAL),  # cuts the first
        (IOVA + PAGE, 16 * PAGE, errno.EINVAL),  # cuts the first, covers the others
        (IOVA, 13 * PAGE, errno.EINVAL),  # cuts the last
        (2**64 - PAGE, 2 * PAGE, errno.EOVERFLOW),
    ):
        with refused(code):
            container.unmap(iova, size)
        assert state(container) == before
    assert container.unmap(IOVA + 2 * PAGE, 2 * PAGE) == 0
    assert container.unmap(IOVA - PAGE, 8 * PAGE) == 4 * PAGE
    assert [area.span.start for area in container.mappings()] == [IOVA + 8 * PAGE, IOVA + 12 * PAGE]
    assert device.reads(IOVA + 4 * PAGE) is None and device.reads(IOVA + 8 * PAGE) == 8 * PAGE
    assert container.unmap_all() == 4 * PAGE and container.unmap_all() == 0
    assert all(not len(domain) for domain in container.domains) and device.reads(IOVA + 8 * PAGE) is None


def test_large_pages_go_in_one_piece(world: World) -> None:
    device = world.add(world.iommu())
    container = of(device)
    container.map(2 * MiB, 0, 4 * MiB)
    assert device.reads(4 * MiB + PAGE) == 2 * MiB + PAGE
    assert container.mappings() == [Mapping(Span.sized(2 * MiB, 4 * MiB), 0, RW)]
    with refused(errno.EINVAL):
        container.unmap(2 * MiB, 2 * MiB)
    assert container.unmap(2 * MiB, 4 * MiB) == 4 * MiB and device.reads(4 * MiB) is None


# ---- dirty tracking --------------------------------------------------------------------------------

AREA = Span.sized(IOVA, 80 * PAGE)


def dirty(container: Container, span: Span = AREA) -> set[int]:
    bits = int.from_bytes(container.read_dirty(span), "little")
    return {n for n in range(bits.bit_length()) if bits >> n & 1}


def test_all_that_is_mapped_is_dirty(world: World) -> None:
    """Linux update_user_bitmap: groups that VFIO does not pin pages for may have written to everything mapped."""
    vtd, pamu = world.add(world.iommu()), world.add(world.iommu("pamu"))
    container = of(vtd, pamu)
    container.map(IOVA, 0, 2 * PAGE)
    container.map(IOVA + 70 * PAGE, 0, PAGE, R)
    with refused(errno.EINVAL):
        container.read_dirty(AREA)
    container.set_dirty_tracking(True)
    for _ in range(2):  # it is not cleared
        assert dirty(container) == {0, 1, 70}
    container.map(IOVA + 5 * PAGE, 0, PAGE)
    container.unmap(IOVA, 2 * PAGE)
    assert dirty(container) == {5, 70}
    assert dirty(container, Span.sized(IOVA, PAGE)) == set()
    container.map(IOVA + 13 * PAGE, 0, 20 * PAGE)  # beside others, over the ends of bytes
    container.map(IOVA + 33 * PAGE, 0, PAGE)
    assert dirty(container) == {5, 70, *range(13, 34)}
    container.set_dirty_tracking(False)
    container.set_dirty_tracking(False)
    with refused(errno.EINVAL):
        container.read_dirty(AREA)


def test_dirty_reports_that_are_refused(world: World) -> None:
    """Linux: the smallest page size only, whole pages (vfio_iommu_type1_dirty_pages), and whole mappings."""
    container = of(world.add(world.iommu()))
    container.map(IOVA + 4 * PAGE, 0, 4 * PAGE)
    container.set_dirty_tracking(True)
    spans = [
        (Span.sized(IOVA, PAGE), 3),
        (AREA, 16 * PAGE),
        (Span.sized(IOVA + 1, PAGE), PAGE),
        (Span.sized(IOVA, 100), PAGE),
        (Span.sized(IOVA, 5 * PAGE), PAGE),
        (Span.sized(0, PAGE << 31), PAGE),
        (Span.sized(IOVA + 5 * PAGE, 5 * PAGE), PAGE),
    ]
    for span, page in spans:
        with refused(errno.EINVAL):
            container.read_dirty(span, page)
    assert dirty(container, Span.sized(IOVA, 8 * PAGE)) == {4, 5, 6, 7}


def test_an_unmap_with_its_dirty_pages(world: World) -> None:
    """VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP: what was mapped is dirty (vfio_dma_do_unmap)."""
    device = world.add(world.iommu())
    container = of(device)
    container.map(IOVA, 0, 2 * PAGE)
    container.map(IOVA + 5 * PAGE, 0, PAGE)
    before = state(container)
    with refused(errno.EINVAL):
        container.unmap_dirty(IOVA, 8 * PAGE)  # tracking is off
    container.set_dirty_tracking(True)
    for iova, size, page, code in (
        (IOVA, 8 * PAGE, 2 * PAGE, errno.EINVAL),
        (IOVA + PAGE, 8 * PAGE, PAGE, errno.EINVAL),
        (IOVA, 0, PAGE, errno.EINVAL),
        (IOVA + 1, PAGE, PAGE, errno.EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, PAGE, errno.EOVERFLOW),
    ):
        with refused(code):
            container.unmap_dirty(iova, size, page)
    assert state(container) == before
    assert container.unmap_dirty(IOVA, 8 * PAGE) == (3 * PAGE, (0b100011).to_bytes(8, "little"))
    assert device.reads(IOVA) is None and container.mappings() == []
    assert container.unmap_dirty(IOVA, 8 * PAGE) == (0, bytes(8))


def test_tracking_ends_with_the_last_group(world: World) -> None:
    container, device = Container(), world.add(world.iommu())
    container.add_group(device.group)
    container.set_dirty_tracking(True)
    container.map(IOVA, 0, AREA.size)
    assert len(dirty(container)) == 80
    container.remove_group(device.group)
    container.add_group(device.group)
    with refused(errno.EINVAL):
        container.read_dirty(AREA)


def test_a_users_domain_is_not_the_containers(world: World) -> None:
    """A domain that somebody else has attached keeps the container away."""
    device = world.add(world.iommu())
    mine = paging_domain_alloc(device.endpoint)
    mine.map(0, PAGE, PAGE)
    device.group.attach(mine)
    with refused(errno.EBUSY):
        of(device)
    assert device.reads(0) is not None
    device.group.detach()
    container = of(device)
    assert device.reads(0) is None and container.domains != [mine]


def test_an_unmap_that_is_wrong_twice(world: World) -> None:
    """Linux vfio_dma_do_unmap: the alignment of the IOVA comes first, the end after the size."""
    container = Container()
    container.add_group(world.add(world.iommu()).group)
    for iova, size, code in (
        (2**64 - 1, PAGE, errno.EINVAL),
        (2**64 - PAGE, PAGE + 1, errno.EINVAL),
        (2**64 - PAGE, 2 * PAGE, errno.EOVERFLOW),
        (1, 0, errno.EINVAL),
    ):
        with refused(code):
            container.unmap(iova, size)


def test_a_group_that_is_wrong_twice(world: World) -> None:
    """Linux vfio_iommu_type1_attach_group looks for isolated MSIs after all else; vfio_group_ioctl_set_container."""
    container = Container()
    container.add_group(world.add(world.iommu()).group)
    container.map(1 << 40, 0, PAGE)
    narrow = world.add(world.iommu(input_bits=32, isolated_msi=False)).group
    with refused(errno.EINVAL):  # the mapping is beyond its aperture
        container.add_group(narrow)
    container.unmap_all()
    with refused(errno.EPERM):
        container.add_group(narrow)
    assert (narrow.owner, narrow.domain) == (None, narrow.default_domain)
    narrow.attach(narrow.iommu.blocked)
    with refused(errno.EBUSY):
        container.add_group(narrow)
    narrow.detach()
    with Container(allow_unsafe_interrupts=True) as other:
        other.add_group(narrow)
        with refused(errno.EINVAL):
            container.add_group(narrow)
    narrow.claim_dma_owner("vm")
    with refused(errno.EPERM):
        container.add_group(narrow)
