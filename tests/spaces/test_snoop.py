"""Who enforces snooping: VFIO's containers, iommufd's HWPTs, and what KVM makes of a guest's WBINVD (Linux 7.3)."""

from __future__ import annotations

import contextlib
import errno
import threading

import pytest

from tests.spaces.world import Device, World, refused
from vmodel.cpu_cache import CpuCache
from vmodel.iommu.container import Container
from vmodel.iommu.domain import AllocFlags
from vmodel.iommu.iommufd import Context, DmaBuf, HwInfoType, Ioas, SmmuV3Info, ViommuType
from vmodel.iommu.iommufd import Device as Bound
from vmodel.iommu.kvm_vfio import KvmVfio, enforced_coherent
from vmodel.patience import patience
from vmodel.span import PAGE, MiB

IOVA, GPA = 16 * MiB, 0x8000


def cache_of(*devices: Device) -> CpuCache:
    """A cache beside the DMA of devices that set No Snoop."""
    cache = CpuCache(devices[0].world.memory)
    for device in devices:
        device.dma.set_no_snoop_enable(lambda: True)
        cache.attach(device.dma)
    return cache


def leaves_stale(device: Device, cache: CpuCache) -> bool:
    """Whether a write with No Snoop leaves a stale line; the line stays."""
    device.world.ram[GPA : GPA + 1] = b"O"
    cache.flush(GPA, 1)
    assert cache.read(GPA, 1) == b"O"
    device.dma.no_snoop().write(IOVA, b"N")
    return cache.read(GPA, 1) == b"O"


# ---- VFIO type 1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "enforced", "stale"),
    [("vt-d", True, False), ("amd-vi", True, False), ("smmu-v3", False, True), ("pamu", False, True)],
)
def test_a_container_enforces_where_it_can(kind: str, enforced: bool, stale: bool, world: World) -> None:
    """vfio_iommu_type1_attach_group: always turned on; the answer is recorded, and no refusal."""
    device = world.add(world.iommu(kind))
    container = Container()
    container.add_group(device.group)
    container.map(IOVA, GPA, PAGE)
    assert (container.coherent, container.domains[0].enforces_snoop) == (enforced, enforced)
    assert leaves_stale(device, cache_of(device)) == stale


def test_a_container_is_coherent_if_all_domains_are(world: World) -> None:
    """vfio_domains_have_enforce_cache_coherency; a domain serves groups that are alike only."""
    unit, old = world.iommu(), world.iommu(enforce_snoop=False)
    can, cannot, also = world.add(unit, 0), world.add(old, 0), world.add(unit, 1)
    container = Container()
    for device, coherent in ((can, True), (cannot, False), (also, False)):
        container.add_group(device.group)
        assert container.coherent == coherent
    assert [domain.enforces_snoop for domain in container.domains] == [True, False]
    container.map(IOVA, GPA, PAGE)
    cache = cache_of(can, cannot, also)
    assert [leaves_stale(device, cache) for device in (can, cannot, also)] == [False, True, False]
    container.remove_group(cannot.group)
    assert container.coherent, "what a group takes away goes with its domain"


def test_one_device_of_a_group_that_cannot(world: World) -> None:
    """domain_support_force_snooping: all devices of the domain."""
    unit = world.iommu()
    one, other = world.add(unit, 3, 0), world.add(unit, 3, 1)
    assert one.group is other.group
    other.endpoint.enforce_snoop = False
    container = Container()
    container.add_group(one.group)
    assert not container.coherent and not enforced_coherent(one.group)


def test_a_container_that_does_not_enforce(world: World) -> None:
    """`enforce_snoop=False`: as if Linux did not; what then goes wrong is seen."""
    device = world.add(world.iommu())
    container = Container(enforce_snoop=False)
    container.add_group(device.group)
    container.map(IOVA, GPA, PAGE)
    assert not container.coherent and leaves_stale(device, cache_of(device))
    container.close()
    again = Container()
    again.add_group(device.group)
    again.map(IOVA, GPA, PAGE)
    assert again.coherent and not leaves_stale(device, cache_of(device)), "each domain decides anew"


def test_mappings_that_were_made_before(world: World) -> None:
    """A domain that a later group needs enforces from its first mapping on (replay is after the operation)."""
    cannot, can = world.add(world.iommu(enforce_snoop=False)), world.add(world.iommu())
    container = Container()
    container.add_group(cannot.group)
    container.map(IOVA, GPA, PAGE)
    container.add_group(can.group)
    assert not leaves_stale(can, cache_of(can))


# ---- iommufd ---------------------------------------------------------------------------------------


def test_a_hwpt_enforces_if_its_device_can(world: World) -> None:
    """iommufd_hwpt_paging_alloc: before iopt_table_add_domain, so for all mappings."""
    for kind, enforced in (("vt-d", True), ("smmu-v3", False)):
        device = world.add(world.iommu(kind))
        with Context() as context:
            bound, ioas = Bound(context, device.endpoint), Ioas(context)
            ioas.map(GPA, PAGE, iova=IOVA)
            hwpt = bound.attach(ioas)
            assert (hwpt.paging.enforces_snoop, bound.get_info().enforce_snoop) == (enforced, enforced)
            assert all(mapping.cache for mapping in hwpt.paging.mappings()), "ioas.c: always IOMMU_CACHE"
            assert leaves_stale(device, cache_of(device)) != enforced


@pytest.mark.parametrize(("kind", "stale"), [("vt-d", False), ("smmu-v3", True)])
def test_memory_of_devices_is_not_cached(kind: str, stale: bool, world: World) -> None:
    """pages.c, batch_to_domain: BATCH_MMIO is without IOMMU_CACHE, before and after the HWPT is there."""
    device = world.add(world.iommu(kind))
    with Context() as context:
        bound, ioas = Bound(context, device.endpoint), Ioas(context)
        ioas.map_file(DmaBuf(GPA, PAGE), 0, PAGE, iova=IOVA)
        hwpt = bound.attach(ioas)
        ioas.map_file(DmaBuf(GPA, PAGE), 0, PAGE, iova=IOVA + PAGE)
        ioas.map(GPA, PAGE, iova=IOVA + 2 * PAGE)
        assert [mapping.cache for mapping in hwpt.paging.mappings()] == [False, False, True]
        assert [mapping.cache for mapping in ioas.mappings()] == [False, False, True]
        cache = cache_of(device)
        assert cache.read(GPA, 1) == b"\0"
        device.dma.write(IOVA, b"N")
        assert (cache.read(GPA, 1) == b"\0") == stale


def test_whose_hwpt_may_be_used(world: World) -> None:
    """hw_pagetable.c: one made for a device that cannot serves all; one made for a device that can, only such."""
    can, cannot = world.add(world.iommu()), world.add(world.iommu(enforce_snoop=False))
    with Context() as context:
        first, second, ioas = Bound(context, can.endpoint), Bound(context, cannot.endpoint), Ioas(context)
        enforcing, plain = first.hwpt_alloc(ioas), second.hwpt_alloc(ioas)
        with refused(errno.EINVAL):
            second.attach(enforcing)
        second.attach(plain)
        first.attach(plain)
        assert not can.group.domain.snoops(IOVA, no_snoop=True)
        second.detach(), first.detach()

        auto = second.attach(ioas)  # iommufd_device_auto_get_domain: any that can be attached
        assert first.attach(ioas) is auto and not auto.paging.enforces_snoop
        second.detach(), first.detach()
        auto = first.attach(ioas)
        assert second.attach(ioas) is not auto and auto.paging.enforces_snoop


def test_a_device_that_does_not_enforce(world: World) -> None:
    unit = world.iommu()
    device, other = world.add(unit, 0), world.add(unit, 1)
    with Context() as context:
        off, on = Bound(context, device.endpoint, enforce_snoop=False), Bound(context, other.endpoint)
        ioas = Ioas(context)
        ioas.map(GPA, PAGE, iova=IOVA)
        assert on.attach(ioas) is not off.attach(ioas)
        cache = cache_of(device, other)
        assert leaves_stale(device, cache) and not leaves_stale(other, cache)
        asked = off.hwpt_alloc(ioas, AllocFlags.ENFORCE_SNOOP)
        off.replace(asked)
        assert not leaves_stale(device, cache), "but for who asks"


@pytest.mark.parametrize(("s2fwb", "can", "allowed"), [(True, False, True), (False, True, True), (False, False, False)])
def test_vms_that_could_bypass_caches_have_no_viommu(s2fwb: bool, can: bool, allowed: bool, world: World) -> None:
    """arm-smmu-v3-iommufd.c, arm_smmu_get_viommu_size: S2FWB of the SMMU, or CANWBS of the device."""
    unit = world.iommu("smmu-v3")
    unit.driver.params = unit.driver.params.model_copy(update={"s2fwb": s2fwb})
    device = world.add(unit)
    device.endpoint.enforce_snoop = can
    with Context() as context:
        bound = Bound(context, device.endpoint)
        info = bound.get_info(HwInfoType.ARM_SMMUV3).registers
        assert isinstance(info, SmmuV3Info) and info.idr[3] >> 8 & 1 == s2fwb
        parent = bound.hwpt_alloc(Ioas(context), AllocFlags.NEST_PARENT)
        with contextlib.nullcontext() if allowed else refused(errno.EOPNOTSUPP):
            bound.viommu_alloc(parent, ViommuType.ARM_SMMUV3)
        assert parent.users == allowed


# ---- KVM -------------------------------------------------------------------------------------------


def test_files_of_kvm(world: World) -> None:
    """virt/kvm/vfio.c: kvm_vfio_file_add, kvm_vfio_file_del, kvm_vfio_update_coherency."""
    can, cannot = world.add(world.iommu()), world.add(world.iommu("smmu-v3"))
    kvm = KvmVfio()
    assert not kvm.noncoherent_dma and not kvm.guest_wbinvd()
    with Context() as context:
        bound = Bound(context, cannot.endpoint)
        kvm.add(can.group)
        assert not kvm.noncoherent_dma
        kvm.add(bound)
        assert kvm.noncoherent_dma and kvm.guest_wbinvd()
        for file in (can.group, bound):
            with refused(errno.EEXIST):
                kvm.add(file)
        kvm.remove(can.group)
        assert kvm.noncoherent_dma
        kvm.remove(bound)
        assert not kvm.noncoherent_dma
        with refused(errno.ENOENT):
            kvm.remove(bound)
        for wrong in (Container(), can.endpoint, None):
            with refused(errno.EINVAL):
                kvm.add(wrong)  # type: ignore[arg-type]


def test_the_end_of_a_guest(world: World) -> None:
    """kvm_vfio_release."""
    device = world.add(world.iommu("pamu"))
    with KvmVfio() as kvm:
        kvm.add(device.group)
        assert kvm.noncoherent_dma
    assert not kvm.noncoherent_dma
    kvm.add(device.group)
    assert kvm.noncoherent_dma


def test_kvm_asks_when_files_come_and_go_only(world: World) -> None:
    device, other = world.add(world.iommu()), world.add(world.iommu())
    kvm = KvmVfio()
    kvm.add(device.group)
    device.endpoint.enforce_snoop = False
    assert not kvm.noncoherent_dma
    kvm.add(other.group)
    assert kvm.noncoherent_dma


@pytest.mark.parametrize("kind", ["vt-d", "smmu-v3"])
def test_the_contract(kind: str, world: World) -> None:
    """Where snooping is enforced nothing is ever stale and WBINVD does nothing; else WBINVD works, and is needed."""
    device = world.add(world.iommu(kind))
    container, cache = Container(), cache_of(device)
    container.add_group(device.group)
    container.map(IOVA, GPA, PAGE)
    kvm = KvmVfio(cache.wbinvd)
    kvm.add(device.group)
    stale = leaves_stale(device, cache)
    assert stale == kvm.noncoherent_dma == (kind == "smmu-v3")
    assert kvm.guest_wbinvd() == stale
    assert cache.read(GPA, 1) == b"N"


def test_the_contract_broken(world: World) -> None:
    """A VMM's kernel that could enforce, and does not: KVM believes what the device can, and the line stays stale."""
    device = world.add(world.iommu())
    container, cache = Container(enforce_snoop=False), cache_of(device)
    container.add_group(device.group)
    container.map(IOVA, GPA, PAGE)
    kvm = KvmVfio(cache.wbinvd)
    kvm.add(device.group)
    assert leaves_stale(device, cache)
    assert not kvm.guest_wbinvd() and cache.read(GPA, 1) == b"O", "the guest did all that it could"
    cache.wbinvd()
    assert cache.read(GPA, 1) == b"N"


def test_wbinvd_is_called_without_the_lock(world: World) -> None:
    """A callback may wait for a thread that uses the object."""
    ended: list[bool] = []

    def end() -> None:
        thread = threading.Thread(target=kvm.close)
        thread.start()
        thread.join(patience(20))
        ended.append(not thread.is_alive())

    kvm = KvmVfio(end)
    kvm.add(world.add(world.iommu("smmu-v3")).group)
    assert kvm.guest_wbinvd()
    assert ended == [True]
