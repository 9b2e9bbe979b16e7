"""The shim's loop over plain MAP and UNMAP requests does what Python does, for all kinds of requests and chains."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.virtio.driver import NEXT, WRITE
from tests.virtio.world import MACHINE, A, B, World
from vmodel.iommu.domain import PagingDomain
from vmodel.machine import parse
from vmodel.span import PAGE

INDIRECT = 4
ATTACH, DETACH, MAP, UNMAP, PROBE = 1, 2, 3, 4, 5
OUTSIDE = 1 << 40


class FreshWorld(World):
    """With all features, as Linux takes them; `fast`: by the shim where it may."""

    def __init__(self, fast: bool) -> None:
        super().__init__(parse(MACHINE, Path("m.toml")))
        self.iommu.fast_path = fast
        self.start(self.driver.offered())

    def batch(self, asked: list[tuple[str, bytes]]) -> list[object]:
        """Puts requests into the queue, rings once; what the driver finds then."""
        queue = self.requests
        for n, (shape, data) in enumerate(asked):
            head, source, answer = 8 * n, queue.data + 0x80 * n, queue.data + 0x4000 + 0x210 * n
            queue.memory.write(source, data)
            queue.memory.write(answer, b"\xee" * 0x210)
            room = {"no room": 2, "more room": 0x204, "some room": 0x20}.get(shape, 4)
            if shape == "outside":
                source = OUTSIDE
            elif shape == "last address":
                source = (1 << 64) - len(data) + 1  # one byte past it
            if shape in ("indirect", "backwards", "too long"):
                table = queue.data + 0x80 * n + 0x40
                parts = struct.pack("<QIHHQIHH", source, len(data), NEXT, 1, answer, room, WRITE, 0)
                if shape == "backwards":
                    parts = struct.pack("<QIHH", source, len(data), NEXT, 0) * 2
                queue.memory.write(table, parts)
                queue.describe(head, table, 32 if shape != "too long" else 24, INDIRECT)
            elif shape == "split":
                queue.describe(head, source, 4, NEXT, head + 1)
                queue.describe(head + 1, source + 4, len(data) - 4, NEXT, head + 2)
                queue.describe(head + 2, answer, room, WRITE)
            elif shape == "circle":
                queue.describe(head, source, len(data), NEXT, head)
            else:
                queue.describe(head, source, len(data), NEXT, head + 5)
                queue.describe(head + 5, answer, room, WRITE)
            queue.offer(head)
        queue.notify()
        answers = [queue.memory.read(queue.data + 0x4000 + 0x210 * n, 0x210) for n in range(len(asked))]
        maps = {
            number: [(m.span, m.gpa, m.access) for m in known.domain.mappings()]
            for number, known in self.iommu._domains.items()
            if isinstance(known.domain, PagingDomain)
        }
        return [self.driver.status, queue.used_now(), answers, maps]

    def close(self) -> None:
        self.driver.close()
        self.machine.close()


def mapping(domain: int, first: int, last: int, gpa: int, flags: int) -> bytes:
    return struct.pack("<B3xIQQQI", MAP, domain, first, last, gpa, flags)


def unmapping(domain: int, first: int, last: int) -> bytes:
    return struct.pack("<B3xIQQ4x", UNMAP, domain, first, last)


domains = st.sampled_from([1, 1, 1, 2, 3])
MSI = 0xFEE00000
firsts = st.sampled_from([0, PAGE, 2 * PAGE, 3 * PAGE, 5, MSI - PAGE, MSI, 1 << 47, 1 << 60, (1 << 64) - PAGE])
lasts = st.sampled_from(
    [0, PAGE - 1, 2 * PAGE - 1, 4 * PAGE - 1, 4 * PAGE, MSI - 1, MSI + PAGE - 1, (1 << 48) - 1, (1 << 64) - 1]
)
kinds = st.integers(0, 255)
requests = st.one_of(
    st.builds(
        mapping, domains, firsts, lasts, st.sampled_from([0, PAGE, 7]), st.sampled_from([1, 2, 3, 3, 3, 0, 4, 7, 8])
    ),
    st.builds(lambda d, n: mapping(d, n * PAGE, n * PAGE + PAGE - 1, n * PAGE, 3), domains, st.integers(0, 8)),
    st.builds(unmapping, domains, firsts, lasts),
    st.builds(lambda d, n: unmapping(d, n * PAGE, n * PAGE + PAGE - 1), domains, st.integers(0, 8)),
    st.builds(lambda d, e: struct.pack("<B3xIII4x", ATTACH, d, e, 0), domains, st.sampled_from([A, B])),
    st.builds(lambda d, e: struct.pack("<B3xII8x", DETACH, d, e), domains, st.sampled_from([A, B])),
    st.builds(lambda d, e, r: struct.pack("<B3xII8s", DETACH, d, e, r), domains, st.just(A), st.binary(max_size=8)),
    st.builds(lambda data, k: bytes([k]) + data, st.binary(min_size=5, max_size=80), kinds),
    st.builds(lambda e: struct.pack("<B3xI64x", PROBE, e), st.sampled_from([A, B, 1])),
    st.binary(min_size=5, max_size=40),
)
shapes = st.sampled_from(
    ["plain"] * 12
    + ["indirect"] * 6
    + ["split", "no room", "more room", "some room", "backwards", "too long", "circle", "outside", "last address"]
)
batches = st.lists(st.lists(st.tuples(shapes, requests), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=examples(80), deadline=None)
@given(batches)
def test_the_same_as_python(work: list[list[tuple[str, bytes]]]) -> None:
    first = [("plain", struct.pack("<B3xIII4x", ATTACH, 1, A, 0))]
    worlds = [FreshWorld(True), FreshWorld(False)]
    try:
        for batch in [first, *work]:
            fast, slow = (world.batch(batch) for world in worlds)
            assert fast == slow
    finally:
        for world in worlds:
            world.close()


@pytest.fixture
def world() -> Iterator[FreshWorld]:
    made = FreshWorld(True)
    made.attach(1, A)
    yield made
    made.close()


def test_plain_requests_are_not_pythons(world: FreshWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.iommu, "_request", lambda *_: pytest.fail("this was plain"))
    work = [("plain", mapping(1, n * PAGE, n * PAGE + PAGE - 1, 0, 3)) for n in range(6)]
    _, used, answers, maps = world.batch([*work, ("indirect", unmapping(1, 0, 4 * PAGE - 1))])
    assert (len(used), [a[:5] for a in answers]) == (7, [bytes(4) + b"\xee"] * 7)  # type: ignore[arg-type, attr-defined]
    assert [span.start for span, _, _ in maps[1]] == [4 * PAGE, 5 * PAGE]  # type: ignore[index]


def test_the_ring_wraps(world: FreshWorld) -> None:
    for n in range(3 * world.requests.size // 8):
        at = n * PAGE
        work = [mapping(1, at, at + PAGE - 1, at, 3), unmapping(1, at, at + PAGE - 1)] * 4
        _, used, answers, maps = world.batch([("plain", one) for one in work])
        assert len(used) == 8 and {a[0] for a in answers} == {0} and maps == {1: []}  # type: ignore[arg-type, attr-defined]


def test_a_used_ring_that_is_nowhere(world: FreshWorld) -> None:
    """The shim does nothing then, and Python finds out when it answers."""
    queue = world.iommu.queues[0]
    queue.device = OUTSIDE
    world.batch([("plain", mapping(1, 0, PAGE - 1, 0, 3))])
    assert world.driver.status & 0x40  # DEVICE_NEEDS_RESET
    domain = world.iommu._domains[1].domain
    assert isinstance(domain, PagingDomain) and len(domain) == 1
