"""What subscribers of a System are notified of, in which order, and what waits for an owner.

The order is that of Linux 7.3: drivers/base/dd.c (really_probe, __device_release_driver), core.c (device_add,
device_del), drivers/vfio/vfio_main.c (vfio_unregister_group_dev).
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.iommu.world import World, group_of, iommu
from tests.waiting import until
from vmodel.errors import DmaFault, IommuError
from vmodel.iommu import Change, ChangeKind, Endpoint, System, dma_domain_alloc, paging_domain_alloc
from vmodel.iommu.changes import Changes
from vmodel.iommu.iommufd import Context, Device

K = ChangeKind


@pytest.fixture
def world() -> Iterator[World]:
    world = World(iommu())
    yield world
    world.close()


@pytest.fixture
def notified(world: World) -> list[Change]:
    """All changes from now on."""
    notified: list[Change] = []
    world.system.subscribe(notified.append)
    return notified


def kinds(notified: list[Change]) -> list[ChangeKind]:
    found = [change.kind for change in notified]
    notified.clear()
    return found


def refused(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(IommuError) as caught:
        call()
    assert caught.value.errno == code


def test_devices_and_groups(world: World, notified: list[Change]) -> None:
    first, _ = world.device("00:03.0")
    group = group_of(first)
    assert [(c.kind, c.endpoint, c.group) for c in notified] == [
        (K.ADD_GROUP, None, group),
        (K.ADD_DEVICE, first, group),
    ]
    notified.clear()
    second, _ = world.device("00:03.1")
    world.system.remove(first)
    assert [(c.kind, c.endpoint, c.group) for c in notified] == [
        (K.ADD_DEVICE, second, group),
        (K.DEL_DEVICE, first, group),
        (K.REMOVED_DEVICE, first, group),
    ]
    notified.clear()
    world.system.remove(second)
    assert kinds(notified) == [K.DEL_DEVICE, K.DOMAIN, K.REMOVED_DEVICE, K.REMOVED_GROUP]


def test_an_iommu_that_comes_later() -> None:
    world = World()
    notified: list[Change] = []
    world.system.subscribe(notified.append)
    endpoint, _ = world.device("00:03.0")
    assert [(c.kind, c.group) for c in notified] == [(K.ADD_DEVICE, None)]
    notified.clear()
    world.system.add_iommu(iommu())
    assert [(c.kind, c.endpoint) for c in notified] == [(K.ADD_GROUP, None), (K.ADD_DEVICE, endpoint)]
    world.close()


def test_drivers(world: World, notified: list[Change]) -> None:
    endpoint, _ = world.device("00:03.0")
    bound: list[tuple[ChangeKind, object]] = []
    world.system.subscribe(lambda change: bound.append((change.kind, endpoint.driver)))
    endpoint.bind("nvme")
    endpoint.bind("nvme")  # it is bound
    endpoint.unbind()
    endpoint.unbind()
    assert bound == [
        (K.BIND_DRIVER, None),
        (K.BOUND_DRIVER, "nvme"),
        (K.UNBIND_DRIVER, "nvme"),
        (K.UNBOUND_DRIVER, None),
    ]
    assert [change.value for change in notified[2:]] == ["nvme"] * 4


def test_a_removed_device_has_no_driver(world: World, notified: list[Change]) -> None:
    endpoint, _ = world.device("00:03.0")
    endpoint.bind("nvme")
    notified.clear()
    world.system.remove(endpoint)
    assert endpoint.driver is None
    assert kinds(notified)[:3] == [K.DEL_DEVICE, K.UNBIND_DRIVER, K.UNBOUND_DRIVER]
    notified.clear()
    refused(errno.ENODEV, lambda: endpoint.bind("nvme"))  # drivers/base/dd.c:832
    assert (endpoint.driver, notified) == (None, [])


def test_a_driver_that_cannot_be_bound(world: World, notified: list[Change]) -> None:
    endpoint, _ = world.device("00:03.0")
    group_of(endpoint).claim_dma_owner("vm")
    notified.clear()
    refused(errno.EBUSY, lambda: endpoint.bind("nvme"))
    assert [(c.kind, c.value) for c in notified] == [(K.DRIVER_NOT_BOUND, "nvme")]


def test_domains_and_owners(world: World, notified: list[Change]) -> None:
    endpoint, _ = world.device("00:03.0")
    group = group_of(endpoint)
    default, user = dma_domain_alloc(endpoint), paging_domain_alloc(endpoint)
    notified.clear()
    group.set_default(default)
    group.claim_dma_owner("vm")
    group.attach(user)
    group.attach_pasid(user, 5)
    group.detach_pasid(5)
    group.detach()
    group.release_dma_owner("vm")
    group.name = "nets"
    blocked = world.system.iommus[0].blocked
    assert [(c.kind, c.value, c.pasid) for c in notified] == [
        (K.DOMAIN, default, None),
        (K.DEFAULT_DOMAIN, default, None),
        (K.DOMAIN, blocked, None),
        (K.OWNER, "vm", None),
        (K.DOMAIN, user, None),
        (K.DOMAIN, user, 5),
        (K.DOMAIN, None, 5),
        (K.DOMAIN, blocked, None),
        (K.DOMAIN, default, None),
        (K.OWNER, None, None),
        (K.NAME, "nets", None),
    ]
    assert all(change.group is group for change in notified)


def test_what_fails_is_not_told(world: World, notified: list[Change]) -> None:
    endpoint, _ = world.device("00:03.0")
    group = group_of(endpoint)
    notified.clear()
    refused(errno.EINVAL, lambda: group.release_dma_owner("vm"))
    refused(errno.EINVAL, lambda: group.set_default(group.iommu.blocked))
    with pytest.raises(ValueError):
        world.system.remove(Endpoint("other", endpoint.source, None))
    assert notified == []


def test_a_subscriber_that_fails(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The change is done, and the others are notified."""

    def fail(change: Change) -> None:
        raise RuntimeError(f"no {change.kind.name}")

    notified: list[Change] = []
    world.system.subscribe(fail)
    world.system.subscribe(notified.append)
    with caplog.at_level(logging.ERROR):
        endpoint, _ = world.device("00:03.0")
    assert kinds(notified) == [K.ADD_GROUP, K.ADD_DEVICE]
    assert group_of(endpoint).endpoints == [endpoint]
    assert "no ADD_DEVICE" in caplog.text


def test_a_subscriber_calls_the_system(world: World, notified: list[Change]) -> None:
    """All are notified of what it changes, after what came before it."""

    def claim(change: Change) -> None:
        if change.kind is K.ADD_DEVICE:
            assert change.group is not None
            change.group.claim_dma_owner("vm")

    world.system.subscribe(claim)
    order: list[ChangeKind] = []
    world.system.subscribe(lambda change: order.append(change.kind))
    world.device("00:03.0")
    assert order == kinds(notified) == [K.ADD_GROUP, K.ADD_DEVICE, K.DOMAIN, K.OWNER]


def test_without_the_lock(world: World) -> None:
    """A subscriber may wait for a thread that calls the System."""
    endpoint, _ = world.device("00:03.0")

    def other(change: Change) -> None:
        if change.kind is K.NAME:
            thread = threading.Thread(target=group_of(endpoint).claim_dma_owner, args=("vm",))
            thread.start()
            thread.join(10)
            assert not thread.is_alive()

    world.system.subscribe(other)
    group_of(endpoint).name = "nets"
    assert group_of(endpoint).owner == "vm"


def test_the_end_of_a_subscription(world: World) -> None:
    notified: list[Change] = []
    end = world.system.subscribe(notified.append)
    ends: list[Callable[[], None]] = [end]
    world.system.subscribe(lambda change: ends[0]())
    world.device("00:03.0")
    assert kinds(notified) == [K.ADD_GROUP]  # then it was ended, by the other one
    end()
    world.device("00:04.0")
    assert notified == []


def test_one_function_twice(world: World) -> None:
    """Each subscription counts, and ends by itself."""
    seen: list[Change] = []
    ends = [world.system.subscribe(seen.append) for _ in range(2)]
    endpoint, _ = world.device("00:03.0")
    assert kinds(seen) == [K.ADD_GROUP, K.ADD_GROUP, K.ADD_DEVICE, K.ADD_DEVICE]
    ends[0]()
    ends[0]()
    group_of(endpoint).name = "nets"
    assert kinds(seen) == [K.NAME]


def test_many_threads_one_order(world: World) -> None:
    """Each change is reported once, to both subscribers in the same order, whichever thread makes it."""
    endpoints = [world.device(f"00:0{slot}.0")[0] for slot in range(3, 7)]
    first: list[Change] = []
    second: list[Change] = []
    world.system.subscribe(first.append)
    world.system.subscribe(second.append)

    def run(endpoint: Endpoint) -> None:
        for n in range(100):
            group_of(endpoint).name = str(n)

    threads = [threading.Thread(target=run, args=(endpoint,)) for endpoint in endpoints]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(second) == 400, "all changes at both")
    assert first == second
    for endpoint in endpoints:
        assert [c.value for c in first if c.group is endpoint.group] == [str(n) for n in range(100)]


def test_a_subscriber_that_never_returns_takes_no_more_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vmodel.iommu.changes.MOST_WAITING", 10)
    changes, go, entered = Changes(), threading.Event(), threading.Event()
    notified: list[Change] = []

    def wait(change: Change) -> None:
        notified.append(change)
        entered.set()
        go.wait(10)

    changes.subscribe(wait)
    thread = threading.Thread(target=changes.notify, args=(K.NAME,))
    thread.start()
    assert entered.wait(10)
    for _ in range(15):
        changes.notify(K.OWNER)
    go.set()
    thread.join(10)
    assert len(notified) == 11
    assert "a change is not reported" in caplog.text


# ---- owners ---------------------------------------------------------------------------------


def owned(world: World, waits: float) -> tuple[Endpoint, Context]:
    """A device that is bound to a context, of a system whose unbinds wait."""
    world.system.unbind_waits = waits
    endpoint, _ = world.device("00:03.0")
    context = Context()
    Device(context, endpoint)
    endpoint.bind(context)
    return endpoint, context


def test_by_default_nobody_waits(world: World) -> None:
    endpoint, context = owned(world, 0)
    world.system.remove(endpoint)
    assert (endpoint.driver, endpoint.group) == (None, None)
    context.close()


@pytest.mark.parametrize("how", ["unbind", "remove"])
def test_the_owner_is_asked(world: World, how: str) -> None:
    """It releases the group in its subscriber, and then the unbind goes on."""
    endpoint, context = owned(world, 60)
    asked: list[Change] = []

    def release(change: Change) -> None:
        if change.kind is K.REQUEST and change.value is context:
            asked.append(change)
            context.close()

    world.system.subscribe(release)
    began = time.monotonic()
    if how == "unbind":
        endpoint.unbind()
        assert group_of(endpoint).owner is None
    else:
        world.system.remove(endpoint)
        assert world.system.groups == []
    assert endpoint.driver is None
    assert [change.endpoint for change in asked] == [endpoint]
    assert time.monotonic() - began < 30


def test_an_owner_on_another_thread(world: World) -> None:
    endpoint, context = owned(world, 60)
    asked = threading.Event()
    world.system.subscribe(lambda change: asked.set() if change.kind is K.REQUEST else None)
    thread = threading.Thread(target=endpoint.unbind)
    thread.start()
    assert asked.wait(10)
    assert endpoint.driver is context
    context.close()
    thread.join(10)
    assert endpoint.driver is None


def test_an_owner_that_does_not_release(world: World) -> None:
    """EBUSY after that time; nothing has changed, and nobody was notified of an unbind."""
    endpoint, context = owned(world, 0.05)
    notified: list[ChangeKind] = []
    world.system.subscribe(lambda change: notified.append(change.kind))
    refused(errno.EBUSY, endpoint.unbind)
    refused(errno.EBUSY, lambda: world.system.remove(endpoint))
    assert (endpoint.driver, group_of(endpoint).owner) == (context, context)
    assert set(notified) == {K.REQUEST}
    context.close()
    world.system.remove(endpoint)


def test_it_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """vfio_unregister_group_dev asks every ten seconds."""
    monkeypatch.setattr("vmodel.iommu.release.EVERY", 0.01)
    endpoint, context = owned(world, 60)
    asked: list[Change] = []

    def release(change: Change) -> None:
        asked.append(change)
        if len(asked) == 3:
            context.close()

    world.system.subscribe(release)
    endpoint.unbind()
    assert [change.kind for change in asked[:3]] == [K.REQUEST] * 3


def test_a_subscriber_does_not_wait(world: World) -> None:
    """The request to the owner could not be delivered before it returns."""
    endpoint, context = owned(world, 60)
    caught: list[IommuError] = []

    def unbind(change: Change) -> None:
        if change.kind is K.NAME:
            with pytest.raises(IommuError) as error:
                endpoint.unbind()
            caught.append(error.value)

    world.system.subscribe(unbind)
    group_of(endpoint).name = "nets"
    assert [error.errno for error in caught] == [errno.EBUSY]
    context.close()


def test_ports_do_not_wait(world: World) -> None:
    """What does no DMA by itself is not the owner's."""
    endpoint, context = owned(world, 60)
    second, _ = world.device("00:03.1")
    second.bind("pcieport")
    second.unbind()
    assert group_of(endpoint).owner is context


@pytest.mark.parametrize("binds", [False, True])
def test_a_device_that_is_added_to_an_owned_group(binds: bool) -> None:
    """By default it has no driver; with the option it is the owner's, and the kernel's drivers cannot have it."""
    world = World()
    world.system = System(world.topology, hotplug_binds_to_owner=binds)
    world.system.add_iommu(iommu())
    first, _ = world.device("00:03.0")
    group = group_of(first)
    group.claim_dma_owner("vm")
    notified: list[Change] = []
    world.system.subscribe(notified.append)
    late, _ = world.device("00:03.1")
    bound = [K.BIND_DRIVER, K.BOUND_DRIVER] if binds else []
    assert kinds(notified) == [K.ADD_DEVICE, *bound]
    assert (late.driver, group.viable("vm")) == ("vm" if binds else None, True)
    refused(errno.EBUSY, lambda: late.bind("nvme"))
    elsewhere, _ = world.device("00:05.0")
    assert elsewhere.driver is None
    world.close()


def test_an_access_calls_no_subscriber(world: World) -> None:
    """One that faults looks at its group while another thread, which has made a change, is about to report it."""
    endpoint, dma = world.device("00:03.0")
    group_of(endpoint).attach(endpoint.iommu.blocked)  # type: ignore[union-attr]
    seen: list[Change] = []
    world.system.subscribe(seen.append)
    changes = world.system.changes
    changes._waiting.append((Change(K.NAME), changes._subscribers))
    with pytest.raises(DmaFault):
        dma.read(0, 1)
    assert seen == []
    changes.notify(K.NAME)
    assert len(seen) == 2
