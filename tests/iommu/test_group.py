"""Groups: attaching, PASIDs, owners, regions that are not free, members that come and go; with real DMA."""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable

import pytest

from tests.iommu.world import World, group_of, iommu
from tests.waiting import meanwhile, until
from vmodel import _shim
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, IommuError, Reason
from vmodel.iommu import Coverage, Endpoint, Iommu, System, dma_domain_alloc, paging_domain_alloc
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import AllocFlags, Domain, DomainType, PagingDomain
from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.group import Group
from vmodel.patience import patience
from vmodel.pci.config import Identity
from vmodel.pci.topology import PortType
from vmodel.span import PAGE, Span

IOVA, OLD, NEW = 0x10_0000, 0x20_0000, 0x30_0000
DIRECT, RELAXABLE = RegionType.DIRECT, RegionType.DIRECT_RELAXABLE


def refused(code: int, text: str, call: Callable[..., object], *args: object) -> None:
    """`call` fails with this errno, and says so."""
    with pytest.raises(IommuError) as caught:
        call(*args)
    assert caught.value.errno == code, caught.value
    assert text in str(caught.value)


def fault_of(dma: Dma, iova: int = IOVA, access: Access = Access.READ) -> Reason:
    """How an access of 8 bytes fails; it must."""
    with pytest.raises(DmaFault) as caught:
        dma.read(iova, 8) if access is Access.READ else dma.write(iova, bytes(8))
    return caught.value.reason


def mapped(endpoint: Endpoint, gpa: int, iova: int = IOVA) -> PagingDomain:
    """A domain with one page."""
    domain = paging_domain_alloc(endpoint)
    domain.map(iova, gpa, PAGE)
    return domain


def mark(world: World) -> None:
    for gpa, byte in ((IOVA, b"I"), (OLD, b"O"), (NEW, b"N")):
        world.ram[gpa : gpa + PAGE] = byte * PAGE


@pytest.fixture
def pair(world: World) -> tuple[Endpoint, Endpoint]:
    """Two functions of one group."""
    mark(world)
    first, second = world.device("00:03.0")[0], world.device("00:03.1")[0]
    assert first.group is second.group
    return first, second


# ---- domains -----------------------------------------------------------------------------------


def test_attach_is_for_all_members(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group, dmas = group_of(pair[0]), list(world.dmas.values())
    assert [dma.read(IOVA, 1) for dma in dmas] == [b"I"] * 2  # identity at first
    assert group.domain.type is group.default_domain.type is DomainType.IDENTITY
    old, new = mapped(pair[0], OLD), mapped(pair[1], NEW)
    group.attach(old)
    assert [dma.read(IOVA, 1) for dma in dmas] == [b"O"] * 2
    assert (group.domain_of(), old.users, group.default_domain.users) == (old, 1, 0)
    refused(errno.EBUSY, f"{old.name} is attached", group.attach, new)
    group.replace(new)
    assert [dma.read(IOVA, 1) for dma in dmas] == [b"N"] * 2
    refused(errno.EBUSY, f"{new.name} is attached", group.attach, new)
    group.replace(new)
    assert (old.users, new.users) == (0, 1)
    group.detach()
    assert [dma.read(IOVA, 1) for dma in dmas] == [b"I"] * 2
    assert (new.users, group.default_domain.users) == (0, 1)
    group.attach(group.iommu.blocked)
    assert [fault_of(dma) for dma in dmas] == [Reason.BLOCKED] * 2


def test_what_does_not_fit_changes_nothing(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group, dma = group_of(pair[0]), world.dmas["00:03.0"]
    old = mapped(pair[0], OLD)
    group.attach(old)
    foreign = world.system.add_iommu(iommu("smmu-v3", "other"))
    stranger = world.plug(PlatformDevice("x"), iommu=iommu("smmu-v3", "third", params={"platform": {"x": 1}}))
    refused(errno.EINVAL, "00:03.0: format: it has tables of Arm SMMUv3", group.replace, mapped(stranger, NEW))
    assert (group.domain, old.users, dma.read(IOVA, 1)) == (old, 1, b"O")
    assert foreign in world.system.iommus


class Short(_shim.Requester):
    """Runs out of memory at the n-th attach."""

    def __init__(self, memory: _shim.Memory) -> None:
        super().__init__(memory)
        self.left = 1 << 30

    def attach(self, domain: _shim.Domain | None, pasid: int = _shim.NO_PASID) -> None:
        self.left -= 1
        if not self.left:
            raise OSError(errno.ENOMEM, "no memory")
        super().attach(domain, pasid)


@pytest.mark.parametrize("pasid", [None, 5])
def test_no_memory_half_way(world: World, pair: tuple[Endpoint, Endpoint], pasid: int | None) -> None:
    """The members that went over come back."""
    short = Short(world.memory.shim)
    short.enable(True)
    third = world.system.add(world.function("00:03.2"), short)
    group, dma = group_of(third), world.dmas["00:03.0"]
    assert len(group.endpoints) == 3
    old, new = mapped(third, OLD), mapped(third, NEW)
    if pasid is None:
        group.attach(old)
    else:
        group.attach_pasid(old, pasid)
        dma = dma.with_pasid(pasid)
    short.left = 1
    with pytest.raises(OSError, match="no memory"):
        group.replace(new) if pasid is None else group.replace_pasid(new, pasid)
    assert (group.domain_of(pasid), old.users, new.users) == (old, 1, 0)
    assert dma.read(IOVA, 1) == b"O"
    assert short.read(IOVA, 1, _shim.NO_PASID if pasid is None else pasid) == b"O"


def test_pasids(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group = group_of(pair[0])
    dmas = [dma.with_pasid(7) for dma in world.dmas.values()]
    assert [fault_of(dma) for dma in dmas] == [Reason.PASID] * 2
    old, new = mapped(pair[0], OLD), mapped(pair[0], NEW)
    refused(errno.EINVAL, "PASID 7 has no domain", group.replace_pasid, old, 7)
    refused(errno.EINVAL, "PASID 7 has no domain", group.detach_pasid, 7)
    group.attach_pasid(old, 7)
    assert [dma.read(IOVA, 1) for dma in dmas] == [b"O"] * 2
    assert world.dmas["00:03.0"].read(IOVA, 1) == b"I"  # without a PASID nothing has changed
    assert fault_of(world.dmas["00:03.0"].with_pasid(8)) is Reason.PASID
    refused(errno.EBUSY, f"PASID 7 has {old.name}", group.attach_pasid, new, 7)
    group.replace_pasid(new, 7)
    assert [dma.read(IOVA, 1) for dma in dmas] == [b"N"] * 2
    assert (group.domain_of(7), old.users, new.users) == (new, 0, 1)
    for pasid in (0, 1 << 20, -1):
        refused(errno.EINVAL, f"PASID {pasid} is not from 1 to 1048575", group.attach_pasid, new, pasid)
    group.detach_pasid(7)
    assert [fault_of(dma) for dma in dmas] == [Reason.PASID] * 2
    assert (group.domain_of(7), new.users) == (None, 0)


def test_pasids_of_each_device(world: World) -> None:
    """Linux iommu_attach_device_pasid: below every member's max_pasids; members without PASIDs do not count."""
    mark(world)
    functions = [world.function(f"00:03.{n}") for n in range(3)]
    some, none, more = (world.plug(f, max_pasids=n) for f, n in zip(functions, (16, 0, 64), strict=True))
    group = group_of(some)
    assert group is none.group is more.group
    domain = mapped(some, OLD)
    refused(errno.EINVAL, "00:03.0: PASID 16 is not from 1 to 15", group.attach_pasid, domain, 16)
    group.attach_pasid(domain, 15)
    assert [world.dmas[e.name].with_pasid(15).read(IOVA, 1) for e in (some, more)] == [b"O"] * 2
    assert fault_of(world.dmas["00:03.1"].with_pasid(15)) is Reason.PASID
    late = world.plug(world.function("00:03.3"), max_pasids=0)
    assert late.group is group and fault_of(world.dmas["00:03.3"].with_pasid(15)) is Reason.PASID


def test_no_pasids() -> None:
    world = World(iommu("pamu", params={"liodns": {"0000:00:03.0": 1}}))
    endpoint, _ = world.device("00:03.0")
    refused(errno.EOPNOTSUPP, "iommu0 has no PASIDs", group_of(endpoint).attach_pasid, mapped(endpoint, OLD), 1)
    world.close()


@pytest.mark.parametrize("pasid", [None, 3])
def test_replacing_is_atomic(world: World, pair: tuple[Endpoint, Endpoint], pasid: int | None) -> None:
    """Devices at work see the old domain or the new one: no fault, no third thing."""
    group = group_of(pair[0])
    domains = [mapped(pair[0], OLD), mapped(pair[0], NEW)]
    if pasid is None:
        group.attach(domains[0])
    else:
        group.attach_pasid(domains[0], pasid)
    seen = set[bytes]()

    def work(dma: Dma) -> None:
        seen.add(dma.read(IOVA, 64))
        dma.write(IOVA + 64, b"w")

    lines = [dma if pasid is None else dma.with_pasid(pasid) for dma in world.dmas.values()]
    with meanwhile(*(functools.partial(work, line) for line in lines)):
        for n in range(4000):
            if pasid is None:
                group.replace(domains[n & 1])
            else:
                group.replace_pasid(domains[n & 1], pasid)
            if n >= 500 and len(seen) >= 2:
                break
    assert seen == {b"O" * 64, b"N" * 64}
    assert not world.system.iommus[0].faults.total


def test_after_replacing_the_old_one_is_out_of_reach(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group, dma = group_of(pair[0]), world.dmas["00:03.1"]
    old, new = mapped(pair[0], OLD), mapped(pair[0], NEW, IOVA + PAGE)
    group.attach(old)
    assert dma.read(IOVA, 1) == b"O"  # and it is in the IOTLB
    group.replace(new)
    assert fault_of(dma) is Reason.NOT_MAPPED
    assert dma.read(IOVA + PAGE, 1) == b"N"


# ---- default domains and regions ---------------------------------------------------------------


def test_default_domain(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group, dma = group_of(pair[0]), world.dmas["00:03.0"]
    first, second = dma_domain_alloc(pair[0]), dma_domain_alloc(pair[0])
    first.map(IOVA, OLD, PAGE)
    second.map(IOVA, NEW, PAGE)
    group.set_default(first)
    assert (group.domain, first.users, dma.read(IOVA, 1)) == (first, 1, b"O")
    own = mapped(pair[0], IOVA)
    group.attach(own)
    group.set_default(second)  # not before the other goes
    assert (group.domain, own.users, second.users) == (own, 1, 0)
    group.detach()
    assert (group.domain, dma.read(IOVA, 1), own.users, second.users) == (second, b"N", 0, 1)
    group.claim_dma_owner("vm")
    refused(errno.EPERM, "is owned by vm", group.set_default, first)
    group.set_default(first, forced=True)
    assert fault_of(dma) is Reason.BLOCKED
    group.release_dma_owner("vm")
    assert (dma.read(IOVA, 1), first.users, second.users) == (b"O", 1, 0)
    group.claim_dma_owner("vm")
    group.attach(first)
    group.set_default(second, forced=True)  # an owner's stays, even where it was the kernel's
    assert (group.domain, dma.read(IOVA, 1)) == (first, b"O")


@pytest.mark.parametrize("default", [DomainType.IDENTITY, DomainType.DMA, DomainType.DMA_FQ])
def test_the_type_of_default_domains(world: World, default: DomainType) -> None:
    """Linux: iommu.passthrough and iommu.strict choose it, and an untrusted device has DMA in any case."""
    mark(world)
    world.system.default = default
    plain, outside = world.plug(world.function("00:03.0")), world.plug(world.function("00:04.0"), untrusted=True)
    assert group_of(plain).default_domain.type is default
    assert group_of(outside).domain.type is DomainType.DMA
    assert fault_of(world.dmas["00:04.0"]) is Reason.NOT_MAPPED
    lazy = PagingDomain(DomainType.DMA_FQ, world.system.iommus[0], AllocFlags.NONE)
    for domain in (group_of(outside).iommu.identity, lazy):
        refused(errno.EINVAL, "00:04.0 is untrusted", group_of(outside).set_default, domain)
    with pytest.raises(ValueError, match="blocked is no type"):
        System(default=DomainType.BLOCKED)


@pytest.mark.parametrize(
    "kind, identity, max_pasids",
    [
        ("pamu", None, None),  # drivers/iommu/fsl_pamu_domain.c:431, .default_domain
        ("power-pe", None, None),  # arch/powerpc/kernel/iommu.c:1265, .default_domain
        ("amd-vi", None, 1024),  # drivers/iommu/amd/iommu.c:3184, a device that can use PASIDs
        ("smmu-v3", Identity(0x19E5, 0xA12E, 0), None),  # drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c:4370
    ],
)
def test_the_driver_chooses_the_default_domain(kind: str, identity: Identity | None, max_pasids: int | None) -> None:
    """Whatever the command line says: drivers/iommu/iommu.c, iommu_get_default_domain_type (:1901)."""
    world = World(iommu(kind, params={"liodns": {"0000:01:00.0": 1, "0000:02:00.0": 2}} if kind == "pamu" else {}))
    world.system.default = DomainType.DMA
    world.port("00:1c.0", 1), world.port("00:1d.0", 2)
    one = world.function("01:00.0", PortType.ENDPOINT, identity=identity)
    found = world.plug(one, max_pasids=max_pasids)
    assert group_of(found).default_domain is group_of(found).iommu.identity
    # :1938: no other type can be written to the file `type`.
    refused(errno.EINVAL, "needs a domain of type identity", group_of(found).set_default, dma_domain_alloc(found))
    # :1928: the probe of an untrusted device fails.
    other = world.function("02:00.0", PortType.ENDPOINT, identity=identity)
    refused(errno.EINVAL, "02:00.0 is untrusted", lambda: world.plug(other, max_pasids=max_pasids, untrusted=True))
    world.close()


@pytest.mark.parametrize("kind", ["vt-d", "amd-vi", "smmu-v3", "virtio-iommu"])
def test_a_driver_that_leaves_the_choice(kind: str) -> None:
    world = World(iommu(kind))
    world.system.default = DomainType.DMA
    found = world.plug(world.function("00:03.0"), max_pasids=0)
    assert group_of(found).default_domain.type is DomainType.DMA
    world.close()


def test_defaults_once_all_devices_are_there(world: World) -> None:
    """bus_iommu_probe asks all members; a device that comes later gets what its group has."""
    one = world.plug(world.function("00:03.0"))
    two, alone = world.plug(world.function("00:03.1"), untrusted=True), world.plug(world.function("00:04.0"))
    group = group_of(one)
    assert (group_of(two), group.default_domain.type) == (group, DomainType.IDENTITY)
    one.bind("nvme")
    refused(errno.EPERM, "00:03.0 is bound to nvme", world.system.set_defaults, world.system.groups)
    one.unbind()
    world.system.set_defaults(world.system.groups)
    found = group.default_domain
    assert (found.type, group.domain, group_of(alone).domain.type) == (DomainType.DMA, found, DomainType.IDENTITY)
    world.system.set_defaults(world.system.groups)
    assert group.default_domain is found


def test_each_iommu_may_have_its_own_default() -> None:
    driver = iommu().driver
    first = Iommu("first", driver, [Coverage.segment(0)], default=DomainType.DMA)
    second = Iommu("second", driver, [Coverage.segment(1)])
    world = World(first, second)
    world.system.default = DomainType.DMA_FQ
    world.topology.add_root(1)
    devices = [world.plug(world.function(f"000{n}:00:03.0")) for n in range(2)]
    assert [group_of(device).domain.type for device in devices] == [DomainType.DMA, DomainType.DMA_FQ]
    world.close()
    with pytest.raises(ValueError, match="unmanaged is no type"):
        Iommu("third", driver, [], default=DomainType.UNMANAGED)


def test_flushes_that_are_deferred_later(pair: tuple[Endpoint, Endpoint], world: World) -> None:
    """drivers/iommu/iommu.c:3277: DMA-FQ written to `type` changes a DMA domain that a driver uses."""
    group = group_of(pair[0])
    domain = PagingDomain(DomainType.DMA, group.iommu, AllocFlags.NONE)
    group.set_default(domain)
    pair[0].bind("nvme")
    domain.map(IOVA, OLD, PAGE)
    domain.defer_flushes()
    assert (group.default_domain.type, world.dmas["00:03.0"].read(IOVA, 1)) == (DomainType.DMA_FQ, b"O")
    domain.unmap(IOVA, PAGE)
    assert world.dmas["00:03.0"].read(IOVA, 1) == b"O"
    domain.flush()
    assert fault_of(world.dmas["00:03.0"]) is Reason.NOT_MAPPED
    refused(errno.EINVAL, "unmanaged domains cannot", mapped(pair[0], OLD).defer_flushes)


def test_default_domains_that_linux_refuses(pair: tuple[Endpoint, Endpoint]) -> None:
    """Linux iommu_group_store_type: identity, DMA and DMA-FQ (EINVAL), and no driver is bound (EPERM)."""
    group = group_of(pair[0])
    refused(errno.EINVAL, "unmanaged is no type", group.set_default, mapped(pair[0], OLD))
    refused(errno.EINVAL, "blocked is no type", group.set_default, group.iommu.blocked)
    pair[1].bind("nvme")
    refused(errno.EPERM, "00:03.1 is bound to nvme", group.set_default, dma_domain_alloc(pair[0]))
    pair[1].unbind()
    pair[1].bind("pcieport")  # does no DMA by itself
    group.set_default(domain := dma_domain_alloc(pair[0]))
    assert group.domain is domain
    group.set_default(group.iommu.identity)


def regions(*found: tuple[int, int, RegionType]) -> list[ReservedRegion]:
    return [ReservedRegion(Span(start, last), kind) for start, last, kind in found]


def spans(domain: PagingDomain) -> list[tuple[int, int]]:
    """Mappings that lead to themselves, those that touch put together."""
    found: list[tuple[int, int]] = []
    for one in domain.mappings():
        assert one.gpa == one.span.start
        if found and found[-1][1] + 1 == one.span.start:
            found[-1] = found[-1][0], one.span.last
        else:
            found.append((one.span.start, one.span.last))
    return found


def test_direct_regions_are_mapped(world: World) -> None:
    """Whole pages; regions of two members may overlap; those of other types are left alone."""
    first = regions((0x1000, 0x2FFF, RELAXABLE), (0x8000, 0x8FFF, RegionType.RESERVED))
    second = regions((0x2000, 0x4FFF, DIRECT), (0x6800, 0x6FFF, RELAXABLE))
    endpoint, dma = world.device("00:03.0", reserved=first)
    world.device("00:03.1", reserved=second)
    group, domain = group_of(endpoint), dma_domain_alloc(endpoint)
    group.set_default(domain)
    assert spans(domain) == [(0x1000, 0x4FFF), (0x6000, 0x6FFF)]
    dma.write(0x4FF8, b"directly")
    assert world.ram[0x4FF8:0x5000] == b"directly"
    assert fault_of(dma, 0x8000) is Reason.NOT_MAPPED
    world.device("00:03.2", reserved=regions((0x0, 0x9FFF, RELAXABLE)))  # around what there is
    assert spans(domain) == [(0, 0x9FFF)]


def test_direct_region_where_something_else_is(world: World) -> None:
    endpoint, dma = world.device("00:03.0", reserved=regions((0x1000, 0x2FFF, RELAXABLE)))
    group, domain = group_of(endpoint), dma_domain_alloc(endpoint)
    domain.map(0x2000, OLD, PAGE)
    refused(errno.EEXIST, "0x2000..0x2fff is mapped to 0x200000", group.set_default, domain)
    assert (group.default_domain.type, domain.users) == (DomainType.IDENTITY, 0)
    assert dma.read(0x2000, 1) == b"\0"


def test_direct_region_must_stay(world: World) -> None:
    """Linux: such a device is never blocked, and so cannot be given to anybody."""
    mark(world)
    endpoint, dma = world.device("00:03.0", reserved=regions((0x1000, 0x1FFF, DIRECT)))
    group = group_of(endpoint)
    text = "00:03.0 has a direct-mapped region, which must stay mapped"
    refused(errno.EINVAL, text, group.claim_dma_owner, "vm")
    refused(errno.EINVAL, text, group.attach, group.iommu.blocked)
    refused(errno.EINVAL, "blocked is no type", group.set_default, group.iommu.blocked)
    assert (group.owner, dma.read(IOVA, 1)) == (None, b"I")
    relaxed, _ = world.device("00:04.0", reserved=regions((0x1000, 0x1FFF, RELAXABLE)))
    group_of(relaxed).claim_dma_owner("vm")


def test_hardware_knows_no_direct_region(world: World) -> None:
    """An IOMMU that a guest drives blocks requests whose entry is not present (VT-d 9.3), whatever the DMAR says."""
    endpoint, dma = world.device("00:03.0", reserved=regions((0x1000, 0x1FFF, DIRECT)))
    group = group_of(endpoint)
    group.set_default(domain := dma_domain_alloc(endpoint), forced=True)
    assert (group.domain, dma.read(0x1000, 1)) == (domain, b"\0")
    group.set_default(group.iommu.blocked, forced=True)
    assert fault_of(dma, 0x1000) is Reason.BLOCKED


def test_reserved_regions_of_a_group(world: World) -> None:
    first = regions((0x1000, 0x2FFF, DIRECT), (0x9000, 0x9FFF, RegionType.RESERVED))
    second = regions((0x2000, 0x4FFF, DIRECT), (0x2000, 0x2FFF, RELAXABLE), (0x5000, 0x5FFF, DIRECT))
    endpoint, _ = world.device("00:03.0", reserved=first)
    world.device("00:03.1", reserved=second)
    found = [(r.span.start, r.span.last, r.type) for r in group_of(endpoint).reserved_regions]
    assert found == [
        (0x1000, 0x4FFF, DIRECT),
        (0x2000, 0x2FFF, RELAXABLE),
        (0x5000, 0x5FFF, DIRECT),
        (0x9000, 0x9FFF, RegionType.RESERVED),
        (0xFEE0_0000, 0xFEEF_FFFF, RegionType.MSI),
    ]


# ---- ownership ------------------------------------------------------------------------------------


def test_ownership(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group, dma = group_of(pair[0]), world.dmas["00:03.1"]
    refused(errno.EINVAL, "is not owned by vm", group.release_dma_owner, "vm")
    group.claim_dma_owner("vm")
    assert (group.owner, fault_of(dma)) == ("vm", Reason.BLOCKED)
    refused(errno.EPERM, "is owned by vm", group.claim_dma_owner, "other")
    refused(errno.EINVAL, "is not owned by other", group.release_dma_owner, "other")
    refused(errno.EPERM, "is owned by vm", group.claim_dma_owner, "vm")  # also by itself: iommu_group_claim_dma_owner
    group.attach(mapped(pair[0], OLD))
    refused(errno.EBUSY, "a domain is still attached", group.release_dma_owner, "vm")
    assert (group.owner, dma.read(IOVA, 1)) == ("vm", b"O")
    group.detach()
    assert fault_of(dma) is Reason.BLOCKED  # an owner's group never falls back to the kernel's domain
    group.attach_pasid(mapped(pair[0], OLD), 1)
    refused(errno.EBUSY, "a domain is still attached", group.release_dma_owner, "vm")
    group.detach_pasid(1)
    group.release_dma_owner("vm")
    assert (group.owner, dma.read(IOVA, 1)) == (None, b"I")
    group.claim_dma_owner("other")


def test_claims_for_devices(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    """They are counted (iommu_device_claim_dma_owner); the release of the group ends all of them."""
    group = group_of(pair[0])
    refused(errno.EINVAL, "is not owned by vm", group.release_for_device, "vm")
    group.claim_for_device("vm")
    group.claim_for_device("vm")
    refused(errno.EPERM, "is owned by vm", group.claim_for_device, "other")
    refused(errno.EPERM, "is owned by vm", group.claim_dma_owner, "vm")
    refused(errno.EINVAL, "is not owned by other", group.release_for_device, "other")
    group.attach(mapped(pair[0], OLD))
    group.release_for_device("vm")  # the first of two
    assert (group.owner, world.dmas["00:03.1"].read(IOVA, 1)) == ("vm", b"O")
    refused(errno.EBUSY, "a domain is still attached", group.release_for_device, "vm")
    group.detach()
    group.release_for_device("vm")
    assert group.owner is None
    group.claim_for_device("vm")
    group.claim_for_device("vm")
    group.release_dma_owner("vm")
    assert group.owner is None
    refused(errno.EINVAL, "is not owned by vm", group.release_for_device, "vm")


def test_viability(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group = group_of(pair[0])
    pair[0].bind("vm")
    pair[1].bind("e1000")
    assert not group.viable("vm")
    refused(errno.EPERM, "not viable: in use by others: 00:03.1 (e1000)", group.claim_dma_owner, "vm")
    assert (group.owner, world.dmas["00:03.0"].read(IOVA, 1)) == (None, b"I")
    pair[1].unbind()
    assert group.viable("vm")
    group.claim_dma_owner("vm")
    refused(errno.EBUSY, "is owned by vm", pair[1].bind, "e1000")
    refused(errno.EBUSY, "is in use by vm", pair[0].bind, "e1000")
    pair[1].bind("vm")
    assert pair[1].driver == "vm"


def test_no_claim_under_a_domain(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    """Somebody who does not own the group uses it (Linux: EBUSY), and drivers must not trust the kernel's domain."""
    group = group_of(pair[0])
    group.attach(mapped(pair[0], OLD))
    refused(errno.EBUSY, "a domain is already attached", group.claim_dma_owner, "vm")
    refused(errno.EBUSY, "not the kernel's", pair[1].bind, "e1000")
    group.detach()
    group.attach_pasid(mapped(pair[0], OLD), 1)
    refused(errno.EBUSY, "a domain is already attached", group.claim_dma_owner, "vm")
    group.detach_pasid(1)
    pair[1].bind("e1000")
    pair[1].unbind()
    group.claim_dma_owner("vm")


# ---- members that come and go -------------------------------------------------------------------


def test_hot_add_takes_over_the_domains(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group = group_of(pair[0])
    group.claim_dma_owner("vm")
    group.attach(mapped(pair[0], OLD))
    group.attach_pasid(mapped(pair[0], NEW), 9)
    late, dma = world.device("00:03.2")
    assert late.group is group
    assert (dma.read(IOVA, 1), dma.with_pasid(9).read(IOVA, 1)) == (b"O", b"N")
    assert fault_of(dma, OLD) is Reason.NOT_MAPPED
    refused(errno.EBUSY, "is owned by vm", late.bind, "e1000")


def test_hot_add_into_a_blocked_group(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group_of(pair[0]).claim_dma_owner("vm")
    assert fault_of(world.device("00:03.2")[1]) is Reason.BLOCKED


def test_hot_add_of_what_does_not_fit(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group = group_of(pair[0])
    group.claim_dma_owner("vm")
    dma = Dma(world.memory)
    dma.bus_master = True
    function = world.function("00:03.2")
    with pytest.raises(IommuError) as caught:
        world.system.add(function, dma.requester, reserved=regions((0x1000, 0x1FFF, DIRECT)))
    assert caught.value.errno == errno.EINVAL
    assert fault_of(dma) is Reason.BLOCKED
    assert [e.name for e in world.system.endpoints] == [e.name for e in group.endpoints] == ["00:03.0", "00:03.1"]
    assert world.plug(function).group is group  # without the region


def test_direct_region_outside_of_the_aperture(world: World) -> None:
    outside = regions((1 << 50, (1 << 50) + PAGE - 1, DIRECT))
    function = world.function("00:03.0")
    world.plug(function, reserved=outside)  # identity at first: nothing has to be mapped
    group = world.system.groups[0]
    refused(errno.ERANGE, "outside of the aperture", group.set_default, dma_domain_alloc(group.endpoints[0]))
    assert group.default_domain.type is DomainType.IDENTITY


def test_removal(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group, dmas = group_of(pair[0]), list(world.dmas.values())
    domain, other = mapped(pair[0], OLD), mapped(pair[0], NEW)
    group.attach(domain)
    group.attach_pasid(other, 4)
    world.system.remove(pair[0])
    assert (pair[0].group, group.endpoints, world.system.groups) == (None, [pair[1]], [group])
    assert (fault_of(dmas[0]), fault_of(dmas[0].with_pasid(4))) == (Reason.BLOCKED, Reason.PASID)
    assert (dmas[1].read(IOVA, 1), dmas[1].with_pasid(4).read(IOVA, 1)) == (b"O", b"N")
    assert (domain.users, other.users) == (1, 1)
    with pytest.raises(ValueError):
        world.system.remove(pair[0])
    world.system.remove(pair[1])
    assert (world.system.groups, domain.users, other.users, group.pasids) == ([], 0, 0, {})
    assert [fault_of(dma) for dma in dmas] == [Reason.BLOCKED] * 2
    refused(errno.ENODEV, "has no devices left", group.attach, domain)
    refused(errno.ENODEV, "has no devices left", group.claim_dma_owner, "vm")


def test_removal_under_an_owner(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    """The owner of a group whose devices are gone can still release it."""
    group = group_of(pair[0])
    group.claim_dma_owner("vm")
    domain = mapped(pair[0], OLD)
    group.attach(domain)
    group.attach_pasid(domain, 4)
    for endpoint in pair:
        world.system.remove(endpoint)
    assert not world.system.groups
    group.detach_pasid(4)
    group.detach()
    group.release_dma_owner("vm")
    assert (domain.users, group.owner) == (0, None)
    again = world.plug(pair[0].source)
    assert (group_of(again).number, group_of(again).owner) == (1, None)


def test_removal_while_it_works(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    """After remove() nothing of the device gets through, though it tries all the time."""
    writes = [0]
    dma = world.dmas["00:03.1"]

    def work() -> None:
        try:
            dma.write(OLD, b"\xee" * 8)
            writes[0] += 1
        except DmaFault as fault:
            assert fault.reason is Reason.BLOCKED

    with meanwhile(work):
        until(lambda: writes[0], "a write of the device")
        world.system.remove(pair[1])
        world.ram[OLD : OLD + 8] = bytes(8)
        for _ in range(1000):
            assert world.ram[OLD : OLD + 8] == bytes(8)
    assert world.ram[OLD : OLD + 8] == bytes(8)


def test_names_for_people(world: World, pair: tuple[Endpoint, Endpoint]) -> None:
    group: Group = group_of(pair[0])
    domain: Domain = group.domain
    assert (str(group), repr(group)) == ("group 0", "<group 0 of iommu0: 00:03.0, 00:03.1>")
    assert repr(domain) == "<identity domain identity>"
    assert repr(pair[0]) == "<endpoint 00:03.0, 0000:00:03.0>"
    assert repr(group.iommu) == "<Intel VT-d iommu0>"


def test_a_device_that_moves_out_of_the_iommus_reach_is_not_translated(world: World) -> None:
    function = world.function("00:03.0")
    endpoint = world.plug(function)
    dma = world.dmas[endpoint.name]
    group_of(endpoint).attach(group_of(endpoint).iommu.blocked)
    world.system.remove(endpoint)
    again = world.system.add(function, dma.requester, bypass=True)
    assert again.group is None
    dma.endpoint = again
    dma.write(0x1000, b"x")


def test_a_driver_and_an_owner_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two comes first; the other one is refused."""
    endpoint, _ = world.device("00:03.0")
    group, found = group_of(endpoint), list[int | None]()

    def bind() -> None:
        try:
            endpoint.bind("driver")
        except IommuError as error:
            found.append(error.errno)

    thread = threading.Thread(target=bind, daemon=True)
    plain = group.viable

    def viable(owner: object) -> bool:
        answer = plain(owner)
        thread.start()
        thread.join(0.2)
        return answer

    monkeypatch.setattr(group, "viable", viable)
    group.claim_dma_owner("vfio")
    thread.join(patience(10))
    assert (group.owner, endpoint.driver, found) == ("vfio", None, [errno.EBUSY])


def test_nobody_is_no_owner(world: World) -> None:
    """Linux iommu_group_claim_dma_owner."""
    endpoint, _ = world.device("00:03.0")
    group = group_of(endpoint)
    refused(errno.EINVAL, "nobody", group.claim_dma_owner, None)
    assert group.domain is group.default_domain
