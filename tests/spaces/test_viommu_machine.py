"""vIOMMUs, vDEVICEs, vEVENTQs, nested HWPTs and devices that come and go, in any order of calls, against a model.

What a call answers, who uses what, which events come to which queue with which StreamID and sequence number, and that
ids are never used again.  Each device's context descriptor is all zeros, so that each access is an event.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.examples import examples
from tests.spaces.world import World
from vmodel.errors import DmaFault, IommuError
from vmodel.iommu import AllocFlags
from vmodel.iommu.iommufd import (
    Context,
    Device,
    Hwpt,
    Ioas,
    Object,
    SmmuV3Ste,
    Vdevice,
    Vevent,
    Veventq,
    VeventqType,
    Viommu,
    ViommuType,
)
from vmodel.span import MiB

TRANSLATE, BYPASS = SmmuV3Ste(0b1011), SmmuV3Ste(0b1001)
DEVICES = 3
HEADER, EVENT = 8, 40
OK = 0
WHICH = st.integers(0, 1 << 16)


@dataclass
class Queue:
    """What a vEVENTQ is to have: (sequence, StreamID; None: the mark of lost events)."""

    depth: int
    sequence: int = 0
    items: list[tuple[int, int | None]] = field(default_factory=list)
    lost: int = 0

    def put(self, sid: int) -> None:
        if self.items and self.items[-1][1] is None:
            self.items.pop()
        full = len(self.items) == self.depth
        self.lost += full
        self.items.append((self.sequence, None if full else sid))
        self.sequence += 1


def outcome(call: object) -> int:
    """The errno of a call that is refused; OK."""
    try:
        call()  # type: ignore[operator]
    except IommuError as error:
        return error.errno or 0
    return OK


class ViommuMachine(RuleBasedStateMachine):
    """Objects in use, who uses them, and events."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.context = Context()
        self.ioas = Ioas(self.context)
        self.ioas.map(0, MiB, iova=0)
        iommu = self.world.iommu("smmu-v3")
        self.sources = [self.world.add(iommu, slot) for slot in range(DEVICES)]
        self.bound: list[Device | None] = [Device(self.context, source.endpoint) for source in self.sources]
        first = self.bound[0]
        assert first is not None
        self.parents = [first.hwpt_alloc(self.ioas, AllocFlags.NEST_PARENT) for _ in range(2)]
        self.viommus: list[Viommu] = []
        self.vdevices: list[Vdevice] = []
        self.nested: list[Hwpt] = []
        self.queues: dict[Veventq, Queue] = {}
        self.gone: list[Object] = []
        #: By source: the HWPT that it is attached to, and the StreamID that it had then.
        self.attached: dict[int, tuple[Hwpt, int | None]] = {}
        self.ids: set[int] = set()

    def teardown(self) -> None:
        self.context.close()
        assert not self.context._objects
        self.world.close()

    def made(self, item: Object) -> None:
        assert item.id not in self.ids, "an id is used again"
        self.ids.add(item.id)

    def users(self, item: Object) -> int:
        attached = sum(hwpt is item for hwpt, _ in self.attached.values())
        if isinstance(item, Hwpt):
            return attached + sum(viommu.hwpt is item for viommu in self.viommus)
        if isinstance(item, Viommu):
            own = [*self.vdevices, *self.nested, *self.queues]
            return sum(one.viommu is item for one in own)
        if isinstance(item, Device):
            return int(self.bound.index(item) in self.attached)
        return 0

    # ---- objects ---------------------------------------------------------------------------

    @precondition(lambda self: len(self.viommus) < 3)
    @rule(source=st.integers(0, DEVICES - 1), parent=st.integers(0, 1))
    def viommu_alloc(self, source: int, parent: int) -> None:
        if (device := self.bound[source]) is not None:
            viommu = device.viommu_alloc(self.parents[parent], ViommuType.ARM_SMMUV3)
            self.made(viommu)
            self.viommus.append(viommu)

    @precondition(lambda self: self.viommus)
    @rule(which=WHICH, source=st.integers(0, DEVICES - 1), sid=st.integers(1, 3))
    def vdevice_alloc(self, which: int, source: int, sid: int) -> None:
        viommu, device = self.viommus[which % len(self.viommus)], self.bound[source]
        if device is None:
            return
        taken = any(one.device is device or (one.viommu is viommu and one.virt_id == sid) for one in self.vdevices)
        if taken:
            assert outcome(lambda: viommu.vdevice_alloc(device, sid)) == errno.EEXIST
            return
        vdevice = viommu.vdevice_alloc(device, sid)
        self.made(vdevice)
        self.vdevices.append(vdevice)

    @precondition(lambda self: self.viommus and len(self.nested) < 6)
    @rule(which=WHICH, ste=st.sampled_from([TRANSLATE, BYPASS]), source=st.integers(0, DEVICES - 1))
    def hwpt_alloc(self, which: int, ste: SmmuV3Ste, source: int) -> None:
        if (device := self.bound[source]) is not None:
            viommu = self.viommus[which % len(self.viommus)]
            hwpt = device.hwpt_alloc(viommu, data=ste, memory=self.world.memory)
            self.made(hwpt)
            self.nested.append(hwpt)

    @precondition(lambda self: self.viommus)
    @rule(which=WHICH, kind=st.sampled_from([*VeventqType]), depth=st.integers(0, 3))
    def veventq_alloc(self, which: int, kind: VeventqType, depth: int) -> None:
        viommu = self.viommus[which % len(self.viommus)]
        expected = OK
        if kind == VeventqType.DEFAULT:
            expected = errno.EOPNOTSUPP
        elif not depth:
            expected = errno.EINVAL
        elif any(queue.viommu is viommu and queue.type == kind for queue in self.queues):
            expected = errno.EEXIST
        if expected:
            assert outcome(lambda: viommu.veventq_alloc(kind, depth)) == expected
            return
        queue = viommu.veventq_alloc(kind, depth)
        self.made(queue)
        self.queues[queue] = Queue(depth)

    @rule(which=WHICH)
    def destroy(self, which: int) -> None:
        """Any object, alive or gone."""
        alive: list[Object] = [*self.parents, *self.viommus, *self.vdevices, *self.nested, *self.queues]
        every = alive + self.gone
        item = every[which % len(every)]
        if item in self.gone:
            assert outcome(item.destroy) == errno.ENOENT
        elif self.users(item) or item in self.parents[:1]:
            if self.users(item):
                assert outcome(item.destroy) == errno.EBUSY
        elif item not in self.parents:
            item.destroy()
            self.forget(item)

    def forget(self, item: Object) -> None:
        self.gone.append(item)
        if isinstance(item, Veventq):
            del self.queues[item]
        for kept in (self.viommus, self.vdevices, self.nested):
            if item in kept:
                kept.remove(item)  # type: ignore[arg-type]

    @rule(source=st.integers(0, DEVICES - 1))
    def unbind(self, source: int) -> None:
        """The device goes, and its vDEVICE with it."""
        device = self.bound[source]
        if device is None:
            self.bound[source] = Device(self.context, self.sources[source].endpoint)
            self.made(self.bound[source])  # type: ignore[arg-type]
        elif source in self.attached:
            assert outcome(device.destroy) == errno.EBUSY
        else:
            device.destroy()
            self.bound[source] = None
            self.gone.append(device)
            for vdevice in [one for one in self.vdevices if one.device is device]:
                self.forget(vdevice)

    # ---- attachments and events ------------------------------------------------------------

    @rule(source=st.integers(0, DEVICES - 1), which=WHICH)
    def attach(self, source: int, which: int) -> None:
        device = self.bound[source]
        if device is None:
            return
        every = self.parents + self.nested
        hwpt = every[which % len(every)]
        sids = [one.virt_id for one in self.vdevices if one.device is device and one.viommu is hwpt.viommu]
        already = self.attached.get(source, (None, None))[0] is hwpt
        call = device.replace if source in self.attached else device.attach
        needed = hwpt.stage1 is not None and hwpt.stage1.needs_vdevice and not sids and not already
        assert outcome(lambda: call(hwpt)) == (errno.ENOENT if needed else OK)
        if not needed and not already:  # replaced by itself, it keeps its StreamID
            self.attached[source] = (hwpt, sids[0] if sids else None)

    @rule(source=st.integers(0, DEVICES - 1))
    def detach(self, source: int) -> None:
        if (device := self.bound[source]) is not None:
            device.detach()
            self.attached.pop(source, None)

    @rule(source=st.integers(0, DEVICES - 1), count=st.integers(1, 4))
    def fault(self, source: int, count: int) -> None:
        if self.bound[source] is None:
            return
        hwpt, sid = self.attached.get(source, (None, None))
        for _ in range(count):
            with pytest.raises(DmaFault):
                self.sources[source].dma.read(2 * MiB, 8)
            if hwpt is None or hwpt.stage1 is None or not hwpt.stage1.needs_vdevice or sid is None:
                continue
            for queue, model in self.queues.items():
                if queue.viommu is hwpt.viommu and queue.type == VeventqType.ARM_SMMUV3:
                    model.put(sid)

    @precondition(lambda self: self.queues)
    @rule(which=WHICH, size=st.sampled_from([0, 7, 8, 39, 40, 47, 48, 80, 88, 400]))
    def read(self, which: int, size: int) -> None:
        queue, model = list(self.queues.items())[which % len(self.queues)]
        left, expected = size, list[tuple[int, int | None]]()
        while model.items and (needed := HEADER if model.items[0][1] is None else EVENT) <= left:
            left -= needed
            expected.append(model.items.pop(0))
        if size < HEADER or (model.items and not expected):
            assert outcome(lambda: queue.read(size)) == errno.EINVAL
            return
        found = queue.read(size)
        assert [(event.sequence, self.sid(event)) for event in found] == expected
        assert sum(len(event.pack()) for event in found) <= size

    def sid(self, event: Vevent) -> int | None:
        assert event.lost == (not event.data)
        return None if event.lost else int.from_bytes(event.data[4:8], "little")

    # ---- what always holds -----------------------------------------------------------------

    @invariant()
    def nothing_is_freed_while_it_is_used(self) -> None:
        alive = [*self.parents, *self.viommus, *self.vdevices, *self.nested, *self.queues]
        for item in [*alive, *(device for device in self.bound if device is not None)]:
            assert self.context.find(item.id) is item and item.users == self.users(item)
        assert all(self.context.find(item.id) is None for item in self.gone)

    @invariant()
    def events_are_lost_or_there(self) -> None:
        for queue, model in self.queues.items():
            assert len(queue) == len(model.items) <= queue.depth + 1


TestViommuMachine = ViommuMachine.TestCase
TestViommuMachine.settings = settings(
    max_examples=examples(60),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
