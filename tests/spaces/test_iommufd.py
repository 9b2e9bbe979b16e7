"""iommufd's objects: each call, right and wrong, by its errno, by what is left after it, and by what DMA reaches."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from pytest import MonkeyPatch

from tests.iommu.tables import TO_PAGE, TO_TABLE, index
from tests.spaces.world import RW, Device, World, refused
from tests.waiting import until
from vmodel.errors import Access, DmaFault
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import AllocFlags, Domain, DomainType, Mapping
from vmodel.iommu.drivers import KINDS
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.iommufd import Context, FaultObject, Hwpt, Ioas
from vmodel.iommu.iommufd import Device as Bound
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.patience import patience
from vmodel.span import PAGE, KiB, MiB, Span

IOVA = 16 * MiB
LAST = 2**64 - 1
R, W = Access.READ, Access.WRITE
MSI = Span(0xFEE0_0000, 0xFEEF_FFFF)


@pytest.fixture
def context() -> Context:
    return Context()


@pytest.fixture
def ioas(context: Context) -> Ioas:
    return Ioas(context)


def state(ioas: Ioas) -> object:
    """All that a call that fails must leave as it was."""
    return (
        ioas.mappings(),
        ioas.hwpts[:],
        [list(hwpt.paging.mappings()) for hwpt in ioas.hwpts],
        ioas.iova_ranges(),
        ioas.alignment,
        ioas.users,
        [hwpt.users for hwpt in ioas.hwpts],
        sorted(ioas.context._objects),
    )


# ---- map -------------------------------------------------------------------------------------------


def test_map_where_it_is_said(world: World, context: Context, ioas: Ioas) -> None:
    vtd, pamu = world.add(world.iommu()), world.add(world.iommu("pamu"))
    ioas.map(0, PAGE, iova=IOVA)  # before there is anybody to see it
    for device in (vtd, pamu):
        Bound(context, device.endpoint).attach(ioas)
    assert ioas.map(PAGE, 2 * PAGE, R, IOVA + PAGE) == IOVA + PAGE
    assert len(ioas.hwpts) == 2
    for device in (vtd, pamu):
        assert device.reads(IOVA) == device.writes(IOVA) == 0
        assert device.reads(IOVA + 2 * PAGE) == 2 * PAGE and device.writes(IOVA + 2 * PAGE) is None
        assert device.reads(IOVA + 3 * PAGE) is None
    assert ioas.mappings() == [
        Mapping(Span.sized(IOVA, PAGE), 0, RW),
        Mapping(Span.sized(IOVA + PAGE, 2 * PAGE), PAGE, R),
    ]


@pytest.mark.parametrize(
    ("gpa", "size", "access", "iova", "code"),
    [
        (0, 0, RW, IOVA, errno.EINVAL),
        (0, -PAGE, RW, IOVA, errno.EINVAL),
        (0, PAGE + 1, RW, IOVA, errno.EINVAL),
        (8, PAGE, RW, IOVA, errno.EINVAL),
        (8, PAGE, RW, None, errno.EINVAL),
        (0, PAGE, RW, IOVA + 1, errno.EINVAL),
        (0, PAGE, Access(0), IOVA, errno.EINVAL),
        (0, PAGE, Access(0), None, errno.EINVAL),
        (0, PAGE, RW, MSI.start, errno.EINVAL),
        (0, 2 * PAGE, RW, MSI.start - PAGE, errno.EINVAL),
        (0, PAGE, RW, MSI.last + 1 - PAGE, errno.EINVAL),
        (0, PAGE, RW, 1 << 48, errno.EINVAL),
        (0, 2 * PAGE, RW, (1 << 48) - PAGE, errno.EINVAL),
        (0, 2 * PAGE, RW, 2**64 - PAGE, errno.EOVERFLOW),
        (0, PAGE, RW, 2**64, errno.EOVERFLOW),
        (0, PAGE, RW, -PAGE, errno.EOVERFLOW),
        (2**64 - PAGE, 2 * PAGE, RW, None, errno.EOVERFLOW),
        (-PAGE, PAGE, RW, None, errno.EOVERFLOW),
        (0, 1 << 63, RW, None, errno.EOVERFLOW),
        (0, 1 << 48, RW, None, errno.ENOSPC),
        (1 << 50, PAGE, RW, IOVA, errno.ERANGE),
        (0, PAGE, RW, 4 * MiB, errno.EEXIST),
        (0, 2 * PAGE, RW, 4 * MiB - PAGE, errno.EEXIST),
        (0, 4 * MiB, RW, 3 * MiB, errno.EEXIST),
    ],
)
def test_map_refused(
    world: World, context: Context, ioas: Ioas, gpa: int, size: int, access: Access, iova: int | None, code: int
) -> None:
    for changes in ({}, {"output_bits": 50}):
        Bound(context, world.add(world.iommu(**changes)).endpoint).attach(ioas)  # type: ignore[arg-type]
    ioas.map(0, 2 * PAGE, iova=4 * MiB)
    before = state(ioas)
    with refused(code):
        ioas.map(gpa, size, access, iova)
    assert state(ioas) == before


def test_map_where_there_is_room(world: World, context: Context, ioas: Ioas) -> None:
    Bound(context, world.add(world.iommu(reserved=(), aperture=Span(0, 8 * MiB - 1))).endpoint).attach(ioas)
    assert ioas.map(PAGE, PAGE) == PAGE, "never 0"
    assert ioas.map(3 * PAGE, 4 * PAGE) == 2 * PAGE, "after it"
    assert ioas.map(0, 2 * MiB) == 2 * MiB, "as aligned as the GPA is"
    assert ioas.map(2 * MiB, 4 * MiB) == 4 * MiB
    assert ioas.map(0, PAGE) == 6 * PAGE
    with refused(errno.ENOSPC):
        ioas.map(0, 2 * MiB)
    ioas.unmap(2 * MiB, 2 * MiB)
    assert ioas.map(0, 2 * MiB) == 2 * MiB
    assert ioas.map(0, PAGE, iova=0) == 0, "0 may be asked for"


def test_the_last_page_is_not_chosen(context: Context, ioas: Ioas) -> None:
    ioas.map(0, 2**64 - 3 * PAGE, iova=PAGE)
    with refused(errno.ENOSPC):
        ioas.map(PAGE, 2 * PAGE)
    assert ioas.map(0, PAGE) == 2**64 - 2 * PAGE
    ioas.unmap(2**64 - 2 * PAGE, PAGE)
    assert ioas.map(0, 2 * PAGE, iova=2**64 - 2 * PAGE) == 2**64 - 2 * PAGE


def test_unmap(world: World, context: Context, ioas: Ioas) -> None:
    device = world.add(world.iommu())
    Bound(context, device.endpoint).attach(ioas)
    for n in range(4):
        ioas.map(n * 4 * PAGE, 2 * PAGE, iova=IOVA + n * 4 * PAGE)
    before = state(ioas)
    for iova, size, code in (
        (IOVA, 0, errno.EINVAL),
        (IOVA, PAGE, errno.ENOENT),
        (IOVA + PAGE, PAGE, errno.ENOENT),
        (IOVA + PAGE, 16 * PAGE, errno.ENOENT),
        (IOVA + 2 * PAGE, 2 * PAGE, errno.ENOENT),
        (2**64 - PAGE, 2 * PAGE, errno.EOVERFLOW),
        (PAGE, LAST, errno.EOVERFLOW),
        (-PAGE, PAGE, errno.EOVERFLOW),
    ):
        with refused(code):
            ioas.unmap(iova, size)
        assert state(ioas) == before
    with refused(errno.ENOENT):
        ioas.unmap(IOVA, 5 * PAGE)  # as in Linux: what comes before the one that it would cut is gone
    assert device.reads(IOVA) is None and device.reads(IOVA + 4 * PAGE) == 4 * PAGE
    assert ioas.unmap(IOVA + 3 * PAGE + 5, 4 * PAGE) == 2 * PAGE, "needs no alignment"
    assert ioas.unmap(0, LAST) == 4 * PAGE and ioas.unmap(0, LAST) == ioas.unmap_all() == 0
    assert device.reads(IOVA + 8 * PAGE) is None and not len(ioas.hwpts[0].paging)
    ioas.map(0, PAGE)
    assert ioas.unmap_all() == PAGE


# ---- ranges ----------------------------------------------------------------------------------------


def test_iova_ranges_follow_the_devices(world: World, context: Context, ioas: Ioas) -> None:
    assert ioas.iova_ranges() == [Span(0, LAST)] and ioas.alignment == 1
    vtd = Bound(context, world.add(world.iommu()).endpoint)
    smmu = Bound(context, world.add(world.iommu("smmu-v3", input_bits=40, page_sizes=frozenset((64 * KiB,)))).endpoint)
    vtd.attach(ioas)
    of_vtd = ioas.iova_ranges()
    assert of_vtd == [Span(0, MSI.start - 1), Span(MSI.last + 1, (1 << 48) - 1)]
    smmu.attach(ioas)
    doorbell = Span(0x0800_0000, 0x080F_FFFF)  # the kernel's
    assert ioas.iova_ranges() == [
        Span(0, doorbell.start - 1),
        Span(doorbell.last + 1, MSI.start - 1),
        Span(MSI.last + 1, (1 << 40) - 1),
    ]
    assert ioas.alignment == 64 * KiB
    with refused(errno.EINVAL):
        ioas.map(0, PAGE, iova=IOVA)
    smmu.detach()
    assert ioas.iova_ranges() == of_vtd and ioas.alignment == PAGE
    vtd.detach()
    assert ioas.iova_ranges() == [Span(0, LAST)]


def test_devices_that_do_not_fit_the_mappings(world: World, context: Context, ioas: Ioas) -> None:
    ioas.map(PAGE, 64 * KiB, iova=1 << 36)
    coarse = world.iommu(page_sizes=frozenset((64 * KiB,)))
    narrow, few = world.iommu("pamu"), world.iommu(max_mappings=1)
    for iommu in (narrow, coarse):
        device = Bound(context, world.add(iommu).endpoint)
        before = state(ioas)
        for call in (device.attach, device.hwpt_alloc):
            with refused(errno.EADDRINUSE):
                call(ioas)
        assert state(ioas) == before
    ioas.map(PAGE, PAGE)
    device = Bound(context, world.add(few).endpoint)
    before = state(ioas)
    with refused(errno.ENOSPC):
        device.attach(ioas)
    assert state(ioas) == before and device.group.domain.type is DomainType.BLOCKED
    device.destroy()


@pytest.mark.parametrize("kind", [RegionType.RESERVED, RegionType.MSI, RegionType.SW_MSI, RegionType.DIRECT_RELAXABLE])
def test_reserved_regions(world: World, context: Context, ioas: Ioas, kind: RegionType) -> None:
    region = ReservedRegion(Span.sized(IOVA, PAGE), kind)
    device = Bound(context, world.add(world.iommu(reserved=()), reserved=[region]).endpoint)
    ioas.map(0, PAGE, iova=IOVA)
    if kind is RegionType.DIRECT_RELAXABLE:
        device.attach(ioas)
        return
    before = state(ioas)
    with refused(errno.EADDRINUSE):
        device.attach(ioas)
    assert state(ioas) == before
    ioas.unmap_all()
    device.attach(ioas)
    with refused(errno.EINVAL):
        ioas.map(0, PAGE, iova=IOVA)
    device.detach()
    ioas.map(0, PAGE, iova=IOVA)


def test_allow_iovas(world: World, context: Context, ioas: Ioas) -> None:
    vtd, pamu = (Bound(context, world.add(world.iommu(kind)).endpoint) for kind in ("vt-d", "pamu"))
    vtd.attach(ioas)
    ioas.allow_iovas([Span.sized(32 * MiB, 2 * PAGE), Span.sized(IOVA, PAGE)])
    for bad, code in (
        ([Span(0, 9), Span(9, 20)], errno.EINVAL),
        ([Span(0, PAGE), Span(2 * PAGE, 2 * PAGE)], errno.EINVAL),  # of one byte
        ([MSI], errno.EADDRINUSE),
        ([Span(0, PAGE), Span(MSI.last, MSI.last + 5)], errno.EADDRINUSE),
        ([Span(0, 1 << 48)], errno.EADDRINUSE),
    ):
        with refused(code):
            ioas.allow_iovas(bad)
    assert ioas.map(0, 2 * PAGE) == 32 * MiB and ioas.map(0, PAGE) == IOVA, "the old ones stay"
    with refused(errno.ENOSPC):
        ioas.map(0, PAGE)
    assert ioas.map(0, PAGE, iova=MiB) == MiB, "a fixed IOVA may be anywhere"
    ioas.unmap_all()
    ioas.allow_iovas([Span.sized(1 << 40, PAGE)])
    before = state(ioas)
    with refused(errno.EADDRINUSE):  # its aperture would take away what was promised
        pamu.attach(ioas)
    assert state(ioas) == before
    ioas.allow_iovas([Span.sized(IOVA, PAGE)])
    region = ReservedRegion(Span.sized(IOVA, 1), RegionType.RESERVED)
    other = Bound(context, world.add(world.iommu(), reserved=[region]).endpoint)
    with refused(errno.EADDRINUSE):
        other.attach(ioas)
    ioas.allow_iovas([])
    pamu.attach(ioas)
    other.attach(ioas)
    assert ioas.map(0, PAGE) == PAGE
    # Neighbours are one (Linux iopt_alloc_iova, by interval_tree_for_each_span).
    ioas.allow_iovas([Span.sized(MiB + PAGE, PAGE), Span.sized(MiB, PAGE)])
    assert ioas.map(0, 2 * PAGE) == MiB


# ---- copy ------------------------------------------------------------------------------------------


def test_copy(world: World, context: Context, ioas: Ioas) -> None:
    device, source = world.add(world.iommu()), Ioas(context)
    Bound(context, device.endpoint).attach(ioas)
    source.map(0, 4 * PAGE, iova=0)
    source.map(MiB, 2 * PAGE, R, 4 * PAGE)  # elsewhere in memory, and read-only
    source.map(0, PAGE, iova=8 * PAGE)
    assert ioas.copy(source, PAGE, 5 * PAGE, R, IOVA) == IOVA
    assert [device.reads(IOVA + n * PAGE) for n in range(6)] == [PAGE, 2 * PAGE, 3 * PAGE, MiB, MiB + PAGE, None]
    assert device.writes(IOVA) is None
    with refused(errno.ENOENT):  # two areas, as there
        ioas.unmap(IOVA, 2 * PAGE)
    assert ioas.unmap(IOVA, 3 * PAGE) == 3 * PAGE
    source.unmap_all()
    assert device.reads(IOVA + 3 * PAGE) == MiB, "a copy stays"
    assert ioas.copy(ioas, IOVA + 4 * PAGE, PAGE, R) == PAGE and device.reads(PAGE) == MiB + PAGE


def test_copy_refused(world: World, context: Context, ioas: Ioas) -> None:
    source = Ioas(context)
    Bound(context, world.add(world.iommu()).endpoint).attach(ioas)
    source.map(0, 2 * PAGE, iova=0)
    source.map(MiB, PAGE, R, 2 * PAGE)
    ioas.map(0, PAGE, iova=IOVA)
    before = state(ioas)
    for iova, size, access, to, code in (
        (0, 0, R, None, errno.EINVAL),
        (0, PAGE, Access(0), None, errno.EINVAL),
        (0, PAGE - 1, R, None, errno.EINVAL),
        (8, PAGE, R, None, errno.EINVAL),
        (0, 4 * PAGE, R, None, errno.ENOENT),
        (3 * PAGE, PAGE, R, None, errno.ENOENT),
        (LAST, 2, R, None, errno.EOVERFLOW),
        (0, 3 * PAGE, RW, None, errno.EPERM),
        (2 * PAGE, PAGE, W, None, errno.EPERM),
        (0, 3 * PAGE, R, IOVA - 2 * PAGE, errno.EEXIST),
        (0, PAGE, R, MSI.start, errno.EINVAL),
        (0, 2 * PAGE, R, LAST - PAGE + 1, errno.EOVERFLOW),
    ):
        with refused(code):
            ioas.copy(source, iova, size, access, to)
        assert state(ioas) == before
    with refused(errno.ENOENT):
        ioas.copy(Ioas(Context()), 0, PAGE, R)
    source.destroy()
    with refused(errno.ENOENT):
        ioas.copy(source, 0, PAGE, R)


# ---- bind, HWPTs -----------------------------------------------------------------------------------


def test_bind(world: World, context: Context) -> None:
    iommu = world.iommu()
    device, sibling = world.add(iommu), world.add(iommu, 0, 1)
    bound = Bound(context, device.endpoint)
    assert device.group.domain.type is DomainType.BLOCKED and device.reads(0) is None
    with refused(errno.EINVAL):
        Bound(context, device.endpoint)
    with refused(errno.EPERM):
        Bound(Context(), sibling.endpoint)
    other = Bound(context, sibling.endpoint)
    bound.destroy()
    assert device.group.owner is context, "the other has it still"
    with refused(errno.ENOENT):
        bound.destroy()
    other.destroy()
    assert device.group.owner is None and device.reads(0) == 0
    sibling.endpoint.bind("e1000e")
    with refused(errno.EPERM):
        Bound(context, device.endpoint)
    direct = world.add(iommu, 1, reserved=[ReservedRegion(Span.sized(0, PAGE), RegionType.DIRECT)])
    with refused(errno.EINVAL):
        Bound(context, direct.endpoint)
    stray = world.add(world.iommu("pamu"), 3)
    world.system.remove(stray.endpoint)
    with refused(errno.ENODEV):
        Bound(context, stray.endpoint)
    assert context.devices == [] and not context._objects


def test_get_info(world: World, context: Context) -> None:
    pamu = Bound(context, world.add(world.iommu("pamu", coherent=False)).endpoint).get_info()
    assert (pamu.kind, pamu.coherent, pamu.enforce_snoop, pamu.dirty_tracking, pamu.pasid_bits) == (
        "pamu",
        False,
        False,
        False,
        0,
    )
    vtd = Bound(context, world.add(world.iommu(pasid_bits=10)).endpoint).get_info()
    assert (vtd.kind, vtd.coherent, vtd.enforce_snoop, vtd.dirty_tracking, vtd.pasid_bits) == (
        "vt-d",
        True,
        True,
        True,
        10,
    )
    assert min(vtd.page_sizes) == PAGE and 2 * MiB in vtd.page_sizes


def table(root: int = PAGE) -> Table:
    return Table(TableFormat.X86, 4, root, 48, 48)


def test_hwpt_alloc_refused(world: World, context: Context, ioas: Ioas) -> None:
    vtd, pamu, smmu = (Bound(context, world.add(world.iommu(kind)).endpoint) for kind in ("vt-d", "pamu", "smmu-v3"))
    parent = vtd.hwpt_alloc(ioas, AllocFlags.NEST_PARENT)
    plain, nested = vtd.hwpt_alloc(ioas), vtd.hwpt_alloc(parent, table=table(), memory=world.memory)
    fault, gone, foreign = FaultObject(context), Ioas(context), Ioas(Context())
    dead, elsewhere = FaultObject(context), FaultObject(Context())
    gone.destroy()
    dead.destroy()
    stage1 = {"table": table(), "memory": world.memory}
    arm = {"table": Table(TableFormat.ARM_S1, 4, PAGE, 48, 48), "memory": world.memory}
    before = state(ioas), parent.users, fault.users
    for device, target, flags, more, code in (
        (pamu, ioas, AllocFlags.NEST_PARENT, {}, errno.EOPNOTSUPP),
        (pamu, ioas, AllocFlags.DIRTY_TRACKING, {}, errno.EOPNOTSUPP),
        (pamu, ioas, AllocFlags.PASID, {}, errno.EOPNOTSUPP),
        (pamu, ioas, AllocFlags.ENFORCE_SNOOP, {}, errno.EOPNOTSUPP),
        (pamu, ioas, AllocFlags.NONE, {"fault": fault}, errno.EOPNOTSUPP),
        (vtd, ioas, AllocFlags(1 << 9), {}, errno.EOPNOTSUPP),
        (vtd, ioas, AllocFlags.NEST_PARENT, {"fault": fault}, errno.EOPNOTSUPP),
        (vtd, ioas, AllocFlags.NONE, stage1, errno.EOPNOTSUPP),
        (vtd, parent, AllocFlags.NONE, {}, errno.EOPNOTSUPP),
        (vtd, parent, AllocFlags.DIRTY_TRACKING, stage1, errno.EOPNOTSUPP),
        (vtd, parent, AllocFlags.NONE, arm, errno.EOPNOTSUPP),
        (vtd, parent, AllocFlags.NONE, {"table": table()}, errno.EINVAL),
        (vtd, parent, AllocFlags.NONE, {"memory": world.memory}, errno.EINVAL),
        (vtd, plain, AllocFlags.NONE, stage1, errno.EINVAL),
        (vtd, nested, AllocFlags.NONE, stage1, errno.EINVAL),
        (smmu, parent, AllocFlags.NONE, arm, errno.EOPNOTSUPP),  # only by a vIOMMU
        (vtd, gone, AllocFlags.NONE, {}, errno.EINVAL),
        (vtd, foreign, AllocFlags.NONE, {}, errno.EINVAL),
        (vtd, ioas, AllocFlags.NONE, {"fault": dead}, errno.ENOENT),
        (vtd, ioas, AllocFlags.NONE, {"fault": elsewhere}, errno.ENOENT),
    ):
        with refused(code):
            device.hwpt_alloc(target, flags, **more)  # type: ignore[arg-type]
        assert (state(ioas), parent.users, fault.users) == before
    vtd.destroy()
    with refused(errno.ENOENT):
        vtd.hwpt_alloc(ioas)


def test_a_hwpt_by_hand(world: World, context: Context, ioas: Ioas) -> None:
    device = world.add(world.iommu())
    bound = Bound(context, device.endpoint)
    ioas.map(MiB, PAGE, iova=IOVA)
    hwpt = bound.hwpt_alloc(ioas)
    assert hwpt.paging.enforces_snoop, "whoever can, does"
    assert bound.attach(hwpt) is hwpt and device.reads(IOVA) == MiB
    bound.detach()
    assert hwpt in ioas.hwpts, "it goes only by destroy"
    assert bound.attach(ioas) is not hwpt, "nor is it taken for an IOAS"


def test_equal_iommus_share_an_automatic_hwpt(world: World, context: Context, ioas: Ioas) -> None:
    one, more, less = world.iommu(), world.iommu(input_bits=52, fault_queue_depth=9), world.iommu(input_bits=39)
    first, second, third = (Bound(context, world.add(iommu).endpoint) for iommu in (one, more, less))
    hwpt = first.attach(ioas)
    assert second.attach(ioas) is hwpt and hwpt.users == 2
    assert third.attach(ioas) is not hwpt and len(ioas.hwpts) == 2
    first.detach()
    assert hwpt.users == 1 and hwpt in ioas.hwpts
    second.detach()
    assert hwpt not in ioas.hwpts, "the last one takes it along"
    with refused(errno.ENOENT):
        context[hwpt.id]


# ---- attach, replace, detach -----------------------------------------------------------------------


def test_attach_refused(world: World, context: Context, ioas: Ioas) -> None:
    iommu = world.iommu()
    first, second = (Bound(context, world.add(iommu, 0, n).endpoint) for n in range(2))
    other = Ioas(context)
    pamu = Bound(context, world.add(world.iommu("pamu")).endpoint)
    hand = first.hwpt_alloc(other)
    before = state(ioas)
    for target, code in ((pamu.hwpt_alloc(other), errno.EINVAL), (Ioas(Context()), errno.ENOENT)):
        with refused(code):
            first.attach(target)
    with refused(errno.EINVAL):
        first.replace(ioas)
    first.detach()  # as drivers/vfio/iommufd.c:181: nothing happens
    first.attach(hand)
    for target, code in ((ioas, errno.EINVAL), (other, errno.EINVAL)):
        with refused(code):  # the group is attached to `hand`, which an IOAS does not stand for
            second.attach(target)
    with refused(errno.EBUSY):
        first.attach(hand)
    assert second.attach(hand) is hand and hand.users == 2
    with refused(errno.EBUSY):
        second.destroy()
    with refused(errno.EBUSY):
        hand.destroy()
    assert [before[n] for n in range(7)] == [state(ioas)[n] for n in range(7)]  # type: ignore[index]
    first.detach()
    assert first.group.domain is hand.domain
    second.detach()
    assert first.group.domain.type is DomainType.BLOCKED
    hand.destroy()
    with refused(errno.ENOENT):
        first.attach(hand)
    first.destroy()
    with refused(errno.ENOENT):
        first.attach(ioas)


def test_replace_for_two_devices_of_a_group(world: World, context: Context) -> None:
    iommu = world.iommu()
    devices = [
        world.add(iommu, 0, n, reserved=[ReservedRegion(Span.sized(IOVA + n * MiB, PAGE), RegionType.RESERVED)])
        for n in range(2)
    ]
    first, second = (Bound(context, device.endpoint) for device in devices)
    old, new, taken = Ioas(context), Ioas(context), Ioas(context)
    old.map(0, PAGE, iova=MiB)
    new.map(MiB, PAGE, iova=MiB)
    taken.map(0, PAGE, iova=IOVA + MiB)  # where the second has a region
    was = first.attach(old)
    assert second.attach(old) is was
    before = state(old), state(taken)
    with refused(errno.EADDRINUSE):
        first.replace(taken)
    assert (state(old), state(taken)) == before and taken.iova_ranges() == [Span(0, LAST)]
    assert first.replace(old) is was, "it is there already"
    now = first.replace(new)
    assert [device.reads(MiB) for device in devices] == [MiB, MiB]
    assert now.users == 2 and old.hwpts == [] and old.iova_ranges() == [Span(0, LAST)]
    for iova in (IOVA, IOVA + MiB):
        with refused(errno.EINVAL):
            new.map(0, PAGE, iova=iova)
        old.map(0, PAGE, iova=iova)
    second.detach()
    new.map(0, PAGE, iova=IOVA + MiB)
    assert devices[1].reads(MiB) == MiB, "its group is attached still"
    with refused(errno.EINVAL):
        second.replace(old)
    first.detach()
    assert devices[0].reads(MiB) is None and new.iova_ranges() == [Span(0, LAST)]


def test_replace_within_an_ioas(world: World, context: Context, ioas: Ioas) -> None:
    device = world.add(world.iommu())
    bound = Bound(context, device.endpoint)
    bound.attach(ioas)
    ioas.map(0, PAGE, iova=IOVA)
    ranges = ioas.iova_ranges()
    tracking = bound.hwpt_alloc(ioas, AllocFlags.DIRTY_TRACKING)
    bound.replace(tracking)
    assert ioas.hwpts == [tracking] and ioas.iova_ranges() == ranges and device.reads(IOVA) == 0
    bad = Bound(context, world.add(world.iommu("pamu")).endpoint).hwpt_alloc(Ioas(context))
    with refused(errno.EINVAL):
        bound.replace(bad)
    assert bad.users == 0 and bad.ioas.iova_ranges() == [bad.paging.aperture]
    assert device.reads(IOVA) == 0 and ioas.iova_ranges() == ranges


def test_replace_is_seamless(world: World, context: Context) -> None:
    device = world.add(world.iommu())
    bound = Bound(context, device.endpoint)
    spaces = [Ioas(context), Ioas(context)]
    hwpts = [bound.hwpt_alloc(space) for space in spaces]
    for space in spaces:
        space.map(0, PAGE, iova=IOVA)
    bound.attach(hwpts[0])
    stop, faults, reads = threading.Event(), list[DmaFault](), [0]

    def run() -> None:
        while not stop.is_set():
            try:
                device.dma.read(IOVA, 8)
                reads[0] += 1
            except DmaFault as fault:
                faults.append(fault)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        end = time.monotonic() + 0.2
        n = 0
        while time.monotonic() < end:
            bound.replace(hwpts[n := 1 - n])
    finally:
        stop.set()
        thread.join()
    assert reads[0] > 100 and not faults


# ---- PASIDs ----------------------------------------------------------------------------------------


def test_pasids(world: World, context: Context, ioas: Ioas) -> None:
    device = world.add(world.iommu())
    bound, other = Bound(context, device.endpoint), Ioas(context)
    base = bound.hwpt_alloc(ioas, AllocFlags.PASID)
    special = bound.hwpt_alloc(other, AllocFlags.PASID)
    ioas.map(0, PAGE, iova=IOVA)
    other.map(MiB, PAGE, iova=IOVA)
    bound.attach(base)
    bound.attach(special, 5)
    assert device.reads(IOVA) == 0 and device.reads(IOVA, 5) == MiB and device.reads(IOVA, 6) is None
    assert other.iova_ranges() == [special.paging.aperture], "regions are the device's, not the PASID's"
    other.map(2 * MiB, PAGE, iova=MSI.start)
    assert device.reads(MSI.start, 5) == 2 * MiB
    with refused(errno.EBUSY):
        bound.attach(base, 5)
    for pasid in (0, 1 << 20, -1):
        with refused(errno.EINVAL):
            bound.attach(special, pasid)
    bound.replace(base, 5)
    assert device.reads(IOVA, 5) == 0 and special.users == 0
    with refused(errno.EINVAL):
        bound.replace(base, 6)
    with refused(errno.EBUSY):
        bound.destroy()
    bound.detach()
    assert device.reads(IOVA) is None and device.reads(IOVA, 5) == 0
    bound.detach(5)
    assert device.reads(IOVA, 5) is None
    bound.detach(5)  # as drivers/vfio/iommufd.c:223: nothing happens
    bound.destroy()
    with refused(errno.ENOENT):
        bound.detach(5)


def test_only_hwpts_for_pasids_meet_pasids(world: World, context: Context, ioas: Ioas) -> None:
    device = world.add(world.iommu())
    bound = Bound(context, device.endpoint)
    plain, special = bound.hwpt_alloc(ioas), bound.hwpt_alloc(ioas, AllocFlags.PASID)
    ioas.map(0, PAGE, iova=IOVA)
    before = state(ioas)
    for target in (plain, ioas):
        with refused(errno.EINVAL):
            bound.attach(target, 5)
    assert state(ioas) == before and not device.group.pasids
    bound.attach(plain)
    ranges = ioas.iova_ranges()
    with refused(errno.EINVAL):
        bound.attach(special, 5)
    assert ioas.iova_ranges() == ranges, "what the device reserves stays"
    bound.replace(special)
    bound.attach(special, 5)
    for target in (plain, ioas):
        with refused(errno.EINVAL):
            bound.replace(target)
        with refused(errno.EINVAL):
            bound.replace(target, 5)
    assert ioas.iova_ranges() == ranges and special.users == 2 and ioas.hwpts == [plain, special]
    bound.detach()
    with refused(errno.EINVAL):
        bound.attach(plain)
    assert device.reads(IOVA) is None and device.reads(IOVA, 5) == 0
    without = Bound(context, world.add(world.iommu(pasid_bits=0)).endpoint)
    with refused(errno.EOPNOTSUPP):
        without.attach(special, 5)
    assert special.users == 1


# ---- nested ----------------------------------------------------------------------------------------


def put_table(world: World, at: int, iova: int, page: int) -> None:
    """Four levels at `at` and on in RAM; addresses in it, and of the page, are the parent's IOVAs: MiB less."""
    for level in (4, 3, 2, 1):
        entry = TO_PAGE[TableFormat.X86](1) | page if level == 1 else TO_TABLE[TableFormat.X86](0) | (at + PAGE - MiB)
        slot = at + 8 * index(iova, level)
        world.ram[slot : slot + 8] = entry.to_bytes(8, "little")
        at += PAGE


def test_nested(world: World, context: Context, ioas: Ioas) -> None:
    device = world.add(world.iommu())
    bound = Bound(context, device.endpoint)
    parent = bound.hwpt_alloc(ioas, AllocFlags.NEST_PARENT | AllocFlags.DIRTY_TRACKING)
    ioas.map(MiB, 2 * MiB, iova=0)
    put_table(world, MiB + 4 * PAGE, IOVA, 64 * PAGE)
    nested = bound.hwpt_alloc(parent, table=table(4 * PAGE), memory=world.memory)
    assert nested.paging is parent.paging and nested.ioas is ioas and parent.users == 1
    bound.attach(nested)
    assert ioas.iova_ranges()[0].last == MSI.start - 1, "regions are reserved in the parent's IOAS"
    parent.set_dirty_tracking(True)
    device.dma.write(IOVA + 8, b"nested!")
    assert world.ram[MiB + 64 * PAGE + 8 :][:7] == b"nested!"
    # The walk has set accessed flags in the tables, too.
    assert bits(parent.get_dirty_bitmap(Span.sized(0, 128 * PAGE))) == {4, 5, 6, 7, 64}
    with refused(errno.ENOENT):
        nested.set_dirty_tracking(True)
    with refused(errno.ENOENT):
        nested.get_dirty_bitmap(Span.sized(0, PAGE))
    with refused(errno.EINVAL):
        parent.invalidate()
    put_table(world, MiB + 4 * PAGE, IOVA, 65 * PAGE)
    nested.invalidate(Span.sized(IOVA, PAGE))
    device.dma.write(IOVA, b"moved")
    assert world.ram[MiB + 65 * PAGE :][:5] == b"moved"
    ioas.unmap_all()
    with pytest.raises(DmaFault):
        device.dma.read(IOVA, 8)
    with refused(errno.EBUSY):
        nested.destroy()
    with refused(errno.EBUSY):
        parent.destroy()
    bound.replace(parent)
    nested.destroy()
    with refused(errno.EBUSY):
        ioas.destroy()


def test_destroy_order(world: World, context: Context, ioas: Ioas) -> None:
    bound = Bound(context, world.add(world.iommu()).endpoint)
    fault = FaultObject(context)
    parent = bound.hwpt_alloc(ioas, AllocFlags.NEST_PARENT)
    nested = bound.hwpt_alloc(parent, table=table(), memory=world.memory, fault=fault)
    for used in (fault, parent, ioas):
        with refused(errno.EBUSY):
            context.destroy(used.id)
        assert context[used.id] is used
    for item in (nested, fault, parent, ioas, bound):
        context.destroy(item.id)
        with refused(errno.ENOENT):
            item.destroy()
        with refused(errno.ENOENT):
            context[item.id]
    assert not context._objects
    for call in (
        lambda: ioas.map(0, PAGE),
        lambda: ioas.unmap(0, PAGE),
        ioas.unmap_all,
        lambda: ioas.allow_iovas([]),
        lambda: parent.set_dirty_tracking(False),
    ):
        with refused(errno.ENOENT):
            call()


# ---- dirty tracking --------------------------------------------------------------------------------


def bits(bitmap: bytes) -> set[int]:
    value = int.from_bytes(bitmap, "little")
    return {n for n in range(value.bit_length()) if value >> n & 1}


def test_dirty_tracking_of_a_hwpt(world: World, context: Context, ioas: Ioas) -> None:
    device = world.add(world.iommu())
    bound = Bound(context, device.endpoint)
    plain, tracking = bound.hwpt_alloc(ioas), bound.hwpt_alloc(ioas, AllocFlags.DIRTY_TRACKING)
    ioas.map(0, MiB, iova=IOVA)
    area = Span.sized(IOVA, MiB)
    for call in (lambda: plain.set_dirty_tracking(True), lambda: plain.get_dirty_bitmap(area)):
        with refused(errno.EOPNOTSUPP):
            call()
    with refused(errno.EINVAL):
        tracking.get_dirty_bitmap(area)
    bound.attach(tracking)
    tracking.set_dirty_tracking(True)
    device.dma.write(IOVA + 3 * PAGE, b"x")
    device.dma.write(IOVA + 9 * PAGE, b"x")
    assert bits(tracking.get_dirty_bitmap(area, clear=False)) == {3, 9}
    assert bits(tracking.get_dirty_bitmap(Span.sized(IOVA, 4 * PAGE))) == {3}
    assert bits(tracking.get_dirty_bitmap(area)) == {9} and bits(tracking.get_dirty_bitmap(area)) == set()
    beyond, odd = Span.sized(IOVA + MiB - PAGE, 2 * PAGE), Span.sized(IOVA + 1, PAGE)
    for span, page in ((area, 0), (area, 3 * PAGE), (odd, PAGE), (area, 2 * MiB), (beyond, PAGE)):
        with refused(errno.EINVAL):
            tracking.get_dirty_bitmap(span, page)
    device.dma.write(IOVA, b"x")
    tracking.set_dirty_tracking(True)  # once more: the log is empty again (Linux iopt_set_dirty_tracking)
    assert bits(tracking.get_dirty_bitmap(area)) == set()
    tracking.set_dirty_tracking(False)
    with refused(errno.EINVAL):
        tracking.get_dirty_bitmap(area)


def test_dma_that_is_not_coherent(world: World, context: Context) -> None:
    """Linux iommufd_bind_iommu: without IOMMU_CAP_CACHE_COHERENCY no bind, as users cannot flush caches."""
    smmu = world.add(world.iommu("smmu-v3", coherent=False))
    with refused(errno.EINVAL):
        Bound(context, smmu.endpoint)
    assert smmu.group.owner is None
    Bound(context, world.add(world.iommu("vt-d", coherent=False)).endpoint)  # only its walks are not


def test_msis_that_are_not_isolated(world: World, context: Context) -> None:
    """Linux iommufd_bind_iommu: EPERM, unless the parameter allow_unsafe_interrupts is set."""
    device = world.add(world.iommu(isolated_msi=False))
    with refused(errno.EPERM):
        Bound(context, device.endpoint)
    assert device.group.owner is None and context.devices == []
    Bound(Context(allow_unsafe_interrupts=True), device.endpoint)


def test_msi_isolation_of_each_kind() -> None:
    """Linux sets IRQ_DOMAIN_FLAG_ISOLATED_MSI for the interrupt remapping of Intel and AMD, and for the ITS of Arm."""
    isolated = [kind for kind in sorted(KINDS) if KINDS[kind].default.isolated_msi]
    assert isolated == ["amd-vi", "smmu-v3", "vt-d"]


def test_dirty_tracking_of_an_ioas(world: World, context: Context, ioas: Ioas) -> None:
    devices = [world.add(world.iommu(kind)) for kind in ("vt-d", "smmu-v3")]
    bound = [Bound(context, device.endpoint) for device in devices]
    hwpts = [b.hwpt_alloc(ioas, AllocFlags.DIRTY_TRACKING) for b in bound]
    for b, hwpt in zip(bound, hwpts, strict=True):
        b.attach(hwpt)
    ioas.map(0, MiB, iova=IOVA)
    area = Span.sized(IOVA, MiB)
    plain = bound[0].hwpt_alloc(ioas)
    with refused(errno.EOPNOTSUPP):
        ioas.set_dirty_tracking(True)
    assert not any(hwpt.paging.tracking for hwpt in hwpts)
    plain.destroy()
    ioas.set_dirty_tracking(True)
    for n, device in enumerate(devices):
        device.dma.write(IOVA + n * PAGE, b"x")
    assert bits(ioas.get_dirty_bitmap(area, clear=False)) == {0, 1}
    hwpts[1].set_dirty_tracking(False)
    with refused(errno.EINVAL):  # and the first one's log is not lost over it
        ioas.get_dirty_bitmap(area)
    assert bits(hwpts[0].get_dirty_bitmap(area)) == {0}
    ioas.set_dirty_tracking(False)
    assert not hwpts[0].paging.tracking


def test_pages_that_no_cpu_has(world: World, context: Context, ioas: Ioas) -> None:
    """iopt_table_add_domain: EINVAL if a page of the CPU cannot be mapped; no kernel has larger ones than 64 KiB."""
    for size, fits in ((64 * KiB, True), (128 * KiB, False)):
        device = Bound(context, world.add(world.iommu(page_sizes=frozenset((size, 2 * size)))).endpoint)
        if fits:
            device.attach(ioas)
            device.detach()
        else:
            with refused(errno.EINVAL):
                device.attach(ioas)
            assert ioas.hwpts == []


# ---- page requests ---------------------------------------------------------------------------------


@contextmanager
def answering(fault: FaultObject, answer: Callable[[PageRequest], None]) -> Iterator[list[PageRequest]]:
    """A thread that takes each request to `answer`; those that there were."""
    seen, stop, errors = list[PageRequest](), threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not stop.is_set():
                for request in fault.read(0.02):
                    seen.append(request)
                    answer(request)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
    assert not errors, errors


def faulting(world: World, context: Context, ioas: Ioas, timeout: float = 5.0) -> tuple[Device, Bound, FaultObject]:
    device, fault = world.add(world.iommu()), FaultObject(context, timeout)
    bound = Bound(context, device.endpoint)
    bound.attach(bound.hwpt_alloc(ioas, AllocFlags.PASID, fault=fault))
    return device, bound, fault


def test_a_request_that_is_met(world: World, context: Context, ioas: Ioas) -> None:
    device, bound, fault = faulting(world, context, ioas)
    bound.attach(bound.hwpt_alloc(ioas, AllocFlags.PASID, fault=fault), 3)

    def answer(request: PageRequest) -> None:
        page = request.iova & -PAGE
        ioas.map(page - IOVA, PAGE, request.access, page)
        fault.respond(request, PageResponse.SUCCESS)
        with refused(errno.EINVAL):  # once is enough
            fault.respond(request, PageResponse.SUCCESS)

    with answering(fault, answer) as seen:
        assert device.reads(IOVA + PAGE + 8) == 0, "in the middle of its page"
        assert device.reads(IOVA + 2 * PAGE, 3) == 2 * PAGE
        device.dma.write(IOVA + 4 * PAGE - 4, b"two page")
    assert world.ram[4 * PAGE - 4 : 4 * PAGE + 4] == b"two page"
    assert [(r.requester, r.pasid, r.iova, r.access) for r in seen] == [
        (device.endpoint.name, None, IOVA + PAGE + 8, R),
        (device.endpoint.name, 3, IOVA + 2 * PAGE, R),
        (device.endpoint.name, None, IOVA + 4 * PAGE - 4, W),
        (device.endpoint.name, None, IOVA + 4 * PAGE, W),
    ]
    assert len({r.group_index for r in seen}) == 4
    assert not device.endpoint.iommu.faults.total  # type: ignore[union-attr]


def test_a_request_that_is_refused(world: World, context: Context, ioas: Ioas) -> None:
    device, _, fault = faulting(world, context, ioas)

    def answer(request: PageRequest) -> None:
        with refused(errno.EINVAL):
            fault.respond(request, PageResponse.FAILURE)
        fault.respond(request, PageResponse.INVALID)

    with answering(fault, answer) as seen:
        assert device.reads(IOVA) is None and device.reads(IOVA) is None
    assert len(seen) == 2, "INVALID is about one access"
    assert device.endpoint.iommu.faults.total == 2  # type: ignore[union-attr]


def test_a_request_without_reply(world: World, context: Context, ioas: Ioas) -> None:
    device, _, fault = faulting(world, context, ioas, timeout=0.05)
    begin = time.monotonic()
    assert device.reads(IOVA) is None
    assert 0.05 <= time.monotonic() - begin < patience(5)
    assert fault.read() == [], "nobody waits any more"
    with answering(fault, lambda request: None) as seen:
        assert device.reads(IOVA) is None
    with refused(errno.EINVAL):  # too late
        fault.respond(seen[0], PageResponse.SUCCESS)


def test_a_request_that_nobody_has_read(world: World, context: Context, ioas: Ioas) -> None:
    fault = FaultObject(context, 0.2)
    request = PageRequest("x", None, 0, R, 1)
    found = list[PageResponse]()
    thread = threading.Thread(target=lambda: found.append(fault.handle(request)))
    thread.start()
    until(lambda: fault._waiting, "the request")
    with refused(errno.EINVAL):
        fault.respond(request, PageResponse.SUCCESS)
    assert fault.read() == [request]
    fault.respond(request, PageResponse.SUCCESS)
    thread.join()
    assert found == [PageResponse.SUCCESS]


def test_equal_requests_are_told_apart(context: Context) -> None:
    """Two devices of one name."""
    fault = FaultObject(context)
    requests = [PageRequest("", None, 0, R, 1) for _ in range(2)]
    found: list[PageResponse | None] = [None, None]

    def ask(n: int) -> None:
        found[n] = fault.handle(requests[n])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    read: list[PageRequest] = []
    until(lambda: read.extend(fault.read(0.1)) or len(read) == 2, "both requests")
    fault.respond(requests[1], PageResponse.SUCCESS)
    fault.respond(requests[0], PageResponse.INVALID)
    for thread in threads:
        thread.join()
    assert found == [PageResponse.INVALID, PageResponse.SUCCESS]


@pytest.mark.parametrize("how", ["detach", "replace", "removal", "another domain of the group's"])
def test_who_waits_when_the_hwpt_goes(world: World, context: Context, ioas: Ioas, how: str) -> None:
    device, bound, fault = faulting(world, context, ioas, timeout=30)
    begin, got = time.monotonic(), list[int | None]()
    thread = threading.Thread(target=lambda: got.append(device.reads(IOVA)))
    thread.start()
    requests = until(lambda: fault.read(0.01), "the page request")
    if how == "detach":
        bound.detach()
    elif how == "replace":
        bound.replace(bound.hwpt_alloc(ioas))
    elif how == "removal":
        world.system.remove(device.endpoint)
    else:
        device.group.replace(device.group.iommu.blocked)
    thread.join()
    assert got == [None] and time.monotonic() - begin < patience(5)
    with refused(errno.EINVAL):
        fault.respond(requests[0], PageResponse.SUCCESS)


@pytest.mark.parametrize("how", ["detach", "replace", "close"])
def test_who_asks_just_after_the_hwpt_has_gone(world: World, context: Context, ioas: Ioas, how: str) -> None:
    """The access found no page before, and asks when the device has been detached: nobody would answer.

    Linux: a device's queue of page requests is flushed before it is detached (iopf_queue_remove_device).
    """
    device, bound, fault = faulting(world, context, ioas, timeout=600)
    domain = device.group.domain
    ask = domain.page_handler
    assert ask is not None

    def late(request: PageRequest) -> PageResponse:
        match how:
            case "detach":
                bound.detach()
            case "replace":
                bound.replace(bound.hwpt_alloc(ioas, AllocFlags.PASID))
            case _:
                context.close()
        return ask(request)

    domain.page_handler = late
    got = list[int | None]()
    thread = threading.Thread(target=lambda: got.append(device.reads(IOVA)), daemon=True)
    thread.start()
    thread.join(patience(10))
    assert got == [None] and not thread.is_alive()
    if how == "close":
        with refused(errno.ENOENT):
            fault.read()
    else:
        assert fault.read() == []


def test_who_asks_while_the_hwpt_comes(world: World, context: Context, ioas: Ioas, monkeypatch: MonkeyPatch) -> None:
    """An access that sees the new domain asks that domain's fault object."""
    device, fault = world.add(world.iommu()), FaultObject(context, timeout=30)
    bound = Bound(context, device.endpoint)
    hwpt = bound.hwpt_alloc(ioas, fault=fault)
    plain = device.endpoint.attach
    got = list[int | None]()
    thread = threading.Thread(target=lambda: got.append(device.reads(IOVA)), daemon=True)

    def attach(domain: Domain | None, pasid: int | None = None) -> None:
        plain(domain, pasid)
        thread.start()
        thread.join(0.2)  # its access is over before the group says that it has the domain

    monkeypatch.setattr(device.endpoint, "attach", attach)
    bound.attach(hwpt)
    monkeypatch.undo()
    ioas.map(PAGE, PAGE, iova=IOVA)
    fault.respond(until(fault.read, "a page request")[0], PageResponse.SUCCESS)
    thread.join(patience(10))
    assert got == [PAGE]


def test_who_waits_with_another_pasid_goes_on_waiting(world: World, context: Context, ioas: Ioas) -> None:
    device, bound, fault = faulting(world, context, ioas, timeout=30)
    bound.attach(ioas.hwpts[0], 3)
    got = list[int | None]()
    thread = threading.Thread(target=lambda: got.append(device.reads(IOVA, 3)))
    thread.start()
    requests = until(lambda: fault.read(0.01), "the page request")
    bound.detach()
    ioas.map(PAGE, PAGE, iova=IOVA)
    fault.respond(requests[0], PageResponse.SUCCESS)
    thread.join()
    assert got == [PAGE]


def test_devices_without_page_requests(world: World, context: Context, ioas: Ioas) -> None:
    _, bound, _ = faulting(world, context, ioas)
    other = Bound(context, world.add(world.iommu(page_requests=False)).endpoint)
    hwpt: Hwpt = ioas.hwpts[0]
    before = state(ioas)
    with refused(errno.EOPNOTSUPP):
        other.attach(hwpt)
    assert state(ioas) == before and bound.group.domain is hwpt.domain
    assert other.group.domain.type is DomainType.BLOCKED


# ---- two mistakes at once: Linux's order of checks ---------------------------------------------


def test_what_was_destroyed_comes_first(world: World, context: Context, ioas: Ioas) -> None:
    """Linux iommufd_device_change_pt looks the target up before the device's attachment; iommufd_get_ioas."""
    bound = Bound(context, world.add(world.iommu()).endpoint)
    gone = Ioas(context)
    gone.destroy()
    with refused(errno.ENOENT):
        bound.replace(gone)
    bound.attach(ioas)
    for call in (lambda: bound.attach(gone), lambda: bound.replace(gone), gone.iova_ranges):
        with refused(errno.ENOENT):
            call()
    # iommufd_ioas_map and iommufd_ioas_copy check numbers first, iommufd_ioas_unmap looks up first.
    for call, code in (
        (lambda: gone.map(0, PAGE, iova=2**64 - 1), errno.EOVERFLOW),
        (lambda: gone.map(0, PAGE, Access(0)), errno.EINVAL),
        (lambda: gone.map(0, PAGE), errno.ENOENT),
        (lambda: ioas.copy(gone, 0, 2**64 - 1), errno.EOVERFLOW),
        (lambda: ioas.copy(gone, 0, PAGE, Access(0)), errno.EINVAL),
        (lambda: ioas.copy(gone, 0, PAGE), errno.ENOENT),
        (lambda: gone.unmap(0, 2**64), errno.ENOENT),
    ):
        with refused(code):
            call()


def test_dirty_bitmaps_in_pages_of_the_ioas(world: World, context: Context, ioas: Ioas) -> None:
    """Linux iommufd_check_iova_range: by the alignment of the IOAS, which another HWPT may have made larger."""
    bound = Bound(context, world.add(world.iommu()).endpoint)
    hwpt = bound.hwpt_alloc(ioas, AllocFlags.DIRTY_TRACKING)
    hwpt.set_dirty_tracking(True)
    ioas.map(0, 64 * KiB, iova=IOVA)
    assert hwpt.get_dirty_bitmap(Span.sized(IOVA, PAGE)) == bytes(8)
    large = Bound(context, world.add(world.iommu(page_sizes=frozenset((64 * KiB,)))).endpoint)
    large.hwpt_alloc(ioas)
    with refused(errno.EINVAL):
        hwpt.get_dirty_bitmap(Span.sized(IOVA, PAGE))
    assert hwpt.get_dirty_bitmap(Span.sized(IOVA, 64 * KiB)) == bytes(8)


def test_a_dirty_bitmap_that_is_too_large(world: World, context: Context, ioas: Ioas) -> None:
    """A mapping takes no memory by its size; its bitmap would."""
    bound = Bound(context, world.add(world.iommu()).endpoint)
    bound.attach(hwpt := bound.hwpt_alloc(ioas, AllocFlags.DIRTY_TRACKING))
    hwpt.set_dirty_tracking(True)
    huge = Span.sized(1 << 46, 1 << 46)
    ioas.map(0, huge.size, iova=huge.start)
    for call in (hwpt.get_dirty_bitmap, ioas.get_dirty_bitmap):
        with refused(errno.ENOMEM):
            call(huge)
        with refused(errno.EINVAL):
            call(huge, -PAGE)
        assert len(call(huge, 1 << 30)) == (1 << 16) // 8


def test_a_fault_object_comes_last(world: World, context: Context, ioas: Ioas) -> None:
    """Linux iommufd_hwpt_alloc looks it up when all else is done, and then gives everything back."""
    bound = Bound(context, world.add(world.iommu()).endpoint)
    gone = FaultObject(context)
    gone.destroy()
    parent = bound.hwpt_alloc(ioas, AllocFlags.NEST_PARENT)
    table = Table(TableFormat.X86, 4, 0, 48, 48)
    before = state(ioas), parent.users
    with refused(errno.EOPNOTSUPP):
        bound.hwpt_alloc(ioas, AllocFlags.NEST_PARENT, fault=gone)
    for call in (
        lambda: bound.hwpt_alloc(ioas, fault=gone),
        lambda: bound.hwpt_alloc(parent, table=table, memory=world.memory, fault=gone),
    ):
        with refused(errno.ENOENT):
            call()
    assert (state(ioas), parent.users) == before
    parent.destroy()
    ioas.map(0, PAGE, iova=1 << 40)
    narrow = Bound(context, world.add(world.iommu(input_bits=32)).endpoint)
    with refused(errno.EADDRINUSE):
        narrow.hwpt_alloc(ioas, fault=gone)
