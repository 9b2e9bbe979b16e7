"""Whether DMA snoops a CPU's cache: what each kind of IOMMU, mapping and request decides, seen by a stale byte.

File names are those of Linux 7.3.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.iommu.world import RAM, World, group_of, iommu
from tests.waiting import meanwhile, until
from vmodel.cpu_cache import LINE, CpuCache
from vmodel.device import PciDevice
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, IommuError, Reason
from vmodel.iommu import (
    AllocFlags,
    DomainType,
    Endpoint,
    PagingDomain,
    Table,
    TableFormat,
    dma_domain_alloc,
    nested_domain_alloc,
    paging_domain_alloc,
    walked_domain_alloc,
)
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.patience import patience
from vmodel.pci.express import DevCtl, Pcie
from vmodel.span import PAGE, MiB
from vmodel.testing.fakes import FakeMemory

IOVA, GPA = 0x40_0000, 0x1_0000
ENFORCE = AllocFlags.ENFORCE_SNOOP


class Bench:
    """A device, and a CPU's cache beside its DMA."""

    def __init__(self, kind: str | None = "vt-d", params: Any = None, *, can: bool | None = None, **capabilities: Any):
        self.world = World(*([] if kind is None else [iommu(kind, params=params, **capabilities)]))
        self.endpoint = self.world.plug(self.world.function("00:03.0"), enforce_snoop=can)
        self.dma = self.world.dmas["00:03.0"]
        self.enable = True
        self.dma.set_no_snoop_enable(lambda: self.enable)
        self.cache = CpuCache(self.world.memory)
        self.cache.attach(self.dma)

    def paging(self, flags: AllocFlags = AllocFlags.NONE) -> PagingDomain:
        """A domain that is attached."""
        domain = paging_domain_alloc(self.endpoint, flags)
        group_of(self.endpoint).attach(domain)
        return domain

    def snoops(self, dma: Dma, iova: int = IOVA, gpa: int = GPA) -> bool:
        """Whether a write snoops, and reads agree: seen by what the CPU and the device read."""
        self.world.ram[gpa : gpa + 1] = b"O"
        assert self.cache.read(gpa, 1) == b"O"
        dma.write(iova, b"N")
        assert self.world.ram[gpa : gpa + 1] == b"N"
        seen = self.cache.read(gpa, 1)
        self.cache.flush(gpa, 1)
        assert self.cache.read(gpa, 1) == b"N", "whatever was stale, a flush ends it"
        self.cache.write(gpa, b"D")
        assert (dma.read(iova, 1) == b"D") == (seen == b"N")
        self.cache.flush(gpa, 1)
        assert dma.read(iova, 1) == b"D"
        return seen == b"N"

    def close(self) -> None:
        self.world.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def one(*args: Any, **named: Any) -> Bench:
        made.append(Bench(*args, **named))
        return made[-1]

    yield one
    for bench in made:
        bench.close()


# ---- what decides ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One case, and where it says so.  `enforce`: when the domain is made to: "alloc", "before" or "after" map."""

    snoops: bool
    why: str
    kind: str = "vt-d"
    cache: bool = True
    no_snoop: bool = True
    enable: bool = True
    enforce: str = ""
    flags: AllocFlags = AllocFlags.NONE
    can: bool | None = None
    params: dict[str, Any] = field(default_factory=dict)


_SCALABLE = {"scalable": True}
_SL = AllocFlags.DIRTY_TRACKING
_VTDSS = "generic_pt/fmt/vtdss.h, vtdss_pt_iommu_set_prot: SNP by PT_FEAT_VTDSS_FORCE_COHERENCE, never by IOMMU_CACHE"
_ARM = "io-pgtable-arm.c, arm_lpae_prot_to_pte: without IOMMU_CACHE the entry is not cacheable"
_ARM_OP = "arm-smmu-v3.c, arm_smmu_enforce_cache_coherency: by CANWBS of the device's root complex"
_SVPBMT = "generic_pt/fmt/riscv.h, riscvpt_iommu_set_prot: NC without IOMMU_CACHE, with Svpbmt"
_NO_OP = "no enforce_cache_coherency among its operations: {}"

ROWS = [
    Row(True, _VTDSS, no_snoop=False),
    Row(True, _VTDSS, no_snoop=False, cache=False),
    Row(False, _VTDSS),
    Row(False, _VTDSS, cache=False),
    Row(True, "PCIe 5.0, 7.5.3.4: without Enable No Snoop the attribute is not set", enable=False),
    Row(True, "intel/iommu.c, intel_iommu_enforce_cache_coherency_ss", enforce="alloc"),
    Row(True, "intel/iommu.c, intel_iommu_enforce_cache_coherency_ss", enforce="before"),
    Row(True, "intel/iommu.c, intel_iommu_enforce_cache_coherency_ss", enforce="before", cache=False),
    Row(False, "the same: entries made before are without SNP", enforce="after"),
    Row(True, "intel/iommu.c, intel_iommu_enforce_cache_coherency_fs: PGSNP", enforce="after", params=_SCALABLE),
    Row(False, "intel/iommu.c, intel_iommu_domain_alloc_first_stage", enforce="after", params=_SCALABLE, flags=_SL),
    Row(True, "intel/iommu.c, intel_iommu_domain_alloc_first_stage", enforce="before", params=_SCALABLE, flags=_SL),
    Row(True, "amd/iommu.c, amd_iommu_domain_alloc_paging_v1: FORCE_COHERENCE, always", "amd-vi"),
    Row(True, "amd/iommu.c, amd_iommu_domain_alloc_paging_v1: FORCE_COHERENCE, always", "amd-vi", cache=False),
    Row(True, _ARM, "smmu-v3", no_snoop=False),
    Row(False, _ARM, "smmu-v3", no_snoop=False, cache=False),
    Row(False, _ARM, "smmu-v3", enable=False, cache=False),
    Row(False, _ARM_OP, "smmu-v3"),
    Row(True, _ARM_OP, "smmu-v3", enable=False),
    Row(True, _ARM_OP, "smmu-v3", can=True, enforce="alloc"),
    Row(True, _ARM_OP, "smmu-v3", can=True, enforce="after"),
    Row(
        False, "include/linux/iommu.h: nothing bypasses IOMMU_CACHE", "smmu-v3", can=True, enforce="alloc", cache=False
    ),
    Row(True, _SVPBMT, "riscv", no_snoop=False),
    Row(False, _SVPBMT, "riscv", no_snoop=False, cache=False),
    Row(False, _NO_OP.format("riscv/iommu.c, riscv_iommu_paging_domain_ops"), "riscv"),
    Row(False, _NO_OP.format("fsl_pamu_domain.c, fsl_pamu_capable"), "pamu"),
    Row(True, _NO_OP.format("fsl_pamu.c, PAACE_M_COHERENCE_REQ"), "pamu", no_snoop=False, cache=False),
    Row(False, _NO_OP.format("virtio-iommu.c, viommu_capable"), "virtio-iommu"),
    Row(True, _NO_OP.format("virtio-iommu.c, viommu_capable"), "virtio-iommu", no_snoop=False, cache=False),
    Row(False, _NO_OP.format("arch/powerpc/kernel/iommu.c, spapr_tce_iommu_capable"), "power-pe"),
    Row(True, _NO_OP.format("arch/powerpc/kernel/iommu.c, spapr_tce_iommu_capable"), "power-pe", no_snoop=False),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind}-{ROWS.index(row)}")
def test_who_decides(row: Row, make: Callable[..., Bench]) -> None:
    params = {"liodns": {"0000:00:03.0": 1}} if row.kind == "pamu" else row.params
    bench = make(row.kind, params, can=row.can)
    bench.enable = row.enable
    domain = bench.paging(row.flags | (ENFORCE if row.enforce == "alloc" else 0))
    if row.enforce == "before":
        assert domain.enforce_cache_coherency()
    domain.map(IOVA, GPA, PAGE, cache=row.cache)
    if row.enforce == "after":
        assert domain.enforce_cache_coherency()
    assert bench.snoops(bench.dma.no_snoop() if row.no_snoop else bench.dma) == row.snoops, row.why
    by_mapping = row.kind in ("smmu-v3", "riscv")
    assert bench.snoops(bench.dma) == (row.cache or not by_mapping), "the attribute is of one request only"
    assert [m.cache for m in domain.mappings()] == [row.cache]


@pytest.mark.parametrize("kind", [None, "vt-d", "amd-vi", "smmu-v3"])
def test_without_translation_the_request_decides(kind: str | None, make: Callable[..., Bench]) -> None:
    bench = make(kind)
    assert not bench.snoops(bench.dma.no_snoop(), GPA) and bench.snoops(bench.dma, GPA)
    bench.enable = False
    assert bench.snoops(bench.dma.no_snoop(), GPA)


def test_mappings_differ_in_one_access(make: Callable[..., Bench]) -> None:
    """Each page by its own mapping, also of one that was cut."""
    bench = make("smmu-v3")
    domain = bench.paging()
    domain.map(IOVA, GPA, 3 * PAGE, cache=False)
    assert domain.unmap(IOVA + PAGE, PAGE) == PAGE
    domain.map(IOVA + PAGE, GPA + PAGE, PAGE)
    assert [m.cache for m in domain.mappings()] == [False, True, False]
    for n in range(3):
        bench.world.ram[GPA + n * PAGE : GPA + n * PAGE + 4] = b"old."
    assert [bench.cache.read(GPA + n * PAGE, 4) for n in range(3)] == [b"old."] * 3
    bench.dma.write(IOVA, b"new." * (3 * PAGE // 4))
    assert [bench.cache.read(GPA + n * PAGE, 4) for n in range(3)] == [b"old.", b"new.", b"old."]
    bench.cache.wbinvd()
    assert [bench.cache.read(GPA + n * PAGE, 4) for n in range(3)] == [b"new."] * 3


def test_pasids(make: Callable[..., Bench]) -> None:
    bench = make("vt-d", _SCALABLE)
    group, domain = group_of(bench.endpoint), paging_domain_alloc(bench.endpoint, AllocFlags.PASID | ENFORCE)
    domain.map(IOVA, GPA, PAGE)
    group.attach_pasid(domain, 5)
    assert bench.snoops(bench.dma.with_pasid(5).no_snoop()) and bench.snoops(bench.dma.no_snoop().with_pasid(5))
    assert not bench.snoops(bench.dma.no_snoop(), GPA), "without a PASID: identity"


@pytest.mark.parametrize("flags", [AllocFlags.NONE, ENFORCE])
def test_nested(flags: AllocFlags, make: Callable[..., Bench]) -> None:
    """intel/pasid.c, pasid_pte_config_nested: PGSNP if the parent enforces."""
    bench = make("vt-d", _SCALABLE)
    parent = paging_domain_alloc(bench.endpoint, AllocFlags.NEST_PARENT | flags)
    parent.map(0, 0, RAM)
    tables(bench.world, present=3 | 4)
    domain = nested_domain_alloc(bench.endpoint, parent, bench.world.memory, Table(TableFormat.X86, 4, 0x1000, 48, 48))
    group_of(bench.endpoint).attach(domain)
    bench.world.ram[GPA : GPA + 1] = b"O"
    assert bench.cache.read(GPA, 1) == b"O"
    bench.dma.no_snoop().write(0, b"N")
    assert bench.cache.read(GPA, 1) == (b"N" if flags else b"O")


def tables(world: World, *, present: int, levels: int = 4) -> None:
    """Tables from 0x1000 on that map IOVA 0 to GPA."""
    for n in range(levels):
        world.put(0x1000 * (n + 1), (0x1000 * (n + 2) if n < levels - 1 else GPA) | present)


@pytest.mark.parametrize("coherent", [True, False])
def test_walks(coherent: bool, make: Callable[..., Bench]) -> None:
    """VT-d 11.4.3, ECAP.C: walks snoop, or software flushes what it has written."""
    bench = make("vt-d", coherent=coherent, enforce_snoop=False)
    tables(bench.world, present=3, levels=3)
    bench.world.put(0x3000, 0)
    domain = walked_domain_alloc(bench.endpoint, bench.world.memory, Table(TableFormat.VTD_SECOND, 3, 0x1000, 39, 48))
    group_of(bench.endpoint).replace(domain)
    bench.world.ram[GPA : GPA + 1] = b"x"
    bench.cache.write(0x3000, (GPA | 3).to_bytes(8, "little"))
    if not coherent:
        with pytest.raises(DmaFault) as fault:
            bench.dma.read(0, 1)
        assert fault.value.reason is Reason.NOT_MAPPED
        bench.cache.flush(0x3000, 8)
    assert bench.dma.read(0, 1) == b"x" and bench.cache.dirty == 0


# ---- enforcing -------------------------------------------------------------------------------------


def test_capability_is_the_devices(make: Callable[..., Bench]) -> None:
    """include/linux/iommu.h: IOMMU_CAP_ENFORCE_CACHE_COHERENCY is per device."""
    assert [make(kind).endpoint.can_enforce_snoop for kind in ("vt-d", "amd-vi", "smmu-v3", "virtio-iommu")] == [
        True,
        True,
        False,
        False,
    ]
    assert [make("smmu-v3", can=can).endpoint.can_enforce_snoop for can in (True, False, None)] == [True, False, False]
    assert not make(None).endpoint.can_enforce_snoop and not make("power-pe").endpoint.can_enforce_snoop


@pytest.mark.parametrize("kind", ["virtio-iommu", "power-pe"])
def test_without_the_operation(kind: str, make: Callable[..., Bench]) -> None:
    domain = make(kind).paging()
    assert not domain.enforce_cache_coherency() and not domain.enforces_snoop


@pytest.mark.parametrize("kind", ["vt-d", "smmu-v3"])
def test_refused_while_one_cannot_is_attached(kind: str, make: Callable[..., Bench]) -> None:
    """intel/iommu.c, domain_support_force_snooping; arm-smmu-v3.c, arm_smmu_enforce_cache_coherency."""
    bench = make(kind, can=False)
    domain = bench.paging()
    assert not domain.enforce_cache_coherency() and not domain.enforces_snoop
    group_of(bench.endpoint).detach()
    assert domain.enforce_cache_coherency(), "of no device that is attached, as in Linux"
    with pytest.raises(IommuError, match="cannot make DMA snoop") as refused:  # arm_smmu_attach_prepare: EINVAL
        group_of(bench.endpoint).attach(domain)
    assert refused.value.errno == errno.EINVAL and domain.users == 0
    with pytest.raises(IommuError) as refused:
        paging_domain_alloc(bench.endpoint, ENFORCE)
    assert refused.value.errno == errno.EOPNOTSUPP


def test_amd_never_refuses(make: Callable[..., Bench]) -> None:
    """amd/iommu.c, amd_iommu_enforce_cache_coherency: FC is always set."""
    assert make("amd-vi", can=False).paging().enforce_cache_coherency()


def test_groups_of_a_domain(make: Callable[..., Bench]) -> None:
    """Devices that were detached, and groups that are gone, do not count any more."""
    bench = make("vt-d")
    domain = bench.paging()
    other = bench.world.plug(bench.world.function("00:04.0"), enforce_snoop=False)
    group_of(other).attach(domain)
    assert domain.users == 2 and not domain.enforce_cache_coherency()
    bench.world.system.remove(other)
    assert domain.users == 1 and domain.enforce_cache_coherency()


@pytest.mark.parametrize("access", [0, 8, 9, 16, 17, 27, 5, -8])
@pytest.mark.parametrize("cache", [True, False])
def test_what_is_no_permission(access: int, cache: bool, make: Callable[..., Bench]) -> None:
    domain = make("vt-d").paging(ENFORCE)
    with pytest.raises(IommuError) as refused:
        domain.map(IOVA, GPA, PAGE, Access(access), cache=cache)
    assert refused.value.errno == errno.EINVAL and len(domain) == 0


def test_inaccessible_stays_so(make: Callable[..., Bench]) -> None:
    bench = make("vt-d")
    domain = bench.paging(ENFORCE)
    domain.map_inaccessible(IOVA, GPA, PAGE)
    with pytest.raises(DmaFault) as fault:
        bench.dma.read(IOVA, 1)
    assert fault.value.reason is Reason.PERMISSION and [m.access for m in domain.mappings()] == [Access(0)]


# ---- the device ------------------------------------------------------------------------------------


class Plain(PciDevice):
    """Without a PCI Express capability."""

    vendor_id, device_id, class_code = 0x1234, 3, 0xFF0000


class Express(PciDevice):
    """With one."""

    vendor_id, device_id, class_code = 0x1234, 4, 0xFF0000
    pcie = Pcie()


def stale(device: PciDevice, memory: FakeMemory) -> bool:
    """Whether a write without snooping leaves a stale line."""
    cache = CpuCache(device.backend.memory)
    cache.attach(device.dma)
    memory.write(0x2000, b"O")
    assert cache.read(0x2000, 1) == b"O"
    device.dma.no_snoop().write(0x2000, b"N")
    return cache.read(0x2000, 1) == b"O"


def test_device_control(fake_memory: FakeMemory) -> None:
    """PCIe 5.0, 7.5.3.4: Enable No Snoop, 1 after a reset."""
    device = Express("card0")
    fake_memory.attach(device)
    assert stale(device, fake_memory)
    device.pcie.regs.DEVCTL &= ~DevCtl.NO_SNOOP.mask
    assert not stale(device, fake_memory)
    device.pcie.regs.DEVCTL |= DevCtl.NO_SNOOP.mask
    assert stale(device, fake_memory)
    device.close()


def test_a_device_without_device_control(fake_memory: FakeMemory) -> None:
    device = Plain("card0")
    fake_memory.attach(device)
    assert not stale(device, fake_memory)
    device.close()


def test_taps_and_the_cache(make: Callable[..., Bench]) -> None:
    """A tap is in front of the cache; without both nothing is in the way."""
    bench = make(None)
    seen: list[int] = []

    class Watch:
        def write(self, dma: Dma, iova: int, data: bytes) -> None:
            seen.append(iova)
            dma.write(iova, data)

    bench.dma.tap(Watch())  # type: ignore[arg-type]
    for change in (lambda: bench.cache.attach(bench.dma), lambda: bench.cache.detach(bench.dma)):
        with pytest.raises(RuntimeError, match="tapped"):
            change()
    assert bench.cache.read(GPA, 1) == b"\0"
    bench.dma.write(GPA, b"a")
    assert (seen, bench.cache.read(GPA, 1)) == ([GPA], b"a")
    bench.dma.no_snoop().write(GPA, b"b")
    assert bench.cache.read(GPA, 1) == b"a"
    bench.dma.untapped.write(GPA, b"c")
    assert (seen, bench.cache.read(GPA, 1)) == ([GPA, GPA], b"c")
    bench.dma.tap(None)
    bench.dma.write(GPA, b"d")
    assert (len(seen), bench.cache.read(GPA, 1)) == (2, b"d")
    bench.cache.detach(bench.dma)
    bench.dma.write(GPA, b"e")
    assert bench.cache.read(GPA, 1) == b"d", "nothing snoops any more"


# ---- all kinds of accesses -------------------------------------------------------------------------

ACCESSES: list[tuple[str, Callable[[Dma], object], bytes]] = [
    ("read", lambda dma: dma.read(GPA, 8), b"dirty..."),
    ("readinto", lambda dma: _into(dma), b"dirty..."),
    ("gather", lambda dma: dma.gather([(GPA, 4), (GPA + 4, 4)]), b"dirty..."),
    ("view", lambda dma: _view(dma), b"dirty..."),
    ("write", lambda dma: dma.write(GPA + 4, b"NEW!"), b"dirtNEW!"),
    ("scatter", lambda dma: dma.scatter([(GPA + 4, 2), (GPA + 6, 2)], b"NEW!"), b"dirtNEW!"),
    ("writable view", lambda dma: _view(dma, b"NEW!"), b"dirtNEW!"),
    ("swap", lambda dma: dma.swap(GPA + 4, 4, int.from_bytes(b"NEW!", "little")), b"dirtNEW!"),
    ("fetch_add", lambda dma: dma.fetch_add(GPA, 8, 1), b"eirty..."),
]


def _into(dma: Dma) -> bytes:
    buffer = bytearray(8)
    dma.readinto(GPA, buffer)
    return bytes(buffer)


def _view(dma: Dma, data: bytes = b"") -> bytes:
    with dma.view(GPA, 8, writable=bool(data)) as there:
        if data:
            there[4:8] = data
        return bytes(there)


@pytest.mark.parametrize(("name", "call", "left"), ACCESSES, ids=[name for name, _, _ in ACCESSES])
def test_each_access_snoops(name: str, call: Callable[[Dma], object], left: bytes, make: Callable[..., Bench]) -> None:
    bench = make(None)
    bench.world.ram[GPA : GPA + 8] = b"memory.."
    bench.cache.write(GPA, b"dirty...")
    got = call(bench.dma)
    assert bench.cache.dirty == 0 and bench.world.ram[GPA : GPA + 8] == left == bench.cache.read(GPA, 8)
    if isinstance(got, bytes):
        assert got == left


@pytest.mark.parametrize(("name", "call", "left"), ACCESSES, ids=[name for name, _, _ in ACCESSES])
def test_no_access_snoops_unasked(
    name: str, call: Callable[[Dma], object], left: bytes, make: Callable[..., Bench]
) -> None:
    """Dirty data is not seen, and overwrites what the device has written when its line is written back."""
    bench = make(None)
    bench.world.ram[GPA : GPA + 8] = b"memory.."
    bench.cache.write(GPA, b"dirty...")
    got = call(bench.dma.no_snoop())
    assert bench.cache.dirty == 1 and bench.cache.read(GPA, 8) == b"dirty..."
    if name in ("read", "readinto", "gather", "view"):
        assert got == b"memory.."
    else:
        assert bench.world.ram[GPA : GPA + 8] != b"memory.."
    bench.cache.wbinvd()
    assert bench.world.ram[GPA : GPA + 8] == b"dirty..." and len(bench.cache) == 0


def test_a_view_drops_what_was_cached_meanwhile(make: Callable[..., Bench]) -> None:
    bench = make(None)
    with bench.dma.view(GPA, 8, writable=True) as there:
        assert bench.cache.read(GPA, 8) == bytes(8)
        there[:] = b"12345678"
    assert bench.cache.read(GPA, 8) == b"12345678"


@pytest.mark.parametrize(
    ("call", "reason", "done"),
    [
        (lambda dma: dma.read(RAM - 2, 4), Reason.NO_WINDOW, 2),
        (lambda dma: dma.write(RAM - PAGE - 2, bytes(PAGE + 4)), Reason.NO_WINDOW, PAGE + 2),
        (lambda dma: dma.gather([(0, 4), (RAM - 2, 4)]), Reason.NO_WINDOW, 6),
        (lambda dma: dma.scatter([(0, 4), (RAM - 2, 4)], bytes(8)), Reason.NO_WINDOW, 6),
        (lambda dma: dma.read((1 << 64) - 2, 4), Reason.WRAP, 0),
        (lambda dma: dma.write((1 << 64) - 2, bytes(4)), Reason.WRAP, 0),
        (lambda dma: dma.fetch_add(GPA + 1, 4, 1), Reason.UNALIGNED, 0),
        (lambda dma: _view_of(dma, RAM - 2, 4), Reason.NO_WINDOW, 0),
    ],
)
def test_faults_are_the_same(
    call: Callable[[Dma], object], reason: Reason, done: int, make: Callable[..., Bench]
) -> None:
    bench = make(None)
    found = []
    for _ in range(2):
        with pytest.raises(DmaFault) as fault:
            call(bench.dma)
        found.append((fault.value.reason, fault.value.iova, fault.value.done, fault.value.access))
        bench.cache.detach(bench.dma)
    assert found[0] == found[1] and found[0][0] is reason and found[0][2] == done


def _view_of(dma: Dma, iova: int, size: int) -> None:
    with dma.view(iova, size):
        raise AssertionError("it should fault")


def test_empty_accesses(make: Callable[..., Bench]) -> None:
    bench = make("vt-d")
    group_of(bench.endpoint).attach(paging_domain_alloc(bench.endpoint))
    assert bench.dma.read(IOVA, 0) == b"" and bench.dma.gather([]) == b""
    bench.dma.write(IOVA, b"")
    bench.dma.scatter([(IOVA, 0)], b"")
    assert not len(bench.world.system.iommus[0].faults) and not len(bench.cache)


def test_one_record_for_each_fault(make: Callable[..., Bench]) -> None:
    bench = make("vt-d")
    domain = bench.paging()
    domain.map(IOVA, GPA, PAGE)
    with pytest.raises(DmaFault) as fault:
        bench.dma.read(IOVA + PAGE - 4, 8)
    assert (fault.value.done, fault.value.reason) == (4, Reason.NOT_MAPPED)
    records = bench.world.system.iommus[0].faults.drain()
    assert [(r.iova, r.reason) for r in records] == [(IOVA + PAGE, Reason.NOT_MAPPED)]


def test_a_page_that_is_requested(make: Callable[..., Bench]) -> None:
    """The access continues after the page handler, and snoops as the new mapping says."""
    bench = make("vt-d")
    domain = bench.paging()

    def handler(request: PageRequest) -> PageResponse:
        domain.map(request.iova // PAGE * PAGE, GPA, PAGE)
        return PageResponse.SUCCESS

    domain.page_handler = handler
    bench.cache.write(GPA, b"dirty")
    assert bench.dma.read(IOVA, 5) == b"dirty"


# ---- the cache itself ------------------------------------------------------------------------------


def test_lines_are_bounded(make: Callable[..., Bench]) -> None:
    """The least recently used is written back first."""
    world = make(None).world
    cache = CpuCache(world.memory, lines=2)
    cache.write(0, b"a")
    cache.write(LINE, b"b")
    assert cache.read(0, 1) == b"a"
    cache.write(2 * LINE, b"c")
    assert len(cache) == 2 and LINE not in cache and 0 in cache and 2 * LINE + 63 in cache
    assert world.ram[LINE : LINE + 1] == b"b" and world.ram[0:1] == b"\0"
    cache.write(0, bytes(range(256)))
    assert len(cache) == 2 and cache.read(0, 256) == bytes(range(256))
    for lines in (0, -1):
        with pytest.raises(ValueError, match="lines"):
            CpuCache(world.memory, lines=lines)


@pytest.mark.parametrize(
    "call", [lambda c: c.read(RAM - 1, 2), lambda c: c.write(RAM, b"x"), lambda c: c.read(1 << 60, 1)]
)
def test_no_memory(call: Callable[[CpuCache], object], make: Callable[..., Bench]) -> None:
    cache = make(None).cache
    with pytest.raises(DmaFault) as fault:
        call(cache)
    assert fault.value.reason is Reason.NO_WINDOW


def test_flush_of_huge_ranges(make: Callable[..., Bench]) -> None:
    cache = make(None).cache
    cache.write(GPA, b"x" * 65)
    cache.flush(GPA, 0)
    cache.flush(GPA + 128, 1 << 62)
    cache.flush(0, GPA)
    assert cache.dirty == 2
    cache.flush(0, 1 << 64)
    assert len(cache) == 0


def test_memory_that_goes(make: Callable[..., Bench]) -> None:
    """What cannot be written back is lost, and said; the rest is written back."""
    bench = make(None)
    bench.world.memory.unmap_all()
    bench.world.memory.map(0, MiB, fd=bench.world.fd)
    bench.world.memory.map(MiB, MiB, fd=bench.world.fd, offset=MiB)
    for gpa in (MiB, 0, MiB + LINE, LINE):
        bench.cache.write(gpa, b"x")
    assert bench.world.memory.unmap(MiB, MiB) == MiB
    with pytest.raises(DmaFault) as fault:
        bench.cache.wbinvd()
    assert fault.value.iova == MiB and len(bench.cache) == 0 and bench.world.ram[0:1] == b"x" == bench.world.ram[64:65]


class Reference:
    """A cache as a dictionary of lines over bytes: nothing clever."""

    def __init__(self, size: int, most: int) -> None:
        self.memory, self.most = bytearray(size), most
        self.lines: OrderedDict[int, tuple[bytes, bool]] = OrderedDict()

    def load(self, n: int) -> bytes:
        if n not in self.lines:
            while len(self.lines) >= self.most:
                self.drop(next(iter(self.lines)))
            self.lines[n] = (bytes(self.memory[n * 64 : n * 64 + 64]), False)
        self.lines.move_to_end(n)
        return self.lines[n][0]

    def drop(self, n: int) -> None:
        data, dirty = self.lines.pop(n)
        if dirty:
            self.memory[n * 64 : n * 64 + 64] = data

    def cpu_read(self, at: int, size: int) -> bytes:
        return bytes(self.load(b // 64)[b % 64] for b in range(at, at + size))

    def cpu_write(self, at: int, data: bytes) -> None:
        for b, value in enumerate(data, at):
            old = self.load(b // 64)
            self.lines[b // 64] = (old[: b % 64] + bytes([value]) + old[b % 64 + 1 :], True)

    def snoop(self, at: int, size: int, drop: bool) -> None:
        for n in {b // 64 for b in range(at, at + size)} & self.lines.keys():
            data, _ = self.lines[n]
            place = list(self.lines).index(n)
            self.drop(n)
            if not drop:
                self.lines[n] = (data, False)
                for other in list(self.lines)[place:-1]:
                    self.lines.move_to_end(other)


@given(st.data())
def test_against_the_reference(data: st.DataObject) -> None:
    bench = Bench("smmu-v3")
    try:
        most = data.draw(st.integers(1, 6))
        cache, reference = CpuCache(bench.world.memory, lines=most), Reference(2 * PAGE, most)
        cache.attach(bench.dma)
        domain = bench.paging()
        domain.map(0, 0, PAGE)
        domain.map(PAGE, PAGE, PAGE, cache=False)
        for _ in range(data.draw(st.integers(1, 20))):
            step(data, bench, cache, reference)
            assert bench.world.ram[: 2 * PAGE] == bytes(reference.memory)
            assert list(cache._lines) == [n * 64 for n in reference.lines]
    finally:
        bench.close()


def step(data: st.DataObject, bench: Bench, cache: CpuCache, reference: Reference) -> None:
    at = data.draw(st.integers(PAGE - 200, PAGE + 200))
    size = data.draw(st.integers(0, 150))
    content = bytes((at + n) % 251 + 1 for n in range(size))
    no_snoop = data.draw(st.booleans())
    dma = bench.dma.no_snoop() if no_snoop else bench.dma
    snooped = 0 if no_snoop else max(0, min(PAGE, at + size) - at)
    match data.draw(st.sampled_from(("cpu_read", "cpu_write", "read", "write", "flush", "wbinvd"))):
        case "cpu_read":
            assert cache.read(at, size) == reference.cpu_read(at, size)
        case "cpu_write":
            cache.write(at, content)
            reference.cpu_write(at, content)
        case "read":
            reference.snoop(at, snooped, drop=False)
            assert dma.read(at, size) == bytes(reference.memory[at : at + size])
        case "write":
            reference.snoop(at, snooped, drop=True)
            dma.write(at, content)
            reference.memory[at : at + size] = content
        case "flush":
            cache.flush(at, size)
            reference.snoop(at, size, drop=True)
        case _:
            cache.wbinvd()
            for n in list(reference.lines):
                reference.drop(n)


def test_threads_share_a_line(make: Callable[..., Bench]) -> None:
    """A device and the CPU count in two words of one line: with snooping neither loses a step."""
    bench = make(None)

    steps = [0]

    def device() -> None:
        bench.dma.fetch_add(GPA, 8, 1)
        at = GPA + 16
        bench.dma.write(at, (int.from_bytes(bench.dma.read(at, 8), "little") + 1).to_bytes(8, "little"))
        steps[0] += 1

    with meanwhile(device):
        for n in range(1, 501):
            assert int.from_bytes(bench.cache.read(GPA + 8, 8), "little") == n - 1
            bench.cache.write(GPA + 8, n.to_bytes(8, "little"))
        until(lambda: steps[0] > 10, "some steps of the device")
    counted = [int.from_bytes(bench.cache.read(GPA + 8 * n, 8), "little") for n in range(3)]
    assert counted == [steps[0], 500, steps[0]]


def test_an_access_of_a_device_is_one_step(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU cannot cache a line again between its eviction and the device's write."""
    bench = make(None)
    snoop, evicted, cached = bench.cache.snoop, threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        snoop(*args)
        evicted.set()
        assert not cached.wait(0.1)

    def cpu() -> None:
        assert evicted.wait(patience(10))
        bench.cache.write(GPA + 8, b"cpu")
        cached.set()

    monkeypatch.setattr(bench.cache, "snoop", slow)
    thread = threading.Thread(target=cpu, daemon=True)
    thread.start()
    bench.dma.write(GPA, b"dev")
    thread.join(patience(10))
    assert cached.is_set() and bench.cache.read(GPA, 11) == b"dev" + bytes(5) + b"cpu"


def test_kernel_domains_have_the_flag(make: Callable[..., Bench]) -> None:
    """dma-iommu.c, dma_info_to_prot: IOMMU_CACHE for devices that are coherent only."""
    bench = make("smmu-v3")
    domain = dma_domain_alloc(bench.endpoint)
    assert domain.type is DomainType.DMA_FQ and isinstance(bench.endpoint, Endpoint)
    group_of(bench.endpoint).set_default(domain)
    domain.map(IOVA, GPA, PAGE, cache=False)
    assert not bench.snoops(bench.dma)
