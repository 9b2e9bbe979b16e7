"""What Linux 7.3's driver of the RISC-V IOMMU allows: drivers/iommu/riscv/iommu.c, generic_pt/fmt/riscv.h."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.iommu.world import World, group_of, iommu
from vmodel.errors import DmaFault, IommuError
from vmodel.iommu import AllocFlags, Coverage, Iommu, container, dma_domain_alloc, iommufd, paging_domain_alloc
from vmodel.iommu.drivers.riscv import RiscV
from vmodel.pci.topology import Bdf
from vmodel.span import GiB, KiB, MiB, Span

TiB = 1024 * GiB
IOVA = 0x4000_0000


@pytest.mark.parametrize(
    ("width", "largest"),
    [(39, {GiB}), (48, {GiB, 512 * GiB}), (57, {GiB, 512 * GiB, 256 * TiB})],
)
def test_page_sizes_and_the_lower_half(width: int, largest: set[int]) -> None:
    """generic_pt: a leaf at each level, Svnapot's 64 KiB, and with PT_FEAT_SIGN_EXTEND half of the addresses."""
    world = World(iommu("riscv", input_bits=width))
    endpoint, _ = world.device("00:03.0")
    domain = paging_domain_alloc(endpoint)
    assert domain.page_sizes == {4 * KiB, 64 * KiB, 2 * MiB} | largest
    assert domain.aperture == Span(0, (1 << width - 1) - 1)
    domain.map((1 << width - 1) - 4 * KiB, (1 << 56) - 4 * KiB, 4 * KiB)
    for iova, gpa in ((1 << width - 1, 0), (2**64 - 4 * KiB, 0), (0, 1 << 56)):
        with pytest.raises(IommuError) as caught:
            domain.map(iova, gpa, 4 * KiB)
        assert caught.value.errno == errno.ERANGE
    world.close()


def test_unmap_of_a_part_of_64_kib() -> None:
    """generic_pt __unmap_range: 16 entries of Svnapot are one, and go as one."""
    world = World(iommu("riscv"))
    endpoint, _ = world.device("00:03.0")
    domain = paging_domain_alloc(endpoint)
    domain.map(IOVA, 0, 64 * KiB)
    assert domain.unmap(IOVA, 4 * KiB) == 64 * KiB
    domain.map(IOVA, 0, 4 * KiB)
    with pytest.raises(IommuError) as caught:
        domain.map(IOVA, 0, 4 * KiB)
    assert caught.value.errno == errno.EADDRINUSE  # generic_pt __map_range_leaf
    world.close()


@pytest.mark.parametrize(
    "flags", [AllocFlags.NEST_PARENT, AllocFlags.DIRTY_TRACKING, AllocFlags.PASID, AllocFlags.ENFORCE_SNOOP]
)
def test_no_flags(flags: AllocFlags) -> None:
    """riscv_iommu_ops has domain_alloc_paging only: __iommu_paging_domain_alloc_flags has EOPNOTSUPP for any flag."""
    world = World(iommu("riscv"))
    endpoint, _ = world.device("00:03.0")
    with pytest.raises(IommuError) as caught:
        paging_domain_alloc(endpoint, flags)
    assert caught.value.errno == errno.EOPNOTSUPP
    world.close()


def test_domains_of_other_instances() -> None:
    """riscv_iommu_attach_paging_domain: whatever has the mode takes it, else ENODEV."""
    wide, narrow, equal = (iommu("riscv", f"sv{n}", input_bits=n) for n in (57, 48, 57))
    for n, one in enumerate((wide, narrow, equal)):
        one.name, one.covers = f"iommu{n}", [Coverage.pci(Bdf(0, 0, 3 + n, 0), Bdf(0, 0, 3 + n, 7))]
    world = World(wide, narrow, equal)
    first, second, third = (world.device(f"00:0{n}.0")[0] for n in (3, 4, 5))
    domain = paging_domain_alloc(first)
    with pytest.raises(IommuError, match="sizes") as caught:
        group_of(second).attach(domain)
    assert caught.value.errno == errno.ENODEV
    assert group_of(second).domain is narrow.identity
    group_of(third).attach(domain)
    other = World(iommu("vt-d"))
    with pytest.raises(IommuError, match="format") as caught:  # the core: another driver's domain
        group_of(other.device("00:03.0")[0]).attach(domain)
    assert caught.value.errno == errno.EINVAL
    for made in (world, other):
        made.close()


def test_no_pasids_and_no_msi_region() -> None:
    """riscv_iommu_ops has neither set_dev_pasid nor get_resv_regions."""
    world = World(iommu("riscv"))
    endpoint, _ = world.device("00:03.0")
    assert group_of(endpoint).reserved_regions == []
    with pytest.raises(IommuError) as caught:
        group_of(endpoint).attach_pasid(paging_domain_alloc(endpoint), 1)
    assert caught.value.errno == errno.EOPNOTSUPP
    world.close()


def test_dma() -> None:
    world = World(iommu("riscv"))
    endpoint, dma = world.device("00:03.0")
    group = group_of(endpoint)
    domain = dma_domain_alloc(endpoint)
    assert domain.deferred  # iommu_domain_supports_fq: generic_pt always does
    group.set_default(domain)
    domain.map(IOVA, 0x10000, 4 * KiB)
    dma.write(IOVA, b"here")
    assert world.ram[0x10000:0x10004] == b"here"
    with pytest.raises(DmaFault):
        dma.read(IOVA + 4 * KiB, 1)
    world.close()


def binds(world: World) -> list[Callable[[], object]]:
    endpoint, _ = world.device("00:03.0")
    vfio, fd = container.Container(allow_unsafe_interrupts=True), iommufd.Context(allow_unsafe_interrupts=True)
    return [lambda: vfio.add_group(group_of(endpoint)), lambda: iommufd.Device(fd, endpoint)]


@pytest.mark.parametrize("way", [0, 1], ids=["VFIO", "iommufd"])
def test_refused_by_vfio_and_iommufd(way: int) -> None:
    """No `capable`: device_iommu_capable() is false, and __vfio_register_dev and iommufd_bind_iommu have EINVAL."""
    world = World(iommu("riscv"))
    with pytest.raises(IommuError, match="coherent") as caught:
        binds(world)[way]()
    assert caught.value.errno == errno.EINVAL
    assert group_of(world.system["00:03.0"]).owner is None
    world.close()
    patched = World(iommu("riscv", params={"cache_coherency": True}))
    binds(patched)[way]()
    patched.close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"input_bits": 40}, "input_bits must be 39, 48 or 57"),
        ({"input_bits": 39, "aperture": Span(0, 1 << 38)}, "not in the lower half, 0x0..0x3fffffffff"),
    ],
)
def test_what_no_such_iommu_has(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        iommu("riscv", **changes)


def test_an_aperture_and_page_sizes_of_its_own() -> None:
    small = Span(0, 0xFFFF_FFFF)
    made = iommu("riscv", input_bits=39, aperture=small, page_sizes=frozenset((4 * KiB,)))
    assert (made.capabilities.aperture, made.capabilities.page_sizes) == (small, {4 * KiB})
    assert Iommu("plain", RiscV(), []).capabilities.usable == Span(0, (1 << 56) - 1)
