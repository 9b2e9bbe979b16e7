"""virtio-iommu: each request, right and wrong, by its own statuses; what outlives which reset."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.virtio.driver import Driver
from tests.virtio.world import BRIDGE, LEFT, MACHINE, MMIO, READ, RIGHT, WRITE, A, B, World
from vmodel.device import ResetKind
from vmodel.devices.virtio_iommu import (
    F_MAP_UNMAP,
    F_MMIO,
    F_PROBE,
    PROBE_SIZE,
    RequestStatus,
    VirtioIommuDevice,
)
from vmodel.errors import Access, ConfigError, DmaFault
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import DomainType
from vmodel.machine import parse
from vmodel.span import PAGE, Span


def test_configuration(world: World) -> None:
    regs = world.iommu.config_regs
    assert regs.PAGE_SIZE_MASK & 0xFFFF == 0xF000
    assert (regs.INPUT_START, regs.INPUT_END) == (0, (1 << 48) - 1)
    assert (regs.DOMAIN_START, regs.DOMAIN_END, regs.PROBE_SIZE, regs.BYPASS) == (0, 0xFFFF, PROBE_SIZE, 1)


def test_features_that_are_offered(world: World) -> None:
    """5.13.3.2, 6: MAP_UNMAP; BYPASS_CONFIG and so not BYPASS (3); none that is reserved, and VERSION_1."""
    assert world.driver.offered() == sum(1 << n for n in (0, 1, 2, 4, 5, 6, 28, 29, 32))


def test_configuration_before_features(world: World) -> None:
    """2.5.2, 4.1.3.2: each half of each field, before FEATURES_OK; 5.13.4.1: all but bypass is read-only."""
    driver = world.driver
    driver.put(0x14, 1, 0)
    words = [driver.get(0x2000 + at, 4) for at in range(0, 0x28, 4)]
    assert words == [0xFFFFF000, 0xFFFFFFFF, 0, 0, 0xFFFFFFFF, 0xFFFF, 0, 0xFFFF, PROBE_SIZE, 1]
    for at in range(0, 0x28, 4):
        world.iommu.backend.function.plain_write(0, 0x2000 + at, b"\x5a" * 4)
    assert [driver.get(0x2000 + at, 4) for at in range(0, 0x24, 4)] == words[:9]


def test_bypass_outlives_the_driver(world: World) -> None:
    """5.13.4.2: the device's reset by its driver leaves it; the system's restores it."""
    world.driver.put(0x2000 + 0x24, 1, 0)
    world.start()
    assert world.driver.get(0x2000 + 0x24, 1) == 0
    world.iommu.reset(ResetKind.DEVICE)
    assert world.driver.get(0x2000 + 0x24, 1) == 1


def test_the_examples_of_unmap(world: World) -> None:
    """5.13.6.6, its seven examples, a page for each byte."""
    for maps, unmap, status, left in (
        ([], (0, 4), RequestStatus.OK, []),
        ([(0, 9)], (0, 9), RequestStatus.OK, []),
        ([(0, 4), (5, 9)], (0, 9), RequestStatus.OK, []),
        ([(0, 9)], (0, 4), RequestStatus.RANGE, [0]),
        ([(0, 4), (5, 9)], (0, 4), RequestStatus.OK, [5]),
        ([(0, 4)], (0, 9), RequestStatus.OK, []),
        ([(0, 4), (10, 14)], (0, 14), RequestStatus.OK, []),
    ):
        world.attach(1, A)
        for first, last in maps:
            assert world.map(1, first * PAGE, last * PAGE + PAGE - 1, 0) is RequestStatus.OK
        assert world.unmap(1, unmap[0] * PAGE, unmap[1] * PAGE + PAGE - 1) is status
        domain = world.machine.system["a"].group.domain  # type: ignore[union-attr]
        assert [m.span.start // PAGE for m in domain.mappings()] == left  # type: ignore[attr-defined]
        world.detach(1, A)


def test_requests_in_pieces(world: World) -> None:
    """2.7.4.1: a byte a descriptor, and an answer likewise, is as good as two."""
    queue = world.requests
    request = struct.pack("<B3xIII4x", 1, 1, A, 0)
    queue.memory.write(queue.data, request)
    queue.memory.write(queue.data + 0x1000, b"\xee" * 8)
    for n in range(len(request)):
        queue.describe(n, queue.data + n, 1, 1, n + 1)
    for n in range(4):
        queue.describe(20 + n, queue.data + 0x1000 + 2 * n, 1, 2 | (n < 3), 21 + n)
    queue.offer(0)
    queue.notify()
    assert queue.used_now() == [(0, 4)]
    assert queue.memory.read(queue.data + 0x1000, 8) == b"\0\xee" * 4
    assert world.reaches("a", 0x9000) is None


def test_only_what_is_to_be_written_is(world: World) -> None:
    """2.7.5.1: a request changes its writable part, a used entry and the index; 2.7.10.2: no flags."""
    queue = world.requests
    for request in (struct.pack("<B3xIII4x", 1, 1, A, 0), struct.pack("<B3xIQQQI", 3, 1, 0x8000, 0x8FFF, 0, 3)):
        queue.send(request, 4)
        queue.memory.write(queue.data + 0x1000, b"\xee" * 4)
        before = queue.memory.read(0, 1 << 20)
        queue.notify()
        after = queue.memory.read(0, 1 << 20)
        ((_, written),) = queue.used_now()
        n = queue.memory.u16(queue.used + 2) - 1
        may = {*range(queue.data + 0x1000, queue.data + 0x1000 + written)}
        may |= {*range(queue.used + 2, queue.used + 4), *range(queue.used + 4 + 8 * n, queue.used + 12 + 8 * n)}
        assert before != after and {at for at in range(1 << 20) if before[at] != after[at]} <= may


def test_what_is_to_be_written_is_not_read(world: World) -> None:
    """2.7.5.1: a window that may be written and not read is enough for an answer."""
    queue = world.requests
    answers = os.memfd_create("answers")
    os.ftruncate(answers, PAGE)
    world.iommu.memory.map(1 << 32, PAGE, fd=answers, access=Access.WRITE)
    queue.memory.write(queue.data, struct.pack("<B3xIII4x", 1, 1, 0x19, 0))
    queue.describe(0, queue.data, 20, 1, 1)
    queue.describe(1, 1 << 32, 4, 2)
    queue.offer(0)
    queue.notify()
    assert queue.used_now() == [(0, 4)] and os.pread(answers, 4, 0) == bytes([RequestStatus.NOENT, 0, 0, 0])
    os.close(answers)


def test_a_reserved_region_leads_nowhere(world: World) -> None:
    """5.13.6.8.1.2: an access to it affects nobody else."""
    world.attach(1, A)
    world.map(1, 0xFED00000, 0xFEDFFFFF, 0)
    assert world.map(1, 0xFEE00000, 0xFEEFFFFF, 0) is RequestStatus.INVAL
    assert world.reaches("a", 0xFED00000) == 0
    assert world.reaches("a", 0xFEE00000) is None


def test_map_and_unmap(world: World) -> None:
    assert world.reaches("a", 0x9000) == 0x9000  # bypass
    assert world.attach(1, A) is RequestStatus.OK
    assert world.reaches("a", 0x9000) is None
    assert world.map(1, 0x10000, 0x11FFF, 0x80000) is RequestStatus.OK
    assert world.reaches("a", 0x11000) == 0x81000
    assert world.reaches("b", 0x9000) == 0x9000  # not attached
    assert world.unmap(1, 0x10000, 0x11FFF) is RequestStatus.OK
    assert world.reaches("a", 0x11000) is None
    assert world.detach(1, A) is RequestStatus.OK
    assert world.reaches("a", 0x9000) == 0x9000


def test_two_endpoints_in_one_domain(world: World) -> None:
    assert [world.attach(1, A), world.attach(1, B)] == [RequestStatus.OK, RequestStatus.OK]
    assert world.map(1, 0x10000, 0x10FFF, 0x80000) is RequestStatus.OK
    assert world.reaches("a", 0x10000) == world.reaches("b", 0x10000) == 0x80000
    assert world.detach(1, A) is RequestStatus.OK
    assert world.reaches("b", 0x10000) == 0x80000
    # With the last endpoint the domain goes, and its mappings.
    assert world.detach(1, B) is RequestStatus.OK
    assert world.map(1, 0, PAGE - 1, 0) is RequestStatus.NOENT
    assert world.attach(1, A) is RequestStatus.OK
    assert world.reaches("a", 0x10000) is None


def test_an_endpoint_moves(world: World) -> None:
    world.attach(1, A)
    world.map(1, 0x10000, 0x10FFF, 0x80000)
    world.attach(2, B)
    world.map(2, 0x10000, 0x10FFF, 0x90000)
    assert world.attach(2, A) is RequestStatus.OK
    assert world.reaches("a", 0x10000) == 0x90000
    assert world.map(1, 0x20000, 0x20FFF, 0) is RequestStatus.NOENT


def test_endpoints_that_cannot_be_told_apart(world: World) -> None:
    """Behind the bridge to PCI: either's id, or the bridge's own, moves both."""
    assert world.attach(1, LEFT) is RequestStatus.OK
    world.map(1, 0x10000, 0x10FFF, 0x80000)
    assert world.reaches("right", 0x10000) == 0x80000
    assert [world.attach(1, RIGHT), world.attach(1, BRIDGE)] == [RequestStatus.OK, RequestStatus.OK]
    assert world.detach(1, LEFT) is RequestStatus.OK
    assert world.reaches("left", 0x10000) == 0x80000  # the others are attached still
    assert [world.detach(1, RIGHT), world.detach(1, BRIDGE)] == [RequestStatus.OK, RequestStatus.OK]
    assert world.reaches("left", 0x9000) == 0x9000


@pytest.mark.parametrize(
    ("first", "last", "gpa", "flags", "status"),
    [
        (0x10000, 0x10FFF, 0x1000, 0, RequestStatus.OK),  # nothing may be done there
        (0x7000, 0x8FFF, 0, 0, RequestStatus.INVAL),  # but it is a mapping like others
        (0x10000, 0x107FF, 0x1000, MMIO, RequestStatus.RANGE),
        (1 << 48, (1 << 48) + 0xFFF, 0, 0, RequestStatus.RANGE),
        ((1 << 48) - 0x1000, (1 << 48) + 0xFFF, 0, 3, RequestStatus.RANGE),
        (0x10000, 0x10FFF, (1 << 52) - 0x1000, 3, RequestStatus.OK),
        (0x10000, 0x11FFF, (1 << 52) - 0x1000, 3, RequestStatus.RANGE),  # past the last guest-physical address
        (0x10000, 0x11FFF, (1 << 64) - 0x1000, 3, RequestStatus.RANGE),
        # What PROBE says is reserved: the window of MSIs, 0xfee00000 to 0xfeefffff.
        (0xFEE00000, 0xFEE00FFF, 0, 3, RequestStatus.INVAL),
        (0xFEEFF000, 0xFEF00FFF, 0, 1, RequestStatus.INVAL),
        (0xFED00000, 0xFEFFFFFF, 0, 0, RequestStatus.INVAL),
        (0xFEDFF000, 0xFEDFFFFF, 0, 3, RequestStatus.OK),
        (0xFEF00000, 0xFEF00FFF, 0, 3, RequestStatus.OK),
        (0x10000, 0x10FFF, 0x1000, READ | WRITE | MMIO, RequestStatus.OK),
        (0x10000, 0x10FFF, 0x1000, 8, RequestStatus.INVAL),
        (0x10000, 0xFFFF, 0x1000, 3, RequestStatus.INVAL),
        (0x10000, 0x107FF, 0x1000, 3, RequestStatus.RANGE),
        (0x10800, 0x117FF, 0x1000, 3, RequestStatus.RANGE),
        (0x10000, 0x10FFF, 0x1800, 3, RequestStatus.RANGE),
        (1 << 48, (1 << 48) + 0xFFF, 0, 3, RequestStatus.RANGE),
        (0x7000, 0x8FFF, 0, 3, RequestStatus.INVAL),  # overlaps
        (0, (1 << 64) - 1, 0, 3, RequestStatus.RANGE),
    ],
)
def test_map_statuses(world: World, first: int, last: int, gpa: int, flags: int, status: RequestStatus) -> None:
    world.attach(1, A)
    world.map(1, 0x8000, 0x8FFF, 0)
    assert world.map(1, first, last, gpa, flags) is status
    assert world.map(2, first, last, gpa, flags & 7) in (RequestStatus.NOENT, RequestStatus.INVAL)


@pytest.mark.parametrize(
    ("first", "last", "status", "left"),
    [
        (0x8000, 0x9FFF, RequestStatus.OK, [0xC000]),
        (0x8000, 0x8FFF, RequestStatus.RANGE, [0x8000, 0xC000]),  # would cut
        (0x9000, 0xFFFF, RequestStatus.RANGE, [0x8000, 0xC000]),
        (0x0, 0x8FFF, RequestStatus.RANGE, [0x8000, 0xC000]),
        (0x0, 0xFFFFF, RequestStatus.OK, []),  # with holes
        (0xA000, 0xBFFF, RequestStatus.OK, [0x8000, 0xC000]),  # nothing there
        (0x0, (1 << 64) - 1, RequestStatus.OK, []),
        (0x8000, 0x9FF0, RequestStatus.RANGE, [0x8000, 0xC000]),
        (0x8010, 0x9FFF, RequestStatus.RANGE, [0x8000, 0xC000]),
        (0x7FF0, 0xA00F, RequestStatus.OK, [0xC000]),  # its ends are outside of mappings, wherever
        (0xA010, 0xA020, RequestStatus.OK, [0x8000, 0xC000]),
        (0x9000, 0x8FFF, RequestStatus.INVAL, [0x8000, 0xC000]),
    ],
)
def test_unmap_statuses(world: World, first: int, last: int, status: RequestStatus, left: list[int]) -> None:
    world.attach(1, A)
    world.map(1, 0x8000, 0x9FFF, 0)
    world.map(1, 0xC000, 0xCFFF, 0)
    assert world.unmap(1, first, last) is status
    group = world.machine.system["a"].group
    assert group is not None
    assert [m.span.start for m in group.domain.mappings()] == left  # type: ignore[attr-defined]
    assert world.unmap(2, first, last) is RequestStatus.NOENT


def test_attach_and_detach_statuses(world: World) -> None:
    assert world.attach(1, 0x19) is RequestStatus.NOENT
    assert world.attach(1, 0x10) is RequestStatus.NOENT  # the IOMMU itself
    assert world.attach(0x10000, A) is RequestStatus.RANGE
    assert world.attach(1, A, flags=2) is RequestStatus.INVAL
    assert world.attach(1, A, reserved=b"\0\0\0\1") is RequestStatus.INVAL
    assert world.detach(1, A) is RequestStatus.INVAL
    assert world.detach(1, 0x19) is RequestStatus.NOENT
    assert world.attach(1, A) is RequestStatus.OK
    assert world.detach(2, A) is RequestStatus.INVAL
    assert world.reaches("a", 0x9000) is None  # attached still
    assert world.detach(1, A, reserved=b"\1" * 8) is RequestStatus.OK  # must be ignored, other than ATTACH's
    assert world.reaches("a", 0x9000) == 0x9000


def test_what_is_reserved_in_requests_is_ignored(world: World) -> None:
    """5.13.6: of the head; 5.13.6.8: of PROBE.  5.13.6.6 leaves UNMAP's to the device."""
    requests = [
        struct.pack("<B3sIII4x", 1, b"\1\2\3", 1, A, 0),
        struct.pack("<B3sIQQQI", 3, b"\1\2\3", 1, 0x8000, 0x8FFF, 0, 3),
        struct.pack("<B3sIQQ4s", 4, b"\1\2\3", 1, 0x8000, 0x8FFF, b"\1\2\3\4"),
        struct.pack("<B3sII8x", 2, b"\1\2\3", 1, A),
    ]
    assert [world.requests.ask(request) for request in requests] == [bytes(4)] * 4
    answer = world.requests.ask(struct.pack("<B3sI64s", 5, b"\1\2\3", A, b"\xff" * 64), PROBE_SIZE + 4)
    assert answer[PROBE_SIZE:] == bytes(4)


def test_a_mapping_through_which_nothing_may_be_done(world: World) -> None:
    """5.13.6.5: a mapping is what one MAP makes; 5.13.6.6: UNMAP would split it."""
    world.attach(1, A)
    assert world.map(1, 0x8000, 0x9FFF, 0, 0) is RequestStatus.OK
    assert world.reaches("a", 0x8000) is None
    with pytest.raises(DmaFault, match="PERMISSION"):
        world.machine.devices["a"].dma.read(0x8000, 4)
    assert world.map(1, 0x9000, 0x9FFF, 0, MMIO) is RequestStatus.INVAL
    assert world.unmap(1, 0x8000, 0x8FFF) is RequestStatus.RANGE
    assert world.unmap(1, 0x8000, 0x9FFF) is RequestStatus.OK
    assert world.map(1, 0x9000, 0x9FFF, 0, MMIO | READ | WRITE) is RequestStatus.OK
    assert world.reaches("a", 0x9000) == 0


def test_an_endpoint_does_not_join_where_its_reserved_region_is_mapped(world: World) -> None:
    """5.13.6.3.2: its properties do not fit those of the domain: UNSUPP."""
    region = ReservedRegion(Span(0x4000, 0x5FFF), RegionType.RESERVED)
    world.machine.system["b"].reserved.append(region)
    world.attach(1, A)
    world.map(1, 0x5000, 0x5FFF, 0)
    assert world.attach(1, B) is RequestStatus.UNSUPP
    assert world.reaches("b", 0x9000) == 0x9000  # where it was
    world.unmap(1, 0x5000, 0x5FFF)
    assert world.attach(1, B) is RequestStatus.OK
    assert world.map(1, 0x5000, 0x5FFF, 0) is RequestStatus.INVAL  # from now on: any of its endpoints counts
    assert world.detach(1, B) is RequestStatus.OK
    assert world.map(1, 0x5000, 0x5FFF, 0) is RequestStatus.OK


def test_unmap_and_map_need_their_feature(world: World) -> None:
    """5.13.6.5, 5.13.6.6: only available when F_MAP_UNMAP has been negotiated; else not known (5.13.6.2)."""
    world.start(F_PROBE)
    world.attach(1, A)
    for request in (
        struct.pack("<B3xIQQQI", 3, 1, 0x8000, 0x8FFF, 0, 3),
        struct.pack("<B3xIQQ4x", 4, 1, 0x8000, 0x8FFF),
    ):
        assert world.requests.ask(request) == b""
    assert world.reaches("a", 0x8000) is None


def test_a_group_goes_back_to_the_domain_it_came_from(world: World) -> None:
    """5.13.6.4.2: after DETACH nothing of that domain may be reached."""
    world.attach(1, LEFT)
    world.map(1, 0x10000, 0x10FFF, 0x80000)
    world.attach(2, RIGHT)  # and both with it, as they cannot be distinguished
    world.map(2, 0x10000, 0x10FFF, 0x90000)
    assert world.reaches("left", 0x10000) == 0x90000
    assert world.detach(2, RIGHT) is RequestStatus.OK
    assert world.reaches("left", 0x10000) == world.reaches("right", 0x10000) == 0x80000


def test_bypass_domains(world: World) -> None:
    assert world.attach(1, A, flags=1) is RequestStatus.OK
    assert world.reaches("a", 0x9000) == 0x9000
    assert world.map(1, 0, PAGE - 1, 0) is RequestStatus.INVAL
    assert world.unmap(1, 0, PAGE - 1) is RequestStatus.INVAL
    assert world.attach(1, B) is RequestStatus.INVAL  # of another kind
    world.start(F_PROBE)
    assert world.attach(1, A, flags=1) is RequestStatus.INVAL  # was not negotiated


def test_bypass_of_endpoints_without_a_domain(world: World) -> None:
    world.attach(1, B)
    world.map(1, 0x9000, 0x9FFF, 0x4000)
    world.driver.put(0x2000 + 0x24, 1, 0)
    assert (world.reaches("a", 0x9000), world.reaches("b", 0x9000)) == (None, 0x4000)
    world.driver.put(0x2000 + 0x24, 1, 2)  # no such value
    assert world.iommu.config_regs.BYPASS == 0
    world.driver.put(0x2000 + 0x24, 1, 1)
    assert world.reaches("a", 0x9000) == 0x9000
    world.start(F_PROBE)
    world.driver.put(0x2000 + 0x24, 1, 0)  # was not negotiated
    assert world.iommu.config_regs.BYPASS == 1


def test_mmio_needs_its_feature(world: World) -> None:
    world.start(F_MAP_UNMAP)
    world.attach(1, A)
    assert world.map(1, 0, PAGE - 1, 0, READ | MMIO) is RequestStatus.INVAL
    world.start(F_MAP_UNMAP | F_MMIO)
    world.attach(1, A)
    assert world.map(1, 0, PAGE - 1, 0, READ | MMIO) is RequestStatus.OK


def test_probe(world: World) -> None:
    request = struct.pack("<B3xI64s", 5, A, bytes(64))
    answer = world.requests.ask(request, PROBE_SIZE + 4)
    assert len(answer) == PROBE_SIZE + 4 and answer[PROBE_SIZE:] == bytes(4)
    assert struct.unpack_from("<HHB3xQQ", answer) == (1, 20, 1, 0xFEE00000, 0xFEEFFFFF)
    assert answer[24:PROBE_SIZE] == bytes(PROBE_SIZE - 24)
    answer = world.requests.ask(struct.pack("<B3xI64s", 5, 0x19, bytes(64)), PROBE_SIZE + 4)
    assert answer[PROBE_SIZE] == RequestStatus.NOENT
    for room in (4, 8, PROBE_SIZE + 3):  # no room for properties: none, and the status is in the tail (5.13.6.8.2)
        answer = world.requests.ask(request, room)
        assert answer == bytes(room - 4) + bytes([RequestStatus.INVAL, 0, 0, 0]), room
    assert world.requests.ask(request, 3) == b""


def test_probe_of_regions_that_overlap(world: World) -> None:
    """5.13.6.8.1.2: no two overlap; 5.13.6.8: each begins length + 4 bytes behind the one before."""
    found = [(0x4000, 0x5FFF), (0x5000, 0x6FFF), (0x8000, 0x8FFF)]
    reserved = [ReservedRegion(Span(*span), RegionType.RESERVED) for span in found]
    world.machine.system["a"].reserved += [*reserved, ReservedRegion(Span(0x9000, 0x9FFF), RegionType.SW_MSI)]
    answer = world.requests.ask(struct.pack("<B3xI64s", 5, A, bytes(64)), PROBE_SIZE + 4)
    assert [struct.unpack_from("<HHB3sQQ", answer, 24 * n) for n in range(4)] == [
        (1, 20, 0, bytes(3), 0x4000, 0x6FFF),
        (1, 20, 0, bytes(3), 0x8000, 0x8FFF),
        (1, 20, 1, bytes(3), 0xFEE00000, 0xFEEFFFFF),
        (0, 0, 0, bytes(3), 0, 0),
    ]


def test_more_regions_than_probe_can_tell_of() -> None:
    machine = parse(MACHINE, Path("m.toml"))
    spans = [Span.sized(n * 0x10000, 0x1000) for n in range(22)]
    machine.system["a"].reserved += [ReservedRegion(span, RegionType.RESERVED) for span in spans]
    device = machine.devices["viommu0"]
    assert isinstance(device, VirtioIommuDevice)
    with pytest.raises(ConfigError, match="a has 23 reserved regions"):
        device.serve(device.iommu, machine.system)
    machine.close()


def test_devices_that_are_not_pci_are_none_that_a_guest_can_use() -> None:
    """VIOT could name them; but the guest's own would then program an IOMMU that their DMA never meets."""
    text = MACHINE.replace("capabilities = ", "params = { mmio = { uart = 7 } }\ncapabilities = ")
    with pytest.raises(ConfigError, match=r"params\.mmio"):
        parse(text, Path("m.toml"))
    parse(text.replace('address = "0000:00:02.0"\n', "", 1), Path("m.toml")).close()


def test_input_range_by_default() -> None:
    """What hardware has; 64 bits are a choice."""
    for bits, text in ((48, MACHINE.replace("capabilities = { input_bits = 48 }\n", "")), (64, MACHINE)):
        machine = parse(text.replace("= 48 }", "= 64 }"), Path("m.toml"))
        device = machine.devices["viommu0"]
        assert isinstance(device, VirtioIommuDevice)
        assert (1 << bits) - 1 == device.config_regs.INPUT_END
        machine.close()


def test_requests_that_are_none(world: World) -> None:
    """5.13.6.2: of a type that is not known: the buffer is not written, and the used length is 0."""
    for kind in (0, 6, 9, 255):
        assert world.requests.ask(bytes([kind]) + bytes(71), PROBE_SIZE + 4) == b""
        assert world.driver.memory.read(world.requests.data + 0x1000, PROBE_SIZE + 4) == bytes(PROBE_SIZE + 4)
    assert world.requests.ask(b"") == b""
    assert world.requests.ask(b"\x01\0\0\0") == bytes([RequestStatus.INVAL, 0, 0, 0])  # too short
    assert world.requests.ask(b"\x01\0\0\0", 3) == b""  # no room for a tail
    assert world.iommu.errors == 0


def test_too_many_mappings() -> None:
    text = MACHINE.replace("input_bits = 48", "input_bits = 48, max_mappings = 2")
    world = World(parse(text, Path("m.toml")))
    world.attach(1, A)
    assert [world.map(1, n * PAGE, n * PAGE + PAGE - 1, 0) for n in range(3)] == [0, 0, RequestStatus.NOMEM]
    world.driver.close()
    world.machine.close()


def test_one_iommu_is_out_of_memory_and_the_other_is_not() -> None:
    """5.13.6.5 has no status for it but NOMEM; what one guest's mappings take is not taken from another IOMMU."""
    text = MACHINE.replace("input_bits = 48", 'input_bits = 48, max_memory = "64K"')
    text += '[[iommu]]\nname = "viommu1"\nkind = "virtio-iommu"\naddress = "0000:00:06.0"\ncovers = ["0000:00:07.0"]\n'
    text += '[[device]]\nname = "c"\nmodel = "edu"\naddress = "0000:00:07.0"\niommu = "viommu1"\n'
    world = World(parse(text, Path("m.toml")))
    other = world.machine.devices["viommu1"]
    assert isinstance(other, VirtioIommuDevice)
    requests, _ = (driver := Driver(other)).start([0, 1], None)

    def ask_other(kind: int, *fields: int | bytes, form: str) -> RequestStatus:
        return RequestStatus(requests.ask(struct.pack("<B3x" + form, kind, *fields))[0])

    def map_pages(domain: int) -> int:
        """How many until NOMEM."""
        for n in range(10_000):
            status = world.map(domain, n * PAGE, n * PAGE + PAGE - 1, 0)
            if status is RequestStatus.NOMEM:
                return n
            assert status is RequestStatus.OK
        pytest.fail("there is no end")

    assert world.attach(1, A) is RequestStatus.OK
    assert world.attach(2, B) is RequestStatus.OK
    made = map_pages(1)
    assert made
    assert map_pages(2) == 0  # the limit is of the IOMMU, not of a domain
    assert ask_other(1, 1, 0x38, 0, bytes(4), form="III4s") is RequestStatus.OK
    for n in range(2 * made):
        assert ask_other(3, 1, n * PAGE, n * PAGE + PAGE - 1, 0, READ | WRITE, form="IQQQI") is RequestStatus.OK
    assert world.unmap(1, 0, (made // 2) * PAGE - 1) is RequestStatus.OK  # what is given back may be taken again
    assert world.map(1, 0, PAGE - 1, 0) is RequestStatus.OK
    driver.close()
    world.driver.close()
    world.machine.close()


# ---- resets ---------------------------------------------------------------------------------------


def test_what_outlives_which_reset(world: World) -> None:
    world.attach(1, A)
    world.map(1, 0x8000, 0x8FFF, 0x4000)
    world.driver.put(0x14, 1, 0)  # by the driver: devices may be at work still
    assert world.reaches("a", 0x8000) == 0x4000
    world.start()  # a new driver finds nothing of the old one's
    assert world.reaches("a", 0x8000) == 0x8000
    world.attach(1, A)
    world.iommu.reset(ResetKind.DEVICE)
    assert world.reaches("a", 0x8000) == 0x8000
    assert world.iommu.config_regs.PAGE_SIZE_MASK


def test_groups_show_what_the_guest_has_attached(world: World) -> None:
    group = world.machine.system["a"].group
    assert group is not None and group.domain.type is DomainType.IDENTITY
    world.attach(1, A)
    world.map(1, 0x8000, 0x8FFF, 0x4000, READ)
    assert group.domain.type is DomainType.UNMANAGED
    (mapping,) = group.domain.mappings()  # type: ignore[attr-defined]
    assert (mapping.span.start, mapping.gpa, mapping.access) == (0x8000, 0x4000, Access.READ)
