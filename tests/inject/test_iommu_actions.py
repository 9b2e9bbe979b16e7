"""Faults at the IOMMU: mapping, unmapping, invalidation, translation; and completions, as virtio-iommu makes them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.inject.lab import Clock, elapse, fired
from tests.iommu import vtd_bench as vtd
from tests.virtio import world as viommu
from vmodel.devices.virtio_iommu import RequestStatus
from vmodel.devices.vtd.codes import FaultCode
from vmodel.errors import Access, DmaFault, Reason
from vmodel.inject import Engine, FaultPlan, parse_rule
from vmodel.iommu.domain import TableDomain
from vmodel.machine import Machine, parse

IOVA, LAST, GPA = 0x10000, 0x10FFF, 0x80000
A = viommu.A


@pytest.fixture
def world() -> Iterator[viommu.World]:
    """A guest's virtio-iommu, with device "a" attached to domain 1."""
    made = viommu.World(parse(viommu.MACHINE, Path("m.toml")))
    made.attach(1, A)
    yield made
    made.driver.close()
    made.machine.close()


@pytest.fixture
def bench() -> Iterator[vtd.Bench]:
    """A guest's VT-d, with "edu0" behind tables that map IOVA."""
    made = vtd.Bench()
    made.root = made.translate("edu0")  # type: ignore[attr-defined]
    made.map(made.root, IOVA, vtd.DATA)  # type: ignore[attr-defined]
    made.on()
    yield made
    made.close()


@contextmanager
def armed(machine: Machine, *rules: str, clock: Clock | None = None) -> Iterator[Engine]:
    clock = clock or Clock()
    plan = FaultPlan(rule=tuple(map(parse_rule, rules)))
    with Engine(plan, machine.devices, clock=clock, sleep=clock.sleep) as engine:
        yield engine


# ---- map, unmap ---------------------------------------------------------------------------------


def test_a_mapping_that_is_not_made(world: viommu.World) -> None:
    with armed(world.machine, "iommu.map nth=1 device=a do=drop") as engine:
        assert world.map(1, IOVA, LAST, GPA) is RequestStatus.OK
        assert world.reaches("a", IOVA) is None
        assert world.map(1, IOVA, LAST, GPA) is RequestStatus.OK
        assert world.reaches("a", IOVA) == GPA
        (record,) = fired(engine)
        assert (record["device"], record["address"], record["size"]) == ("viommu0", "0x10000", 4096)


@pytest.mark.parametrize(
    ("why", "status"), [("nomem", RequestStatus.NOMEM), ("inval", RequestStatus.INVAL), ("range", RequestStatus.RANGE)]
)
def test_a_mapping_that_is_refused(world: viommu.World, why: str, status: RequestStatus) -> None:
    with armed(world.machine, f"iommu.map do=fail({why})"):
        assert world.map(1, IOVA, LAST, GPA) is status
    assert world.reaches("a", IOVA) is None


def test_unmap(world: viommu.World) -> None:
    world.map(1, IOVA, LAST, GPA)
    with armed(world.machine, "iommu.unmap nth=1 do=fail(range)", "iommu.unmap nth=2 do=drop"):
        assert world.unmap(1, IOVA, LAST) is RequestStatus.RANGE
        assert world.unmap(1, IOVA, LAST) is RequestStatus.OK
        assert world.reaches("a", IOVA) == GPA
        assert world.unmap(1, IOVA, LAST) is RequestStatus.OK
        assert world.reaches("a", IOVA) is None


def test_a_late_unmap_and_a_slow_one(world: viommu.World) -> None:
    world.map(1, IOVA, LAST, GPA)
    with armed(world.machine, "iommu.unmap do=late(10min)"):
        assert world.unmap(1, IOVA, LAST) is RequestStatus.OK
        assert world.reaches("a", IOVA) == GPA
        elapse(world.iommu, 600)
        assert world.reaches("a", IOVA) is None
    clock, seen = Clock(), list[int | None]()
    clock.while_asleep = lambda: seen.append(world.reaches("a", IOVA))
    with armed(world.machine, "iommu.map do=delay(50)", clock=clock):
        world.map(1, IOVA, LAST, GPA)
    assert clock.slept == [0.05] and seen == [None] and world.reaches("a", IOVA) == GPA


def test_use_after_unmap(world: viommu.World) -> None:
    """A strict unmap keeps the device out; with the invalidation skipped, what is cached lets it through."""
    world.map(1, IOVA, LAST, GPA)
    world.reaches("a", IOVA)  # so that it is in the IOTLB
    with armed(world.machine, "iommu.unmap do=use-after-unmap") as engine:
        world.unmap(1, IOVA, LAST)
        assert [record["result"] for record in fired(engine)] == ["NOT_MAPPED"]
    world.map(1, IOVA, LAST, GPA)
    world.reaches("a", IOVA)
    with armed(world.machine, "iommu.unmap do=use-after-unmap", "invalidate do=drop") as engine:
        world.unmap(1, IOVA, LAST)
        assert [(r["point"], r["result"]) for r in fired(engine)] == [("invalidate", "dropped"), ("iommu.unmap", "ok")]
    assert world.driver.memory.read(GPA, 4) == b"\xee" * 4


# ---- invalidation -------------------------------------------------------------------------------


def test_a_skipped_invalidation(world: viommu.World) -> None:
    world.map(1, IOVA, LAST, GPA)
    assert world.reaches("a", IOVA) == GPA
    with armed(world.machine, "invalidate device=a kind=iotlb iova=0x10000 do=drop"):
        assert world.unmap(1, IOVA, LAST) is RequestStatus.OK
    assert world.reaches("a", IOVA) == GPA  # stale
    assert world.map(1, IOVA, LAST, 0x90000) is RequestStatus.OK
    assert world.reaches("a", IOVA) == GPA


def test_a_late_invalidation(world: viommu.World) -> None:
    world.map(1, IOVA, LAST, GPA)
    world.reaches("a", IOVA)
    with armed(world.machine, "invalidate do=late(10min)"):
        world.unmap(1, IOVA, LAST)
        assert world.reaches("a", IOVA) == GPA
        elapse(world.iommu, 600)
        assert world.reaches("a", IOVA) is None


def test_invalidations_of_vtd(bench: vtd.Bench) -> None:
    device = bench.machine.devices["edu0"]
    root = bench.root  # type: ignore[attr-defined]
    everything = (2 | 1 << 4, 0)
    bench.read("edu0", IOVA)
    with armed(bench.machine, "invalidate nth=1 kind=iotlb device=edu0 do=drop", "invalidate nth=2 do=late(10min)"):
        bench.words(bench.slot(root, IOVA, 4), 0)
        bench.queue(everything)
        device.dma.write(IOVA, b"old!")
        assert bench.ram[vtd.DATA : vtd.DATA + 4] == b"old!"
        bench.queue(everything)
        device.dma.write(IOVA, b"late")
        elapse(bench.unit, 600)
        assert bench.refused("edu0", IOVA) is Reason.NOT_MAPPED


def test_spurious_at_an_iommu_is_on_the_thread_of_the_device(bench: vtd.Bench) -> None:
    """The IOMMU's thread announces the event, but a device's interrupt belongs to the device's thread."""
    device = bench.machine.devices["edu0"]
    raised: list[int] = []
    bench.read("edu0", IOVA)
    with armed(bench.machine, "invalidate kind=iotlb do=spurious"):
        device.backend.irqs.types[0].changed = raised.append
        bench.unit.backend.region_write(0, 0, 4, 0)  # the unit's own thread is not the device's
        bench.queue((2 | 1 << 4, 0))
        assert not device.intx.level and device.backend.agenda.waiting
        shown: list[bool] = []
        device.intx._set_status = lambda level: shown.append(level)  # a pulse: seen while it lasts
        elapse(device, 0)
        assert shown == [True, False]


def test_context_entries_of_vtd(bench: vtd.Bench) -> None:
    bench.read("edu0", IOVA)
    with armed(bench.machine, "invalidate kind=context do=drop") as engine:
        bench.words(vtd.CONTEXT + 16 * vtd.SID["edu0"], 0, 0)
        bench.queue((1 | 1 << 4, 0))
        bench.read("edu0", IOVA)
        assert [record["kind"] for record in fired(engine)] == ["context"]
    bench.queue((1 | 1 << 4, 0))
    assert bench.refused("edu0", IOVA) is Reason.BLOCKED


def test_invalidations_of_scalable_mode() -> None:
    """The PASID cache and what it leads to, lost one after the other."""
    bench = vtd.ScalableBench()
    root = bench.first("edu0", 0)
    bench.map_first(root, IOVA, vtd.DATA)
    bench.on()
    vtd.read(bench, "edu0", IOVA)
    of_entry, of_pages = (7 | 3 << 4, 0), (6 | 2 << 4 | 7 << 16, 0)
    with armed(bench.machine, "invalidate device=edu0 do=drop") as engine:
        bench.entry("edu0", 0, 0)
        bench.words(bench.slot(root, IOVA, 4), 0)
        bench.queue(of_entry, of_pages)
        vtd.read(bench, "edu0", IOVA)
        assert [record["kind"] for record in fired(engine)] == ["pasid", "iotlb"]
    bench.queue(of_entry, of_pages)
    assert vtd.refused(bench, "edu0", IOVA) in (Reason.BLOCKED, Reason.PASID)
    bench.close()


def attached(bench: vtd.Bench, name: str) -> bool:
    """Whether a device is attached to the guest's tables."""
    group = bench.system[name].group
    return group is not None and isinstance(group.domain, TableDomain)


def test_invalidations_of_what_was_not_present() -> None:
    """In caching mode the unit reads entries then, unless the invalidation is lost; rules find it by the device."""
    bench = vtd.Bench(params="caching_mode = true")
    bench.on()
    bench.translate("edu0")
    bench.translate("edu1")
    with armed(bench.machine, "invalidate kind=context device=edu0 nth=1 do=drop"):
        for name, there in (("edu1", True), ("edu0", False), ("edu0", True)):
            vtd.invalidate(bench, "registers", 3, 0, vtd.SID[name])
            assert attached(bench, name) is there
    bench.close()


def test_invalidations_of_a_pasid_that_was_not_present() -> None:
    bench = vtd.ScalableBench(params="caching_mode = true")
    bench.on()
    bench.first("edu0")
    with armed(bench.machine, "invalidate kind=pasid device=edu0 nth=1 do=drop"):
        for there in (False, True):
            bench.queue(vtd.pasid_cache(1, 7, 0))
            assert attached(bench, "edu0") is there
    bench.close()


def test_access_after_the_pages_were_unmapped(bench: vtd.Bench) -> None:
    """The window of a deferred flush: the table says no more, the IOTLB still does."""
    device, root = bench.machine.devices["edu0"], bench.root  # type: ignore[attr-defined]
    with armed(bench.machine, "dma.write device=edu0 do=use-after-unmap(ms=10min)") as engine:
        for flush in (False, True):
            bench.map(root, IOVA, vtd.DATA)
            device.dma.write(IOVA, b"data")
            bench.words(bench.slot(root, IOVA, 4), 0)
            if flush:
                bench.queue((2 | 1 << 4, 0))
            elapse(device, 600)
        assert [r["result"] for r in fired(engine) if r.get("late")] == ["ok", "NOT_MAPPED"]


# ---- translation --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dma.write do=fault(permission)", "translate direction=write do=fault(permission)"])
def test_a_fault_that_the_guest_hears_of(world: viommu.World, rule: str) -> None:
    world.map(1, IOVA, LAST, GPA)
    with armed(world.machine, f"{rule} group=0 device=a iova=0x10000 requester=0000:00:03.0 gpa={GPA:#x}"):
        with pytest.raises(DmaFault) as caught:
            world.machine.devices["a"].dma.write(IOVA, b"x")
        assert (caught.value.reason, caught.value.access) == (Reason.PERMISSION, Access.WRITE)
        world.machine.devices["a"].dma.read(IOVA, 1)
    queue = world.iommu.iommu.faults
    assert [record.reason for record in queue.peek()] == [Reason.PERMISSION]


def test_vtd_reports_it(bench: vtd.Bench) -> None:
    """Also at the first access, when the unit has not yet read the device's entry."""
    with armed(bench.machine, "dma.read device=edu0 do=fault"):
        assert bench.refused("edu0", IOVA + 4) is Reason.NOT_MAPPED
    assert bench.record() == (IOVA, FaultCode.NO_READ, vtd.SID["edu0"], True)
    bench.read("edu0", IOVA)


def test_a_fault_that_is_there_anyway(bench: vtd.Bench) -> None:
    with armed(bench.machine, "dma.read device=edu1 do=fault(permission)"):
        assert bench.refused("edu1", IOVA) is Reason.BLOCKED  # edu1 has no context entry


def test_slow_translation(world: viommu.World) -> None:
    world.map(1, IOVA, LAST, GPA)
    clock = Clock()
    with armed(world.machine, "translate device=a do=delay(40)", clock=clock):
        assert world.reaches("a", IOVA) == GPA
    assert clock.slept == [0.04]


def test_where_nothing_is_translated_there_is_no_translation() -> None:
    from tests.inject.lab import Lab

    lab = Lab()
    lab.dma.bus_master = True
    with Engine(FaultPlan(rule=(parse_rule("translate do=fault"),)), [lab]) as engine, pytest.raises(DmaFault):
        lab.dma.read(0, 1)  # there is no memory either
    assert len(engine.journal) == 0
    lab.close()


# ---- completions and doorbells ------------------------------------------------------------------


def ask(world: viommu.World) -> list[tuple[int, int]]:
    """An unmap of nothing; what the used ring says then."""
    world.requests.send(struct.pack("<B3xIQQ4s", 4, 1, IOVA, LAST, bytes(4)), 4)
    world.requests.notify()
    return world.requests.used_now()


def test_completions(world: viommu.World) -> None:
    with armed(
        world.machine,
        "completion queue=0 nth=1 do=complete(length=77)",
        "completion nth=2 do=complete(id=5)",
        "completion nth=3 do=drop",
        "completion nth=4 do=duplicate",
        "completion nth=5 do=late(10min)",
    ) as engine:
        assert ask(world) == [(0, 77)]
        assert ask(world) == [(5, 4)]
        assert ask(world) == []
        assert ask(world) == [(0, 4), (0, 4)]
        assert ask(world) == []
        elapse(world.iommu, 600)
        assert world.requests.used_now() == [(0, 4)]
        assert [(r["before"], r["after"]) for r in fired(engine)][:2] == [("length=4", "length=77"), ("id=0", "id=5")]


def test_completions_in_another_order(world: viommu.World) -> None:
    with armed(world.machine, "completion nth=1 do=reorder", "completion nth=2 do=complete(length=2)"):
        assert ask(world) == []
        assert ask(world) == [(0, 2), (0, 4)]


def test_doorbells(world: viommu.World) -> None:
    clock = Clock()
    with armed(world.machine, "doorbell queue=0 nth=1 do=drop", "doorbell nth=2 do=delay(40)", clock=clock):
        assert ask(world) == []
        world.requests.notify()
        assert clock.slept == [0.04]
        assert world.requests.used_now() == [(0, 4)]


def test_an_interrupt_of_the_unit_is_lost(bench: vtd.Bench) -> None:
    for at, value in ((vtd.FEDATA, 0x4021), (vtd.FEADDR, 0xFEE0_1000), (vtd.FECTL, 0)):
        bench.put(at, value)
    with armed(bench.machine, "irq device=vtd0 do=drop"):
        bench.refused("edu0", 0)
        assert not any(line.sent for line in bench.lines.values())
    bench.clear()
    bench.refused("edu0", 0)
    assert [line.sent for line in bench.lines.values() if line.sent]
