"""The end of contexts and containers, and calls from several threads."""

from __future__ import annotations

import errno
import threading

import pytest

from tests.iommu.world import failing_attach
from tests.spaces.world import World, refused
from tests.waiting import meanwhile, until
from vmodel.errors import DmaFault, IommuError
from vmodel.iommu import paging_domain_alloc
from vmodel.iommu.container import Container
from vmodel.iommu.domain import AllocFlags, DomainType
from vmodel.iommu.iommufd import Context, FaultObject, Ioas
from vmodel.iommu.iommufd import Device as Bound
from vmodel.span import PAGE, MiB

IOVA = 16 * MiB


def test_a_context_gives_everything_back(world: World) -> None:
    """Linux: the end of a process closes the fds of its devices, then /dev/iommu, which destroys all objects."""
    first, second = world.add(iommu := world.iommu()), world.add(iommu, 1)
    with Context() as context:
        bound = [Bound(context, device.endpoint) for device in (first, second)]
        ioas = Ioas(context)
        ioas.map(0, PAGE, iova=IOVA)
        bound[0].attach(ioas)
        parent = bound[1].hwpt_alloc(ioas, AllocFlags.NEST_PARENT | AllocFlags.PASID)
        bound[1].attach(parent)
        bound[1].attach(parent, 7)
        FaultObject(context)
        assert first.reads(IOVA) == 0
    for device in (first, second):
        assert (device.group.owner, device.group.pasids) == (None, {})
        assert device.group.domain.type is DomainType.IDENTITY
    with refused(errno.EBADF):
        Bound(context, first.endpoint)
    assert first.group.owner is None
    with refused(errno.EBADF):
        Ioas(context)
    with refused(errno.ENOENT):
        ioas.map(0, PAGE)
    context.close()
    with Context() as other:
        Bound(other, first.endpoint).attach(Ioas(other))


def test_a_context_ends_while_a_page_request_waits(world: World) -> None:
    device = world.add(world.iommu())
    context = Context()
    fault = FaultObject(context, timeout=600)
    bound = Bound(context, device.endpoint)
    bound.attach(bound.hwpt_alloc(Ioas(context), fault=fault))
    reasons: list[object] = []

    def read() -> None:
        try:
            device.dma.read(IOVA, 4)
        except DmaFault as error:
            reasons.append(error.reason)

    thread = threading.Thread(target=read)
    thread.start()
    until(fault.read, "a page request")
    context.close()
    thread.join(60)
    assert not thread.is_alive() and len(reasons) == 1


def test_a_device_that_cannot_be_released_yet(world: World) -> None:
    """Its group has a domain that is not the context's.  It stays as it is, and can be released later."""
    device = world.add(world.iommu())
    with Context() as context:
        bound = Bound(context, device.endpoint)
        device.group.attach(paging_domain_alloc(device.endpoint))
        for call in (bound.destroy, context.close):
            with refused(errno.EBUSY):
                call()
        assert (context.devices, context.find(bound.id), device.group.owner) == ([bound], bound, context)
        device.group.detach()
    assert (context.devices, device.group.owner) == ([], None)


def test_a_container_gives_its_groups_back(world: World) -> None:
    first, second = world.add(world.iommu()), world.add(world.iommu("pamu"))
    with Container() as container:
        for device in (first, second):
            container.add_group(device.group)
        container.map(IOVA, 0, PAGE)
        assert first.reads(IOVA) == 0
    assert [device.group.owner for device in (first, second)] == [None, None]
    assert container.groups == []
    with refused(errno.EBADF):
        container.add_group(first.group)
    container.close()
    with Container() as other:
        other.add_group(first.group)


def everything(context: Context, *spaces: Ioas) -> list[object]:
    counted = [(space.users, len(space.hwpts), space.iova_ranges(), space.mappings()) for space in spaces]
    attached = {key: hwpt.id for key, hwpt in context.attached.items()}
    return [counted, attached, [device.users for device in context.devices], sorted(context._objects)]


@pytest.mark.parametrize("how", ["attach", "replace", "attach a PASID", "replace of a PASID"])
def test_no_memory_for_an_attachment(world: World, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Nothing changes, and it can be tried again."""
    device = world.add(world.iommu())
    with Context() as context:
        old, new = Ioas(context), Ioas(context)
        bound = Bound(context, device.endpoint)
        hwpt = bound.hwpt_alloc(new, AllocFlags.PASID)
        first = bound.hwpt_alloc(old, AllocFlags.PASID)
        if how == "replace":
            bound.attach(old)
        if how == "replace of a PASID":
            bound.attach(first, 7)
        before = everything(context, old, new)

        def call() -> None:
            match how:
                case "attach":
                    bound.attach(new)
                case "replace":
                    bound.replace(new)
                case "attach a PASID":
                    bound.attach(hwpt, 7)
                case _:
                    bound.replace(hwpt, 7)

        with failing_attach(monkeypatch, 1), pytest.raises(OSError, match="no memory"):
            call()
        assert everything(context, old, new) == before
        call()
        assert everything(context, old, new) != before


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["iommufd", "type 1"])
def test_the_end_when_memory_runs_out(world: World, monkeypatch: pytest.MonkeyPatch, kind: str, nth: int) -> None:
    """Whatever is missing, the end of a process ends its DMA, and the groups have no owner."""
    devices = [world.add(iommu := world.iommu()), world.add(iommu, 1)]
    space: Context | Container
    if kind == "iommufd":
        space = Context()
        ioas = Ioas(space)
        for device in devices:
            Bound(space, device.endpoint).attach(ioas)
        ioas.map(0, PAGE, iova=IOVA)
    else:
        space = Container()
        for device in devices:
            space.add_group(device.group)
        space.map(IOVA, 0, PAGE)
    assert [device.reads(IOVA) for device in devices] == [0, 0]
    with failing_attach(monkeypatch, nth):
        space.close()
    assert [device.reads(IOVA) for device in devices] == [None, None]
    assert [device.group.owner for device in devices] == [None, None]


def test_a_container_without_memory_for_a_group(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    device, container = world.add(world.iommu()), Container()
    with failing_attach(monkeypatch, 2), pytest.raises(OSError, match="no memory"):  # the first one is the claim's
        container.add_group(device.group)
    assert (device.group.owner, container.groups, device.group.domain.type) == (None, [], DomainType.IDENTITY)
    container.add_group(device.group)


def test_questions_from_several_threads(world: World) -> None:
    """A container has an answer while its groups come and go."""
    devices = [world.add(world.iommu(kind)) for kind in ("vt-d", "amd-vi", "smmu-v3")]
    container, asked = Container(), [0]

    def ask() -> None:
        try:
            assert container.page_sizes and container.iova_ranges and container.dma_avail
        except IommuError as error:
            assert error.errno == errno.EINVAL  # it has no group
        assert len(container.domains) <= 3 and container.coherent in (False, True)
        asked[0] += 1

    with meanwhile(ask, ask):
        until(lambda: asked[0] > 100, "a hundred questions")
        for _ in range(300):
            for device in devices:
                container.add_group(device.group)
            for device in devices:
                container.remove_group(device.group)


@pytest.mark.parametrize("kind", ["iommufd", "type 1"])
def test_calls_from_several_threads(world: World, kind: str) -> None:
    """Each thread maps and unmaps; what is mapped in the end is the same in the space and in its domains."""
    devices = [world.add(world.iommu(kind)) for kind in ("vt-d", "amd-vi")]
    spaces: list[Ioas | Container] = []
    if kind == "iommufd":
        context = Context()
        spaces.append(ioas := Ioas(context))
        for device in devices:
            Bound(context, device.endpoint).attach(ioas)
    else:
        spaces.append(container := Container())
        for device in devices:
            container.add_group(device.group)
    (space,) = spaces
    counts = [0] * 4

    def work(n: int) -> None:
        iova = IOVA + counts[n] % 8 * PAGE  # all threads have the same eight pages
        try:
            if isinstance(space, Ioas):
                space.map(n * PAGE, PAGE, iova=iova)
            else:
                space.map(iova, n * PAGE, PAGE)
        except IommuError as error:
            assert error.errno == errno.EEXIST
        else:
            if counts[n] % 3:
                space.unmap(iova, PAGE)
        counts[n] += 1
        if counts[n] % 5 == 0 and isinstance(space, Container):
            space.unmap_all()

    with meanwhile(*((lambda n=n: work(n)) for n in range(4))):
        until(lambda: min(counts) > 200, "200 calls of each thread", 60)
    wanted = space.mappings()
    assert [list(device.group.domain.mappings()) for device in devices] == [wanted] * 2  # type: ignore[attr-defined]
    space.unmap_all()
    assert [device.reads(IOVA) for device in devices] == [None] * 2
