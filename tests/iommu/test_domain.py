"""Domains of each type: their allocation, what they refuse, invalidation of IOTLBs, dirty tracking."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.iommu.tables import Guest, build, make
from tests.iommu.world import RAM, RW, World, group_of, iommu
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, IommuError, Reason
from vmodel.iommu import (
    Coverage,
    Endpoint,
    dma_domain_alloc,
    nested_domain_alloc,
    paging_domain_alloc,
    sva_domain_alloc,
    walked_domain_alloc,
)
from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.domain import AllocFlags, BlockedDomain, DomainType, IdentityDomain, Mapping, PagingDomain
from vmodel.iommu.group import can_attach
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.patience import patience
from vmodel.span import PAGE, GiB, KiB, MiB, Span

IOVA, GPA = 0x1000_0000, 0x20_0000
#: 4-level tables are here.
TABLES = 0x1000


class Tables(Guest):
    """Where build() writes: the world's memory, `offset` further on."""

    def __init__(self, world: World, offset: int = 0) -> None:
        self.world, self.offset = world, offset

    def put(self, gpa: int, *values: int) -> None:
        self.world.put(gpa + self.offset, *values)


def with_one(**capabilities: Any) -> tuple[World, Endpoint, Dma]:
    """A world of one device behind a VT-d with these capabilities."""
    world = World(iommu(**capabilities))
    endpoint, dma = world.device("00:03.0")
    return world, endpoint, dma


@pytest.fixture
def one(world: World) -> tuple[World, Endpoint, Dma]:
    endpoint, dma = world.device("00:03.0")
    world.ram[GPA : GPA + 4] = b"here"
    return world, endpoint, dma


def refused(code: int, call: Any, *args: Any) -> str:
    """`call` fails with this errno; the text."""
    with pytest.raises(IommuError) as caught:
        call(*args)
    assert caught.value.errno == code, caught.value
    return str(caught.value)


def fault_of(dma: Dma, iova: int = IOVA, access: Access = Access.READ) -> DmaFault:
    with pytest.raises(DmaFault) as caught:
        dma.read(iova, 4) if access is Access.READ else dma.write(iova, bytes(4))
    return caught.value


@pytest.fixture(autouse=True)
def _no_timers_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(1)
            assert not thread.is_alive()


# ---- types and allocation ------------------------------------------------------------------------


def test_plain_domains() -> None:
    identity, blocked = IdentityDomain(), BlockedDomain()
    assert (identity.iova_to_phys(0x1234_5678_9ABC), blocked.iova_to_phys(0x1000)) == (0x1234_5678_9ABC, None)
    assert not any(domain.type.is_paging for domain in (identity, blocked))


def test_types_of_paging_domains(one: tuple[World, Endpoint, Dma]) -> None:
    _, endpoint, _ = one
    user, kernel = paging_domain_alloc(endpoint), dma_domain_alloc(endpoint)
    assert (user.type, user.deferred, user.type.is_paging) == (DomainType.UNMANAGED, False, True)
    assert (kernel.type, kernel.deferred, kernel.tracks) == (DomainType.DMA_FQ, True, True)
    world, strict, _ = with_one(strict=True, dirty_tracking=False)
    kernel = dma_domain_alloc(strict)
    assert (kernel.type, kernel.deferred, kernel.tracks) == (DomainType.DMA, False, False)
    world.close()


@pytest.mark.parametrize(
    ("flag", "lack"),
    [
        (AllocFlags.NEST_PARENT, {"nesting": False}),
        (AllocFlags.DIRTY_TRACKING, {"dirty_tracking": False}),
        (AllocFlags.PASID, {"pasid_bits": 0}),
        (AllocFlags.ENFORCE_SNOOP, {"enforce_snoop": False}),
    ],
)
def test_flags_need_capabilities(one: tuple[World, Endpoint, Dma], flag: AllocFlags, lack: dict[str, Any]) -> None:
    assert paging_domain_alloc(one[1], flag).flags == flag
    world, endpoint, _ = with_one(**lack)
    assert str(flag.name) in refused(errno.EOPNOTSUPP, paging_domain_alloc, endpoint, flag)
    paging_domain_alloc(endpoint, ~flag & (AllocFlags.NEST_PARENT | AllocFlags.DIRTY_TRACKING | AllocFlags.PASID))
    world.close()


def test_no_group_no_domain(world: World) -> None:
    endpoint = world.plug(world.function("00:03.0"), bypass=True)
    table = make(TableFormat.X86, 4)
    assert "it bypasses the IOMMUs" in refused(errno.ENODEV, paging_domain_alloc, endpoint)
    refused(errno.ENODEV, dma_domain_alloc, endpoint)
    refused(errno.ENODEV, sva_domain_alloc, endpoint, world.memory, table)
    refused(errno.ENODEV, walked_domain_alloc, endpoint, world.memory, table)
    assert can_attach(IdentityDomain(), endpoint) == ("no IOMMU isolates 00:03.0: it bypasses the IOMMUs")


# ---- map and unmap ---------------------------------------------------------------------------------


#: Per mapping: the errno by generic_pt/iommu_pt.h, and by drivers/iommu/iommu.c with io-pgtable-arm.c.
@pytest.mark.parametrize(
    ("iova", "gpa", "size", "access", "generic", "other"),
    [
        (IOVA + 1, GPA, PAGE, RW, errno.ENXIO, errno.EINVAL),  # :955; iommu.c:2635
        (IOVA, GPA + 0x800, PAGE, RW, errno.ENXIO, errno.EINVAL),
        (IOVA, GPA, PAGE - 1, RW, errno.ENXIO, errno.EINVAL),
        (IOVA, GPA, 0, RW, errno.EINVAL, errno.EINVAL),  # :121; Linux does nothing for SMMUv3, and succeeds
        (IOVA, GPA, PAGE, Access(0), errno.EINVAL, errno.EINVAL),  # :934; io-pgtable-arm.c:603
        (IOVA, 1 << 60, PAGE, Access(0), errno.EINVAL, errno.EINVAL),
        (1 << 48, GPA, PAGE, RW, errno.ERANGE, errno.ERANGE),
        ((1 << 48) - PAGE, GPA, 2 * PAGE, RW, errno.ERANGE, errno.ERANGE),
        (IOVA, 1 << 52, PAGE, RW, errno.ERANGE, errno.ERANGE),  # :941; io-pgtable-arm.c:600
        (IOVA, (1 << 52) - PAGE, 2 * PAGE, RW, errno.ERANGE, errno.ERANGE),
        (IOVA + 1, 1 << 52, PAGE, RW, errno.ERANGE, errno.EINVAL),  # the order of the checks
        (-PAGE & (1 << 64) - 1, GPA, 2 * PAGE, RW, errno.EOVERFLOW, errno.ERANGE),  # :124
        (1 << 64, GPA, PAGE, RW, errno.EOVERFLOW, errno.ERANGE),
        (IOVA, GPA, 1 << 64, RW, errno.EOVERFLOW, errno.ERANGE),
        (-PAGE, GPA, PAGE, RW, errno.ERANGE, errno.ERANGE),
        (IOVA + 0x10000, GPA, PAGE, RW, errno.EADDRINUSE, errno.EEXIST),  # :548; io-pgtable-arm.c:403
        (IOVA + 0xF000, GPA, 2 * PAGE, RW, errno.EADDRINUSE, errno.EEXIST),
    ],
)
def test_map_errors(iova: int, gpa: int, size: int, access: Access, generic: int, other: int) -> None:
    for kind, code in (("vt-d", generic), ("amd-vi", generic), ("smmu-v3", other)):
        world = World(iommu(kind, output_bits=52))
        domain = paging_domain_alloc(world.device("00:03.0")[0])
        domain.map(IOVA + 0x10000, GPA, PAGE)
        assert f"{iova:#x}" in refused(code, domain.map, iova, gpa, size, access)
        assert list(domain.mappings()) == [Mapping(Span.sized(IOVA + 0x10000, PAGE), GPA, RW)]
        world.close()


def test_map_limit() -> None:
    world, endpoint, _ = with_one(max_mappings=2)
    domain = paging_domain_alloc(endpoint)
    domain.map(0, 0, PAGE)
    domain.map(0x10000, 0, PAGE)
    assert "too many mappings" in refused(errno.ENOSPC, domain.map, 0x20000, 0, PAGE)
    domain.unmap(0, PAGE)
    domain.map(0x20000, 0, PAGE)
    assert len(domain) == 2
    world.close()


def test_aperture() -> None:
    world, endpoint, dma = with_one(aperture=Span(IOVA, IOVA + 0xFFFF))
    domain = paging_domain_alloc(endpoint)
    group_of(endpoint).attach(domain)
    for iova in (IOVA - PAGE, IOVA + 0x10000):
        refused(errno.ERANGE, domain.map, iova, GPA, PAGE)
    domain.map(IOVA, GPA, 0x10000)
    assert dma.read(IOVA + 0xFFFC, 4) == bytes(4)
    assert fault_of(dma, IOVA + 0x10000).reason in (Reason.NOT_MAPPED, Reason.INPUT_WIDTH)
    world.close()


def test_access_and_offsets(one: tuple[World, Endpoint, Dma]) -> None:
    world, endpoint, dma = one
    domain = paging_domain_alloc(endpoint)
    group_of(endpoint).attach(domain)
    domain.map(IOVA, GPA, PAGE, Access.READ)
    domain.map(IOVA + PAGE, GPA + 0x5000, PAGE, Access.WRITE)
    assert dma.read(IOVA, 4) == b"here"
    assert fault_of(dma, IOVA, Access.WRITE).reason is Reason.PERMISSION
    assert fault_of(dma, IOVA + PAGE).reason is Reason.PERMISSION
    dma.write(IOVA + PAGE + 8, b"there")
    assert world.ram[GPA + 0x5008 : GPA + 0x500D] == b"there"
    assert [domain.iova_to_phys(i) for i in (IOVA + 7, IOVA + PAGE + 7, IOVA - 1, IOVA + 2 * PAGE)] == [
        GPA + 7,
        GPA + 0x5007,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("vt-d", errno.EADDRINUSE),
        ("amd-vi", errno.EADDRINUSE),
        ("smmu-v3", errno.EEXIST),
        ("virtio-iommu", errno.EINVAL),
    ],
)
def test_what_overlaps(kind: str, code: int) -> None:
    """Linux 7.3: generic_pt/iommu_pt.h has EADDRINUSE, io-pgtable-arm.c EEXIST; virtio-iommu's device answers INVAL."""
    world = World(iommu(kind))
    domain = paging_domain_alloc(world.device("00:03.0")[0])
    domain.map(IOVA, GPA, 2 * PAGE)
    assert "overlaps a mapping" in refused(code, domain.map, IOVA + PAGE, 0, PAGE)
    world.close()


@pytest.mark.parametrize("flag", [AllocFlags.NEST_PARENT, AllocFlags.DIRTY_TRACKING, AllocFlags.PASID])
def test_flags_of_a_driver_without_domain_alloc_paging_flags(flag: AllocFlags) -> None:
    """Linux __iommu_paging_domain_alloc_flags; drivers/iommu/virtio-iommu.c, viommu_ops."""
    world = World(iommu("virtio-iommu"))
    endpoint, _ = world.device("00:03.0")
    refused(errno.EOPNOTSUPP, paging_domain_alloc, endpoint, flag)
    world.close()


@pytest.mark.parametrize("kind", ["vt-d", "smmu-v3"])
def test_a_refusal_says_what_is_wrong(kind: str) -> None:
    world = World(iommu(kind))
    domain = paging_domain_alloc(world.device("00:03.0")[0])
    assert "no bytes" in refused(errno.EINVAL, domain.map, IOVA, GPA, 0)
    assert "no access" in refused(errno.EINVAL, domain.map, IOVA, GPA, PAGE, Access(0))
    assert "not whole pages" in refused(errno.ENXIO if kind == "vt-d" else errno.EINVAL, domain.map, IOVA, GPA, 1)
    domain.map(IOVA, GPA, 2 * PAGE)
    assert "a mapping is only partly in it" in refused(errno.ERANGE, domain.clear, Span.sized(IOVA, PAGE))
    world.close()


def test_flags_of_amd_vi() -> None:
    """Linux amd_iommu_domain_alloc_paging_flags: PASID goes with no other flag."""
    world = World(iommu("amd-vi"))
    endpoint, _ = world.device("00:03.0")
    parent, dirty, pasid = AllocFlags.NEST_PARENT, AllocFlags.DIRTY_TRACKING, AllocFlags.PASID
    for flags in (parent | pasid, dirty | pasid, parent | dirty | pasid):
        assert "a domain for PASIDs cannot be" in refused(errno.EOPNOTSUPP, paging_domain_alloc, endpoint, flags)
    for flags in (AllocFlags.NONE, parent, dirty, parent | dirty, pasid, pasid | AllocFlags.ENFORCE_SNOOP):
        paging_domain_alloc(endpoint, flags)
    world.close()


def test_parents_of_smmu_v3() -> None:
    """Linux arm_smmu_domain_alloc_paging_flags: NEST_PARENT goes with no other flag."""
    world = World(iommu("smmu-v3"))
    endpoint, _ = world.device("00:03.0")
    parent = AllocFlags.NEST_PARENT
    for flags in (parent | AllocFlags.DIRTY_TRACKING, parent | AllocFlags.PASID):
        assert "neither tracks writes nor" in refused(errno.EOPNOTSUPP, paging_domain_alloc, endpoint, flags)
    for flags in (parent, AllocFlags.DIRTY_TRACKING | AllocFlags.PASID):
        paging_domain_alloc(endpoint, flags)
    world.close()


def test_unmap(one: tuple[World, Endpoint, Dma]) -> None:
    """Linux generic_pt, __unmap_range: up to the first hole; a range that ends in a large entry takes all of it, and
    the length that is returned is larger; one that begins within a large entry takes nothing.
    """
    domain = paging_domain_alloc(one[1])
    domain.map(IOVA, GPA, 4 * PAGE)
    domain.map(IOVA + 6 * PAGE, GPA, PAGE)
    assert domain.unmap(IOVA, 8 * PAGE) == 4 * PAGE
    assert domain.unmap(IOVA, 8 * PAGE) == 0
    assert [m.span.start for m in domain.mappings()] == [IOVA + 6 * PAGE]
    domain.map(1 * GiB, 0, 2 * MiB)
    assert domain.unmap(1 * GiB + PAGE, PAGE) == 0  # inside of one page of 2 MiB
    assert domain.iova_to_phys(1 * GiB) == 0
    assert domain.unmap(1 * GiB, PAGE) == 2 * MiB
    assert domain.iova_to_phys(1 * GiB + MiB) is None
    domain.map(1 * GiB, 0, 6 * MiB)
    assert domain.unmap(1 * GiB, 2 * MiB + PAGE) == 4 * MiB
    assert [(m.span.start, m.span.size) for m in domain.mappings()][-1] == (1 * GiB + 4 * MiB, 2 * MiB)
    assert domain.unmap(1 * GiB + 4 * MiB, 2 * MiB) == 2 * MiB
    domain.map(1 * GiB, PAGE, 2 * MiB)  # aligned otherwise: 512 pages
    assert domain.unmap(1 * GiB + PAGE, PAGE) == PAGE
    assert (domain.iova_to_phys(1 * GiB), domain.iova_to_phys(1 * GiB + PAGE)) == (PAGE, None)
    for iova, size in ((IOVA + 1, PAGE), (IOVA, 100)):
        refused(errno.EINVAL, domain.unmap, iova, size)
    refused(errno.ERANGE, domain.unmap, 1 << 64, PAGE)


# ---- can_attach -------------------------------------------------------------------------------------

ALL = AllocFlags.NEST_PARENT | AllocFlags.DIRTY_TRACKING | AllocFlags.PASID | AllocFlags.ENFORCE_SNOOP


@pytest.mark.parametrize(
    ("lack", "reason"),
    [
        ({"page_sizes": frozenset((4 * KiB, 2 * MiB))}, "page sizes: it has some that second lacks"),
        ({"input_bits": 39}, "aperture: its 0x0..0xffffffffffff is more than second's"),
        ({"aperture": Span(PAGE, (1 << 48) - 1)}, "aperture: its 0x0..0xffffffffffff is more than second's"),
        ({"output_bits": 46}, "output width: its 52 bits are more than second's"),
        ({"coherent": False}, "coherency: second's walks do not snoop the CPU's caches"),
        ({"enforce_snoop": False}, "snoop: second cannot make DMA snoop"),
        ({"dirty_tracking": False}, "dirty tracking: second has none"),
        ({"nesting": False}, "nesting: second has none"),
    ],
)
def test_can_attach(lack: dict[str, Any], reason: str) -> None:
    """A domain of one IOMMU, and another one that lacks one thing."""
    world, first, second, dma = two({}, lack)
    domain, group = paging_domain_alloc(first, ALL), group_of(second)
    assert can_attach(domain, first) is None
    assert can_attach(domain, second) == reason
    old = paging_domain_alloc(second)
    old.map(IOVA, GPA, PAGE)
    group.attach(old)
    assert refused(errno.EINVAL, group.replace, domain) == f"group 1, {second.name}: {reason} (EINVAL)"
    dma_domain = PagingDomain(DomainType.DMA, first.iommu, ALL)
    assert reason in refused(errno.EINVAL, group.set_default, dma_domain)
    assert (group.domain, dma.read(IOVA, 1), domain.users) == (old, b"\0", 0)
    world.close()


def two(one: dict[str, Any], other: dict[str, Any], kinds: tuple[str, str] = ("vt-d", "vt-d")) -> Any:
    """Two devices, each behind an IOMMU of its own; and the second one's DMA."""
    iommus = [
        iommu(kind, name, **can) for kind, name, can in zip(kinds, ("first", "second"), (one, other), strict=True)
    ]
    iommus[0].covers = [Coverage.segment(1)]
    world = World(*iommus)
    world.topology.add_root(1, 0)
    endpoint, _ = world.device("0001:00:03.0")
    return world, endpoint, *world.device("00:03.0")


def test_can_attach_what_nobody_asked_for() -> None:
    """Without the flags the other IOMMU need not have what they are for."""
    world, first, second, _ = two({}, {"nesting": False, "dirty_tracking": False, "enforce_snoop": False})
    assert can_attach(paging_domain_alloc(first), second) is None
    world.close()


def test_can_attach_format() -> None:
    world, first, second, _ = two({}, {}, ("vt-d", "amd-vi"))
    text = "format: it has tables of Intel VT-d, second is AMD-Vi"
    assert can_attach(paging_domain_alloc(first), second) == text
    table = make(TableFormat.X86, 4)
    assert can_attach(walked_domain_alloc(first, world.memory, table), second) == text  # though it could walk it
    assert can_attach(IdentityDomain(), second) is None
    world.close()


def test_can_attach_pasid(one: tuple[World, Endpoint, Dma]) -> None:
    world, endpoint, _ = one
    domain = paging_domain_alloc(endpoint)
    assert can_attach(domain, endpoint, 1) is None
    assert can_attach(domain, endpoint, 0) == "PASID 0 is not from 1 to 1048575"
    endpoint.has_ats = True
    sva = sva_domain_alloc(endpoint, world.memory, make(TableFormat.X86, 4))
    assert can_attach(sva, endpoint) == "an SVA domain is for a PASID"
    assert can_attach(sva, endpoint, 1) is None


@pytest.mark.parametrize(
    ("lack", "reason"),
    [
        ({"pasid_bits": 0}, "second has no PASIDs"),
        ({"pasid_bits": 2}, "PASID 4 is not from 1 to 3"),
        ({"page_requests": False}, None),
        ({"coherent": False}, "coherency: walks do not snoop the CPU's caches"),
    ],
)
def test_can_attach_sva(lack: dict[str, Any], reason: str | None) -> None:
    world, first, second, _ = two({}, lack)
    first.has_ats = second.has_ats = True
    domain = sva_domain_alloc(first, world.memory, make(TableFormat.X86, 4))
    assert can_attach(domain, second, 4) == reason
    world.close()


def test_can_attach_nested() -> None:
    world, first, second, _ = two({}, {"output_bits": 46})
    parent = paging_domain_alloc(first, AllocFlags.NEST_PARENT)
    nested = nested_domain_alloc(first, parent, world.memory, make(TableFormat.X86, 4))
    assert can_attach(nested, first) is None
    assert can_attach(nested, second) == "output width: its 52 bits are more than second's"
    world.close()


# ---- flushes ------------------------------------------------------------------------------------------


def attached(endpoint: Endpoint, domain: PagingDomain, pages: int = 8) -> PagingDomain:
    group_of(endpoint).attach(domain)
    for n in range(pages):
        domain.map(IOVA + n * PAGE, GPA + n * PAGE, PAGE)
    return domain


def readable(dma: Dma, pages: int = 8) -> list[int]:
    """Which pages can be read."""
    found = []
    for n in range(pages):
        try:
            dma.read(IOVA + n * PAGE, 1)
            found.append(n)
        except DmaFault as fault:
            assert fault.reason is Reason.NOT_MAPPED
    return found


def test_strict(one: tuple[World, Endpoint, Dma]) -> None:
    _, endpoint, dma = one
    domain = attached(endpoint, paging_domain_alloc(endpoint))
    assert readable(dma) == list(range(8))
    assert domain.unmap(IOVA, 2 * PAGE) == 2 * PAGE
    assert readable(dma) == list(range(2, 8))
    assert (domain.flushes, domain.waiting) == (1, [])
    domain.unmap(IOVA, PAGE)  # nothing there
    assert domain.flushes == 1


def test_deferred_by_count() -> None:
    world, endpoint, dma = with_one(flush_unmaps=3, flush_ms=1e6)
    domain = attached(endpoint, dma_domain_alloc(endpoint))
    assert readable(dma) == list(range(8))
    for n in range(2):
        assert domain.unmap(IOVA + n * PAGE, PAGE) == PAGE
        assert domain.iova_to_phys(IOVA + n * PAGE) is None  # gone from the tables ...
    assert readable(dma) == list(range(8))  # ... but not from the IOTLB
    assert domain.waiting == [Span.sized(IOVA, PAGE), Span.sized(IOVA + PAGE, PAGE)]
    domain.unmap(IOVA, PAGE)  # nothing there: it does not count
    assert (domain.flushes, readable(dma)) == (0, list(range(8)))
    domain.unmap(IOVA + 2 * PAGE, PAGE)
    assert (domain.flushes, domain.waiting, readable(dma)) == (1, [], list(range(3, 8)))
    world.close()


def test_deferred_without_a_thread_for_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would flush it later: it is flushed now."""
    world, endpoint, dma = with_one(flush_unmaps=3, flush_ms=1e6)
    domain = dma_domain_alloc(endpoint)
    group_of(endpoint).set_default(domain)
    domain.map(IOVA, PAGE, PAGE)
    dma.read(IOVA, 1)

    def fails(_: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", fails)
    domain.unmap(IOVA, PAGE)
    assert domain.waiting == []
    with pytest.raises(DmaFault):
        dma.read(IOVA, 1)
    world.close()


def test_deferred_only_what_an_iotlb_has() -> None:
    world, endpoint, dma = with_one(flush_unmaps=3, flush_ms=1e6)
    domain = attached(endpoint, dma_domain_alloc(endpoint))
    dma.read(IOVA, 1)
    domain.unmap(IOVA, 2 * PAGE)
    assert readable(dma, 2) == [0]  # the other one was never walked
    world.close()


def test_deferred_by_time() -> None:
    world, endpoint, dma = with_one(flush_ms=150.0)
    domain = attached(endpoint, dma_domain_alloc(endpoint))
    readable(dma)
    began = time.monotonic()
    domain.unmap(IOVA, PAGE)
    early = readable(dma)
    assert time.monotonic() - began > 0.14 or early == list(range(8))
    while domain.waiting and time.monotonic() < began + patience(5):
        time.sleep(0.005)
    took = time.monotonic() - began
    while not domain.flushes and time.monotonic() < began + patience(5):
        time.sleep(0.005)
    assert 0.14 < took < patience(5)
    assert (domain.flushes, readable(dma)) == (1, list(range(1, 8)))
    domain.unmap(IOVA + PAGE, PAGE)  # the timer starts again
    assert domain.waiting
    domain.flush()
    assert (domain.flushes, readable(dma)) == (2, list(range(2, 8)))
    time.sleep(0.2)
    assert domain.flushes == 2  # that flush has taken the timer with it
    world.close()


@pytest.mark.parametrize("pasid", [None, 3])
def test_closing_flushes(pasid: int | None) -> None:
    world, endpoint, _ = with_one(flush_ms=1e6)
    domain = dma_domain_alloc(endpoint)
    if pasid is None:
        group_of(endpoint).attach(domain)
    else:
        group_of(endpoint).attach_pasid(domain, pasid)
    domain.map(IOVA, GPA, PAGE)
    domain.unmap(IOVA, PAGE)
    assert domain.waiting
    world.close()
    assert (domain.waiting, domain.flushes) == ([], 1)


def test_gather(one: tuple[World, Endpoint, Dma]) -> None:
    _, endpoint, dma = one
    domain = attached(endpoint, paging_domain_alloc(endpoint))
    assert readable(dma) == list(range(8))
    with domain.gather() as gather:
        assert gather.unmap(IOVA + 5 * PAGE, PAGE) == PAGE
        assert gather.unmap(IOVA + PAGE, 2 * PAGE) == 2 * PAGE
        assert gather.unmap(IOVA + PAGE, PAGE) == 0
        assert domain.iova_to_phys(IOVA + PAGE) is None
        assert (domain.flushes, readable(dma)) == (0, list(range(8)))
    assert (domain.flushes, readable(dma)) == (1, [0, 3, 4, 6, 7])
    with domain.gather():
        pass
    assert domain.flushes == 1  # nothing to flush
    with pytest.raises(KeyError), domain.gather() as gather:
        gather.unmap(IOVA, PAGE)
        raise KeyError
    assert (domain.flushes, readable(dma)) == (2, [3, 4, 6, 7])


# ---- dirty tracking -------------------------------------------------------------------------------------


def test_dirty(one: tuple[World, Endpoint, Dma]) -> None:
    _, endpoint, dma = one
    domain = attached(endpoint, paging_domain_alloc(endpoint, AllocFlags.DIRTY_TRACKING), 64)
    whole = Span.sized(IOVA, 64 * PAGE)
    refused(errno.EINVAL, domain.read_dirty, whole)  # it is off

    def dirty(span: Span = whole, page: int = PAGE, clear: bool = True) -> int:
        return int.from_bytes(domain.read_dirty(span, page, clear=clear), "little")

    dma.write(IOVA, b"before")
    domain.set_dirty_tracking(True)
    assert dirty() == 0
    dma.read(IOVA + PAGE, 4)
    dma.write(IOVA + 3 * PAGE - 2, b"over")  # two pages
    dma.write(IOVA + 63 * PAGE, b"last")
    dma.fetch_add(IOVA + 9 * PAGE, 8, 1)
    assert dirty(clear=False) == 1 << 2 | 1 << 3 | 1 << 9 | 1 << 63
    assert dirty(Span.sized(IOVA + 2 * PAGE, 2 * PAGE)) == 0b11  # only this range is cleared
    domain.set_dirty_tracking(True)  # on already: the log is kept
    assert dirty(page=8 * PAGE) == 1 << 1 | 1 << 7
    assert dirty() == 0
    dma.write(IOVA, b"again")
    domain.set_dirty_tracking(False)
    refused(errno.EINVAL, domain.read_dirty, whole)
    domain.set_dirty_tracking(True)
    assert dirty() == 0
    refused(errno.EINVAL, domain.read_dirty, Span(IOVA, IOVA + 100))
    refused(errno.EINVAL, domain.read_dirty, whole, 3 * PAGE)


def test_dirty_by_entry(one: tuple[World, Endpoint, Dma]) -> None:
    """An entry has one dirty bit, whatever its size (Linux generic_pt, record_dirty): 2 MiB are 512 dirty pages."""
    _, endpoint, dma = one
    domain = paging_domain_alloc(endpoint, AllocFlags.DIRTY_TRACKING)
    group_of(endpoint).attach(domain)
    domain.map(4 * MiB, 2 * MiB, 2 * MiB + PAGE)
    domain.map(8 * MiB, PAGE, 2 * MiB)  # aligned otherwise: entries of 4 KiB
    domain.set_dirty_tracking(True)
    dma.write(5 * MiB, b"x")
    assert domain.read_dirty(Span.sized(4 * MiB, PAGE), clear=False) == b"\1" + bytes(7)
    assert int.from_bytes(domain.read_dirty(Span.sized(4 * MiB, 4 * MiB)), "little") == (1 << 512) - 1
    dma.write(6 * MiB - 1, b"xx")
    dma.write(8 * MiB + 9 * PAGE, b"x")
    assert int.from_bytes(domain.read_dirty(Span.sized(4 * MiB, 2 * MiB + PAGE)), "little") == (1 << 513) - 1
    assert int.from_bytes(domain.read_dirty(Span.sized(8 * MiB, 2 * MiB)), "little") == 1 << 9


def test_no_dirty_tracking(one: tuple[World, Endpoint, Dma]) -> None:
    domain = paging_domain_alloc(one[1])
    refused(errno.EOPNOTSUPP, domain.set_dirty_tracking, True)
    assert not domain.tracking


# ---- tables of guests ---------------------------------------------------------------------------------


def test_sva(one: tuple[World, Endpoint, Dma]) -> None:
    """A process's table: 4 KiB page, for one PASID, changed by the CPU and then flushed."""
    world, endpoint, dma = one
    table = make(TableFormat.X86, 4, root=TABLES)
    slots = build(Tables(world), table, IOVA, GPA)
    endpoint.has_ats = True
    domain = sva_domain_alloc(endpoint, world.memory, table)
    assert domain.type is DomainType.SVA
    group = group_of(endpoint)
    assert "is for a PASID" in refused(errno.EINVAL, group.attach, domain)
    group.attach_pasid(domain, 5)
    process = dma.with_pasid(5)
    assert (process.read(IOVA, 4), domain.iova_to_phys(IOVA + 3)) == (b"here", GPA + 3)
    fault = fault_of(process, IOVA + PAGE)
    assert (fault.reason, fault.level, fault.pasid) == (Reason.NOT_MAPPED, 1, 5)
    assert fault_of(dma, RAM).reason is Reason.NO_WINDOW  # without the PASID it is still identity
    world.put(slots[-1], 0)
    assert process.read(IOVA, 4) == b"here"  # an IOTLB may have it
    domain.flush(Span.sized(IOVA + PAGE, PAGE))
    assert process.read(IOVA, 4) == b"here"
    domain.flush(Span.sized(IOVA, PAGE))
    assert fault_of(process).reason is Reason.NOT_MAPPED


@pytest.mark.parametrize("kind", ["vt-d", "amd-vi", "smmu-v3"])
def test_nested(kind: str) -> None:
    """Stage 1 of the guest's, whose tables and pages are where stage 2 leads."""
    world = World(iommu(kind))
    endpoint, dma = world.device("00:03.0")
    parent = paging_domain_alloc(endpoint, AllocFlags.NEST_PARENT)
    parent.map(0, MiB, MiB)  # the guest's first MiB
    format = TableFormat.ARM_S1 if kind == "smmu-v3" else TableFormat.X86
    table = make(format, 4, root=TABLES)
    build(Tables(world, MiB), table, IOVA, 0x8000)
    build(Tables(world, MiB), table, IOVA + PAGE, 4 * MiB)
    world.ram[MiB + 0x8000 : MiB + 0x8004] = b"nest"
    domain = nested_domain_alloc(endpoint, parent, world.memory, table)
    group_of(endpoint).attach(domain)
    assert (domain.type, dma.read(IOVA, 4)) == (DomainType.NESTED, b"nest")
    assert domain.iova_to_phys(IOVA) == MiB + 0x8000
    first, second = fault_of(dma, IOVA + 2 * PAGE), fault_of(dma, IOVA + PAGE)
    assert (first.reason, first.stage, first.level) == (Reason.NOT_MAPPED, 1, 1)
    assert (second.reason, second.stage, second.gpa) == (Reason.NOT_MAPPED, 2, 4 * MiB)
    records = world.system.iommus[0].faults.drain()
    assert [(r.domain, r.stage, r.level) for r in records] == [("nested", 1, 1), ("nested", 2, second.level)]
    parent.unmap(0, MiB)  # what is nested in it loses it too
    assert fault_of(dma).stage == 2
    world.close()


def test_nesting_refused(one: tuple[World, Endpoint, Dma]) -> None:
    world, endpoint, _ = one
    table, memory = make(TableFormat.X86, 4), world.memory
    parent = paging_domain_alloc(endpoint, AllocFlags.NEST_PARENT)
    refused(errno.EINVAL, nested_domain_alloc, endpoint, paging_domain_alloc(endpoint), memory, table)
    second = make(TableFormat.VTD_SECOND, 4)
    assert "VTD_SECOND" in refused(errno.EOPNOTSUPP, nested_domain_alloc, endpoint, parent, memory, second)
    other, lacking, _ = with_one(nesting=False)
    refused(errno.EOPNOTSUPP, nested_domain_alloc, lacking, parent, memory, table)
    other.close()


def test_sva_is_for_tables_of_cpus(one: tuple[World, Endpoint, Dma]) -> None:
    world, endpoint, _ = one
    for format in (TableFormat.VTD_SECOND, TableFormat.ARM_S1):  # not a CPU's; not this IOMMU's
        refused(errno.EOPNOTSUPP, sva_domain_alloc, endpoint, world.memory, make(format, 4))


@pytest.mark.parametrize(
    ("kind", "format", "ok"),
    [
        ("vt-d", TableFormat.VTD_SECOND, True),
        ("vt-d", TableFormat.AMD_V1, False),
        ("amd-vi", TableFormat.AMD_V1, True),
        ("amd-vi", TableFormat.VTD_SECOND, False),
        ("smmu-v3", TableFormat.ARM_S2, True),
        ("smmu-v3", TableFormat.X86, False),
        ("virtio-iommu", TableFormat.X86, False),
    ],
)
def test_walked(kind: str, format: TableFormat, ok: bool) -> None:
    world = World(iommu(kind))
    endpoint, dma = world.device("00:03.0")
    table: Table = make(format, 4, root=TABLES)
    build(Tables(world), table, IOVA, GPA)
    world.ram[GPA : GPA + 4] = b"here"
    if ok:
        group_of(endpoint).attach(walked_domain_alloc(endpoint, world.memory, table))
        assert dma.read(IOVA, 4) == b"here"
        assert fault_of(dma, IOVA + PAGE).reason is Reason.NOT_MAPPED
    else:
        assert format.name in refused(errno.EOPNOTSUPP, walked_domain_alloc, endpoint, world.memory, table)
    world.close()


# ---- capabilities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"page_sizes": frozenset()},
        {"page_sizes": frozenset((2048,))},
        {"page_sizes": frozenset((3 * PAGE,))},
        {"input_bits": 65},
        {"output_bits": 31},
        {"pasid_bits": 21},
        {"fault_queue_depth": 0},
        {"flush_unmaps": 0},
        {"flush_ms": 0},
        {"flush_ms": float("nan")},
        {"flush_ms": float("inf")},
        {"flush_ms": 1e30},
        {"page_sizes": frozenset((1 << 64,))},
        {"max_mappings": 0},
        {"input_bits": 32, "aperture": Span(0, 1 << 32)},
    ],
)
def test_no_such_capabilities(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Capabilities(**wrong)


def test_numbers_that_are_no_addresses() -> None:
    world, endpoint, _ = with_one()
    domain = paging_domain_alloc(endpoint, AllocFlags.DIRTY_TRACKING)
    assert [domain.iova_to_phys(iova) for iova in (-1, 1 << 64, (1 << 64) - 1)] == [None] * 3
    domain.set_dirty_tracking(True)
    for page_size, code in ((-PAGE, errno.EINVAL), (1 << 70, errno.EINVAL), (PAGE, errno.ENOMEM)):
        with pytest.raises(IommuError) as caught:
            domain.read_dirty(Span(0, (1 << 64) - 1), page_size)
        assert caught.value.errno == code
    world.close()


def test_a_parent_comes_before_the_format(world: World) -> None:
    """Linux iommufd_hwpt_nested_alloc: the parent, then the driver looks at the data."""
    vtd, _ = world.device("00:05.0")
    parent, plain = paging_domain_alloc(vtd, AllocFlags.NEST_PARENT), paging_domain_alloc(vtd)
    table = Table(TableFormat.VTD_SECOND, 4, 0, 48, 48)
    for domain, code in ((plain, errno.EINVAL), (parent, errno.EOPNOTSUPP)):
        with pytest.raises(IommuError) as caught:
            nested_domain_alloc(vtd, domain, world.memory, table)
        assert caught.value.errno == code
