"""Pinned memory counts once, against the limit of whoever mapped it."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.spaces.world import World, refused
from vmodel.iommu import AllocFlags
from vmodel.iommu.iommufd import (
    Context,
    Device,
    DmaBuf,
    Ioas,
    KernelAccess,
    MemoryFile,
    Option,
    Process,
    User,
    VfioCompat,
)
from vmodel.iommu.iommufd.vfio_compat import Extension, VfioUnmapFlags
from vmodel.span import PAGE, MiB, Span

IOVA = 1 << 24
FILE = MemoryFile(MiB, MiB)


def with_limit(pages: int, **changes: bool) -> Context:
    return Context(process=Process(locked_limit=pages * PAGE, **changes))


def attached(world: World, context: Context, ioas: Ioas) -> Device:
    device = Device(context, world.add(world.iommu()).endpoint)
    device.attach(ioas)
    return device


def access_to(world: World, ioas: Ioas) -> KernelAccess:
    access = KernelAccess(ioas.context, world.memory, lambda iova, size: None)
    access.attach(ioas)
    return access


def locked(context: Context) -> int:
    """Pages that count for the user, all of which are pinned."""
    assert context.process.pinned == context.process.user.locked
    return context.process.pinned


def test_a_mapping_counts_with_an_iommu(world: World) -> None:
    """iopt_area_fill_domains: one mapping in two HWPTs counts once; without one it does not count."""
    context = with_limit(4)
    ioas = Ioas(context)
    ioas.map(0, 3 * PAGE, iova=IOVA)
    assert locked(context) == 0
    one, two = attached(world, context, ioas), Device(context, world.add(world.iommu()).endpoint)
    two.attach(two.hwpt_alloc(ioas))
    assert len(ioas.hwpts) == 2 and locked(context) == 3
    with refused(errno.ENOMEM):
        ioas.map(0, 2 * PAGE, iova=IOVA + 3 * PAGE)
    assert locked(context) == 3 and len(ioas.mappings()) == 1 and len(ioas.hwpts[0].paging) == 1
    ioas.map(0, PAGE, iova=IOVA + 3 * PAGE)
    assert locked(context) == 4
    one.detach()
    assert locked(context) == 4
    two.detach()
    ioas.hwpts[0].destroy()
    assert locked(context) == 0 and len(ioas.mappings()) == 2


def test_a_hwpt_that_would_exceed_the_limit(world: World) -> None:
    """iopt_fill_domain: nothing changes."""
    context = with_limit(4)
    ioas = Ioas(context)
    for n in range(3):
        ioas.map(0, 2 * PAGE, iova=IOVA + n * 2 * PAGE)
    device = Device(context, world.add(world.iommu()).endpoint)
    for call in (device.attach, device.hwpt_alloc):
        with refused(errno.ENOMEM):
            call(ioas)
    assert locked(context) == 0 and ioas.hwpts == [] and ioas.users == 0
    ioas.unmap(IOVA, 2 * PAGE)
    device.attach(ioas)
    assert locked(context) == 4


def test_copies_share_pages(world: World) -> None:
    """struct iopt_pages: copies count once, also in another IOAS and in part; a second map of the same memory twice."""
    context = with_limit(9)
    source, target = Ioas(context), Ioas(context)
    for ioas in (source, target):
        attached(world, context, ioas)
    source.map(0, 4 * PAGE, iova=IOVA)
    target.copy(source, IOVA + PAGE, 2 * PAGE, iova=IOVA)
    target.copy(target, IOVA, PAGE, iova=IOVA + 8 * PAGE)
    assert locked(context) == 4
    source.unmap_all()
    assert locked(context) == 2
    target.unmap(IOVA, 2 * PAGE)
    assert locked(context) == 1
    source.map(PAGE, PAGE)
    assert locked(context) == 2
    target.unmap_all()
    source.unmap_all()
    assert locked(context) == 0


def test_a_copy_that_would_exceed_the_limit(world: World) -> None:
    """A copy of several mappings is made as a whole, or not at all."""
    context = with_limit(3)
    source, target = Ioas(context), Ioas(context)
    attached(world, context, target)
    for n in range(2):
        source.map(0, 2 * PAGE, iova=IOVA + n * 2 * PAGE)
    with refused(errno.ENOMEM):
        target.copy(source, IOVA, 4 * PAGE)
    assert locked(context) == 0 and target.mappings() == [] and len(target.hwpts[0].paging) == 0
    target.copy(source, IOVA + PAGE, 2 * PAGE)
    assert locked(context) == 2


def test_pins_of_accesses_share_pages(world: World) -> None:
    """iopt_pages_fill_xarray: what an access pins counts where no HWPT has it, and stays when that goes."""
    context = with_limit(4)
    ioas = Ioas(context)
    access = access_to(world, ioas)
    ioas.map(0, 8 * PAGE, iova=IOVA)
    access.pin_pages(IOVA, 2 * PAGE)
    access.pin_pages(IOVA + PAGE, 3 * PAGE)
    assert locked(context) == 4
    for call in (lambda: access.pin_pages(IOVA + 3 * PAGE, 2 * PAGE), lambda: attached(world, context, ioas)):
        with refused(errno.ENOMEM):
            call()
    assert locked(context) == 4
    access.unpin_pages(IOVA, 2 * PAGE)
    assert locked(context) == 3
    access.read(IOVA + 4 * PAGE, 4 * PAGE)
    assert locked(context) == 3, "to read is not to pin"
    context.process.locked_limit = None
    device = attached(world, context, ioas)
    assert locked(context) == 8
    access.unpin_pages(IOVA + PAGE, 3 * PAGE)
    access.pin_pages(IOVA, PAGE)
    device.detach()
    assert locked(context) == 1
    access.unpin_pages(IOVA, PAGE)
    assert locked(context) == 0


def test_half_pages_count_as_whole_ones(world: World) -> None:
    context = with_limit(2)
    ioas = Ioas(context)
    access = access_to(world, ioas)
    ioas.map(0, 2 * PAGE, iova=IOVA)
    access.pin_pages(IOVA, PAGE + 1)
    assert locked(context) == 2


@pytest.mark.parametrize("mode", [0, 1])
def test_processes_of_one_user(world: World, mode: int) -> None:
    """incr_user_locked_vm: a user's processes share what is counted; __account_locked_vm: each has its own."""
    user = User()
    contexts = [Context(process=Process(user, locked_limit=2 * PAGE, sys_resource=True)) for _ in range(2)]
    spaces = []
    for context in contexts:
        context.set_option(Option.RLIMIT_MODE, mode)
        spaces.append(Ioas(context))
        attached(world, context, spaces[-1])
    spaces[0].map(0, 2 * PAGE)
    if mode:
        spaces[1].map(0, 2 * PAGE)
        assert (user.locked, contexts[0].process.locked, contexts[1].process.locked) == (0, 2, 2)
    else:
        with refused(errno.ENOMEM):
            spaces[1].map(0, PAGE)
        assert (user.locked, contexts[0].process.locked, contexts[1].process.pinned) == (2, 0, 0)
        contexts[0].close()
        spaces[1].map(0, 2 * PAGE)
    for context in contexts:
        context.close()
    assert user.locked == 0 and not any(context.process.locked or context.process.pinned for context in contexts)


def test_cap_ipc_lock_counts_nothing(world: World) -> None:
    """iopt_alloc_pages: mode NONE; RLIMIT_MODE does not change that (iopt_map_common)."""
    context = with_limit(0, ipc_lock=True, sys_resource=True)
    context.set_option(Option.RLIMIT_MODE, 1)
    ioas = Ioas(context)
    attached(world, context, ioas)
    ioas.map(0, 2 * PAGE)
    process = context.process
    assert (process.pinned, process.locked, process.user.locked) == (2, 0, 0)
    ioas.unmap_all()
    assert process.pinned == 0


def test_dmabufs_count_nothing(world: World) -> None:
    context = with_limit(0)
    ioas = Ioas(context)
    device, buffer = attached(world, context, ioas), DmaBuf(0, 2 * PAGE)
    ioas.map_file(buffer, 0, 2 * PAGE, iova=IOVA)
    device.detach()
    assert locked(context) == 0
    device.attach(ioas)
    buffer.revoke()
    ioas.unmap_all()
    assert locked(context) == 0


def test_change_process_moves_what_is_pinned(world: World) -> None:
    """iommufd_ioas_change_process: of all IOASes, once for shared pages; ENOMEM changes nothing."""
    old = Process()
    context = Context(process=old)
    spaces = [Ioas(context), Ioas(context)]
    attached(world, context, spaces[0])
    spaces[0].map_file(FILE, 0, 2 * PAGE, iova=IOVA)
    spaces[1].copy(spaces[0], IOVA, PAGE)
    spaces[1].map_file(FILE, 0, 8 * PAGE)
    spaces[0].copy(spaces[0], IOVA, PAGE)
    poor, rich = Process(locked_limit=2 * PAGE - 1), Process(locked_limit=2 * PAGE)
    with refused(errno.ENOMEM):
        context.change_process(poor)
    assert locked(context) == 2 and context.process is old and poor.pinned == poor.user.locked == 0
    context.change_process(rich)
    assert context.process is rich and locked(context) == 2 and old.pinned == old.user.locked == 0
    with refused(errno.ENOMEM):
        spaces[0].map_file(FILE, 0, PAGE)
    old.exit()
    spaces[0].unmap_all()
    assert locked(context) == 0


def test_change_process_to_one_of_the_same_user(world: World) -> None:
    """need_charge_update: as in Linux it counts twice for a moment, so that the limit must allow that."""
    user = User()
    context = Context(process=Process(user))
    ioas = Ioas(context)
    attached(world, context, ioas)
    ioas.map_file(FILE, 0, 2 * PAGE)
    with refused(errno.ENOMEM):
        context.change_process(Process(user, locked_limit=3 * PAGE))
    context.change_process(Process(user, locked_limit=4 * PAGE))
    assert user.locked == 2


@pytest.mark.parametrize("kind", [MemoryFile, DmaBuf])
def test_files(world: World, kind: Callable[[int, int], MemoryFile]) -> None:
    """IOVAs are aligned as the offset is (iopt_alloc_area_pages); DMA gets to the file's memory, and to no more."""
    context = Context()
    ioas = Ioas(context)
    device = world.add(world.iommu())
    Device(context, device.endpoint).attach(ioas)
    file = kind(3 * PAGE, 3 * PAGE)
    assert ioas.map_file(file, 0, PAGE) == PAGE, "as gpa 3 * PAGE would not be"
    iova = ioas.map_file(file, 2 * PAGE, PAGE)
    assert iova == 2 * PAGE and device.reads(iova) == 5 * PAGE and device.reads(iova + PAGE) is None
    with refused(errno.EINVAL):
        ioas.map_file(file, 2 * PAGE, 2 * PAGE)
    for arguments in ((PAGE + 1, 4), (-PAGE, PAGE), (0, 0), (PAGE, 1 << 64)):
        with pytest.raises(ValueError, match="file of"):
            kind(*arguments)


def test_beyond_the_end_of_a_file(world: World) -> None:
    """memfd_pin_folios: EINVAL when it is pinned or read; a mapping without that is made."""
    context = Context()
    ioas = Ioas(context)
    access = access_to(world, ioas)
    ioas.map_file(MemoryFile(0, PAGE), 0, 2 * PAGE, iova=IOVA)
    assert access.pin_pages(IOVA, PAGE) == [Span(0, PAGE - 1)]
    for call in (
        lambda: access.pin_pages(IOVA + PAGE, PAGE),
        lambda: access.read(IOVA + PAGE, 1),
        lambda: attached(world, context, ioas),
    ):
        with refused(errno.EINVAL):
            call()
    assert ioas.hwpts == [] and context.process.pinned == 1


def test_dirty_bits_without_huge_pages(world: World) -> None:
    """Option.HUGE_PAGES 0: a write dirties a page of 4 KiB; 1 again: an entry of 2 MiB (batch_to_domain)."""
    context = Context()
    ioas = Ioas(context)
    device = world.add(world.iommu(dirty_tracking=True))
    bound = Device(context, device.endpoint)
    hwpt = bound.hwpt_alloc(ioas, AllocFlags.DIRTY_TRACKING)
    bound.attach(hwpt)
    context.set_option(Option.HUGE_PAGES, 0, ioas.id)
    ioas.map(0, 2 * MiB, iova=IOVA)
    context.set_option(Option.HUGE_PAGES, 1, ioas.id)
    ioas.map(0, 2 * MiB, iova=IOVA + 2 * MiB)
    hwpt.set_dirty_tracking(True)
    for at in (5 * PAGE - 1, 2 * MiB + 5 * PAGE):
        device.dma.write(IOVA + at, b"ab")
    bitmap = int.from_bytes(hwpt.get_dirty_bitmap(Span.sized(IOVA, 4 * MiB)), "little")
    assert bitmap == 0b110000 | ((1 << 512) - 1) << 512
    for iova, removed in ((IOVA + 5 * PAGE, PAGE), (IOVA + 2 * MiB + 5 * PAGE, 0)):
        assert hwpt.paging.unmap(iova, PAGE) == removed, "what of it can be unmapped"


def test_a_mapping_that_is_cut(world: World) -> None:
    """iopt_area_split: the parts of a mapping share its pages, which count until the part that has them goes."""
    context = with_limit(8)
    vfio = VfioCompat(context)
    ioas = vfio.create_ioas()
    vfio.set_iommu(Extension.TYPE1)
    attached(world, context, ioas)
    vfio.map_dma(IOVA, 0, 8 * PAGE)
    assert locked(context) == 8
    assert vfio.unmap_dma(IOVA + 2 * PAGE, 3 * PAGE) == 3 * PAGE
    assert locked(context) == 5 and len(ioas.mappings()) == 2
    with refused(errno.ENOMEM):
        vfio.map_dma(IOVA + 8 * PAGE, 0, 4 * PAGE)
    vfio.unmap_dma(IOVA + 7 * PAGE, PAGE)
    vfio.map_dma(IOVA + 2 * PAGE, 0, 3 * PAGE)
    assert locked(context) == 7
    vfio.unmap_dma(0, 0, VfioUnmapFlags.ALL)
    assert locked(context) == 0


def test_a_cut_of_a_dmabuf(world: World) -> None:
    """iopt_area_split: EOPNOTSUPP."""
    context = Context()
    ioas = Ioas(context)
    ioas.map_file(DmaBuf(0, 2 * PAGE), 0, 2 * PAGE, iova=IOVA)
    with refused(errno.EOPNOTSUPP):
        ioas.cut(IOVA + PAGE, PAGE)
    assert len(ioas.mappings()) == 1
