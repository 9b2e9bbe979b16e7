"""The fast path against the general one: whatever the commands, both come to the same."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.nvme.driver import Driver, Pair, prps, start
from vmodel._shim import Domain
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.trace import Trace, Wanted, what

#: Guest memory that commands move data to and from, and where their lists are.
DATA, DATA_SIZE = 32 << 20, 1 << 20
LISTS = 40 << 20
NOWHERE = 1 << 40
BLOCKS = 256  # of 4096 bytes: namespace 1; namespace 2 has twice as many of 512

READ, WRITE = 0x02, 0x01
#: Where the doorbells of queue 1 are among all.
SQ1, CQ1 = 8, 12


class Twins:
    """Two controllers with the same namespaces, one of them without the fast path."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.drivers: list[Driver] = []
        self.pairs: list[Pair] = []
        for fast in (True, False):
            spaces: list[dict[str, Any]] = [{"lba": 4096}, {"lba": 512}]
            for n, space in enumerate(spaces):
                size = BLOCKS * 4096 >> 2 * n
                if kind == "file":
                    space.update(path=folder / f"{fast}-{n}.img", size=size)
                else:
                    space["memory"] = size
            params = {"namespaces": spaces, "fast_path": fast, "max_transfer": "128K", "shadow_doorbells": True}
            self.drivers.append(start(params))
            if kind == "iommu":
                translate(self.drivers[-1])
            self.pairs.append(self.drivers[-1].create(1, 16))

    def clear(self) -> None:
        for driver in self.drivers:
            for namespace in driver.device.namespaces():
                namespace.uncorrectable.clear()
            for nsid, shift in ((1, 12), (2, 9)):
                pair = self.pairs[self.drivers.index(driver)]
                for slba in range(0, namespace_blocks(nsid), 64):
                    assert pair.send(0x08, nsid=nsid, cdw10=slba, cdw12=63 | 1 << 25).status == 0, shift
            driver.memory.write(DATA, bytes(n * 11 & 0xFF for n in range(4096)) * (DATA_SIZE // 4096))

    def set_shadow(self) -> list[tuple[int, int]]:
        """Gives both shadow doorbells; where those, and the EventIdx page, are."""
        found = []
        for driver in self.drivers:
            tails, indexes = driver.memory.take(4096), driver.memory.take(4096)
            assert driver.admin.send(0x7C, dptr=prps(tails, indexes)).status == 0
            found.append((tails, indexes))
        return found

    def submit(self, commands: list[NvmeCommand], lists: list[tuple[int, bytes]]) -> list[list[tuple[int, int, int]]]:
        """(cid, status, result) of each command, in the order of the commands, by both controllers."""
        results = []
        for driver, pair in zip(self.drivers, self.pairs, strict=True):
            for at, data in lists:
                driver.memory.write(at, data)
            for command in commands:
                pair.write(command)
            pair.ring()
            done = pair.wait(len(commands))
            assert len(done) == len(commands)
            results.append(sorted((c.cid, c.status, c.result) for c in done))
        return results

    def contents(self) -> list[tuple[bytes, list[bytes], list[int]]]:
        """Guest memory, and the namespaces, of both."""
        found = []
        for driver in self.drivers:
            spaces = []
            for namespace in driver.device.namespaces():
                view = namespace.backend.view(0, namespace.backend.size)
                spaces.append(bytes(view) if view is not None else file_of(namespace.backend))
            health = driver.device.health
            counts = [health.reads, health.writes, health.bytes_read, health.bytes_written]
            found.append((driver.memory.read(DATA, DATA_SIZE), spaces, counts))
        return found

    def close(self) -> None:
        for driver in self.drivers:
            assert not driver.device.errors
            driver.device.close()
            driver.close()


def translate(driver: Driver) -> None:
    """An IOMMU that maps page by page, with some pages missing and some that are only read."""
    domain = Domain.paging(4096, 0, 2**48 - 1, 2**48 - 1, 1 << 20)
    for page in range(0, 64 << 20, 4096):
        n = (page - DATA) // 4096
        if not (0 <= n < DATA_SIZE // 4096 and n % 16 == 5):
            domain.map(page, page, 4096, 1 if 0 <= n < DATA_SIZE // 4096 and n % 16 == 9 else 3)
    driver.device.dma.requester.attach(domain)


def namespace_blocks(nsid: int) -> int:
    return BLOCKS if nsid == 1 else BLOCKS * 2


def file_of(backend: Any) -> bytes:
    return os.pread(backend._fd, backend.size, 0)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Twins]]:
    made: dict[str, Twins] = {}

    def get(kind: str) -> Twins:
        if kind not in made:
            made[kind] = Twins(tmp_path_factory.mktemp("twins"), kind)
        return made[kind]

    yield get
    for pair in made.values():
        pair.close()


@st.composite
def pointers(draw: st.DrawFn, n: int, size: int) -> tuple[int, bytes, list[tuple[int, bytes]]]:
    """(flags, data pointer, what is to be written for it); about one in four is wrong in some way."""
    at, wrong = LISTS + n * 65536, draw(st.integers(0, 3)) == 0
    lists: list[tuple[int, bytes]] = []
    pages = draw(st.lists(st.integers(0, DATA_SIZE // 4096 - 1), min_size=40, max_size=40))
    if draw(st.booleans()):
        offset = 4 * draw(st.integers(0, 1023)) if draw(st.booleans()) else 0
        rest = [DATA + 4096 * page for page in pages[: -(-(offset + size) // 4096)]][1:]
        first = DATA + 4096 * pages[0] + offset
        if wrong:
            where = draw(st.integers(0, 2))
            if where == 0:
                first += draw(st.integers(1, 3))
            elif where == 1 and rest:
                rest[draw(st.integers(0, len(rest) - 1))] += draw(st.integers(1, 4095))
            else:
                first = NOWHERE
        if len(rest) < 2:
            return 0, prps(first, rest[0] if rest else 7), lists
        # The list begins anywhere in its page.
        list_at = at + 4096 - 8 * draw(st.integers(1, 40))
        room = (at + 4096 - list_at) // 8
        if len(rest) > room:
            lists.append((at + 4096, struct.pack(f"<{len(rest) - room + 1}Q", *rest[room - 1 :])))
            rest = [*rest[: room - 1], at + 4096]
        lists.append((list_at, struct.pack(f"<{len(rest)}Q", *rest)))
        return 0, prps(first, list_at + (wrong and draw(st.integers(0, 7)))), lists
    flags = draw(st.sampled_from([1, 2])) << 6
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=5)))
    parts = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    raw = b"".join(
        struct.pack("<QI3xB", DATA + 4096 * page + draw(st.integers(0, 500)), part, 0)
        for page, part in zip(pages, parts, strict=False)
    )
    if wrong:
        change = draw(st.integers(0, 3))
        if change == 0:
            raw += struct.pack("<QI3xB", DATA, 512, 0)
        elif change == 1:
            raw = raw[:15] + bytes([draw(st.sampled_from([0x01, 0x10, 0x20, 0x40]))]) + raw[16:]
        elif change == 2:
            raw = struct.pack("<Q", NOWHERE) + raw[8:]
        else:
            return flags, struct.pack("<QI3xB", at, 16 * len(parts) + 1, 0x30), [(at, raw)]
    if len(raw) == 16:
        return flags, raw, lists
    return flags, struct.pack("<QI3xB", at, len(raw), 0x30), [(at, raw)]


@st.composite
def commands(draw: st.DrawFn, n: int) -> tuple[NvmeCommand, list[tuple[int, bytes]]]:
    opcode = draw(st.sampled_from([READ, READ, READ, WRITE, WRITE, WRITE, 0x00, 0x04, 0x05, 0x08, 0x0C, 0x7F]))
    nsid = draw(st.sampled_from([1, 1, 1, 2, 2, 0, 3, 300, 0xFFFF_FFFF]))
    blocks = draw(st.one_of(st.integers(1, 4), st.integers(1, 40)))
    limit = namespace_blocks(nsid)
    slba = draw(st.one_of(st.integers(0, limit - blocks), st.integers(limit - 2, limit + 2), st.just(2**64 - 1)))
    size = blocks << (9 if nsid == 2 else 12)
    flags, dptr, lists = draw(pointers(n, min(size, 40 * 4096)))
    if draw(st.integers(0, 7)) == 0:
        flags |= draw(st.sampled_from([1, 2, 3, 0xC0, 4]))
    bits = draw(st.sampled_from([0, 0, 0, 0, 1 << 30, 1 << 31, 1 << 26, 1 << 20, 1 << 25]))
    command = NvmeCommand.make(
        opcode,
        flags=flags,
        cid=n + 1,
        nsid=nsid,
        dptr=dptr,
        cdw10=slba & 0xFFFF_FFFF,
        cdw11=slba >> 32,
        cdw12=blocks - 1 | bits,
    )
    return command, lists


@st.composite
def batches(draw: st.DrawFn) -> list[list[tuple[NvmeCommand, list[tuple[int, bytes]]]]]:
    return [[draw(commands(n)) for n in range(draw(st.integers(1, 15)))] for _ in range(draw(st.integers(1, 3)))]


@pytest.mark.parametrize("kind", ["memory", "iommu"])
@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None, max_examples=examples(100)
)
@given(work=batches())
def test_memory(
    twins: Callable[[str], Twins], kind: str, work: list[list[tuple[NvmeCommand, list[tuple[int, bytes]]]]]
) -> None:
    both = twins(kind)
    both.clear()
    for batch in work:
        fast, general = both.submit([c for c, _ in batch], [written for _, lists in batch for written in lists])
        assert fast == general
    first, second = both.contents()
    assert first[:2] == second[:2]


@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None, max_examples=examples(40)
)
@given(batches())
def test_files(twins: Callable[[str], Twins], work: list[list[tuple[NvmeCommand, list[tuple[int, bytes]]]]]) -> None:
    """One command at a time: several may be carried out in any order, as workers do them."""
    both = twins("file")
    both.clear()
    for command, lists in (one for batch in work for one in batch):
        fast, general = both.submit([command], lists)
        assert fast == general
    first, second = both.contents()
    assert first[:2] == second[:2]


@contextlib.contextmanager
def counted(driver: Driver) -> Iterator[list[int]]:
    """The opcodes of commands that go the general way meanwhile."""
    seen: list[int] = []
    queue = driver.device.submission[1]
    original = queue.carry_out

    def carry_out(command: NvmeCommand) -> None:
        seen.append(command.opcode)
        original(command)

    queue.carry_out = carry_out  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del queue.carry_out


def test_the_fast_path_is_taken(twins: Callable[[str], Twins]) -> None:
    """Else the properties above would compare a thing with itself."""
    both = twins("memory")
    both.clear()
    found = []
    for driver, pair in zip(both.drivers, both.pairs, strict=True):
        with counted(driver) as seen:
            for n in range(8):
                assert pair.send(WRITE, nsid=1, dptr=prps(DATA), cdw10=n).status == 0
        found.append(len(seen))
    assert found == [0, 8]


@settings(deadline=None)
@given(
    offset=st.one_of(st.just(0), st.integers(0, 1023).map(lambda n: 4 * n)),
    blocks=st.integers(1, 32),
    slots=st.integers(1, 40),
    pages=st.lists(st.integers(0, DATA_SIZE // 4096 - 1), min_size=33, max_size=33, unique=True),
    kind=st.sampled_from(["prp", "block", "segment"]),
)
def test_every_shape_that_is_right_is_plain(
    twins: Callable[[str], Twins], offset: int, blocks: int, slots: int, pages: list[int], kind: str
) -> None:
    """Lists that begin anywhere in their page, one that leads to another; SGLs of one segment."""
    both = twins("memory")
    driver, pair, size = both.drivers[0], both.pairs[0], blocks * 4096
    places = [DATA + 4096 * page for page in pages[: -(-(offset + size) // 4096)]]
    flags = 0
    if kind == "prp":
        rest, at = places[1:], LISTS + 4096 - 8 * slots
        if len(rest) > slots:
            driver.memory.write(LISTS + 4096, struct.pack(f"<{len(rest) - slots + 1}Q", *rest[slots - 1 :]))
            rest = [*rest[: slots - 1], LISTS + 4096]
        driver.memory.write(at, struct.pack(f"<{len(rest)}Q", *rest))
        dptr = prps(places[0] + offset, at if len(places) > 2 else places[-1])
        parts = [(place, 4096) for place in places]
        parts[0] = places[0] + offset, 4096 - offset
    elif kind == "block":
        flags, parts = 1 << 6, [(DATA + offset, size)]
        dptr = struct.pack("<QI3xB", DATA + offset, size, 0)
    else:
        flags, parts = 1 << 6, [(place, 4096) for place in places[:blocks]]
        driver.memory.write(LISTS, b"".join(struct.pack("<QI3xB", at, length, 0) for at, length in parts))
        dptr = struct.pack("<QI3xB", LISTS, 16 * len(parts), 0x30)
    data = bytes(n * 13 + slots & 0xFF for n in range(size))
    view = next(iter(driver.device.namespaces())).backend.view(0, size)
    assert view is not None
    view[:] = data
    with counted(driver) as seen:
        assert pair.send(READ, nsid=1, flags=flags, dptr=dptr, cdw12=blocks - 1).status == 0
        found = b"".join(driver.memory.read(at, length) for at, length in parts)[:size]
        assert found == data
        view[:] = bytes(size)
        assert pair.send(WRITE, nsid=1, flags=flags, dptr=dptr, cdw12=blocks - 1).status == 0
        assert view == data
    assert not seen


def test_counters_agree(tmp_path: Path) -> None:
    both = Twins(tmp_path, "memory")
    batch = [NvmeCommand.make(1 + n % 2, cid=n + 1, nsid=1, dptr=prps(DATA), cdw10=n, cdw12=0) for n in range(15)]
    fast, general = both.submit(batch, [])
    assert fast == general
    first, second = both.contents()
    assert first == second
    assert first[2] == [7, 8, 7 * 4096, 8 * 4096]
    both.close()


@pytest.mark.parametrize(("kind", "reason"), [("memory", "NO_WINDOW"), ("iommu", "NOT_MAPPED")])
def test_what_is_refused_while_somebody_follows(kind: str, reason: str, tmp_path: Path) -> None:
    """`vmodel log` has the transfer that the client's memory, or an IOMMU, refuses: the fast path is off meanwhile."""
    both = Twins(tmp_path, kind)
    driver, pair = both.drivers[0], both.pairs[0]
    with Trace({driver.device.name: driver.device}) as trace:
        number = trace.follow(Wanted.of([], [], ["dma"]))
        assert pair.send(READ, nsid=1, dptr=prps(NOWHERE)).status != 0
        lines = [what(record) for record in trace.take(number) or []]
    assert f"dma.write {NOWHERE:#x}+4096: {reason} at {NOWHERE:#x}, 0 bytes done" in lines
    both.close()


def test_shadow_doorbells(tmp_path: Path) -> None:
    """No doorbell is needed while commands come; EventIdx says from where on one is."""
    both = Twins(tmp_path, "memory")
    for (driver, pair), (tails, indexes) in zip(
        zip(both.drivers, both.pairs, strict=True), both.set_shadow(), strict=True
    ):

        def event(driver: Driver = driver, indexes: int = indexes) -> int:
            return struct.unpack("<I", driver.memory.read(indexes + SQ1, 4))[0]

        def tail(value: int, driver: Driver = driver, tails: int = tails) -> None:
            driver.memory.write(tails + SQ1, struct.pack("<I", value))

        for n in range(40):
            # Two commands, of which the doorbell tells only one; the shadow has both.
            for k in range(2):
                pair.write(NvmeCommand.make(WRITE, nsid=1, cdw10=2 * n + k, dptr=prps(DATA)))
            tail(pair.tail)
            driver.doorbell(1, (pair.tail - 1) % pair.entries)
            driver.run()
            assert event() == pair.tail
            assert len(pair.reap()) == 2
            driver.memory.write(tails + CQ1, struct.pack("<I", pair.head))
        # A full completion queue, whose head only the shadow tells.
        for _ in range(3):
            for n in range(15):
                pair.write(NvmeCommand.make(WRITE, nsid=1, cdw10=n, dptr=prps(DATA)))
            tail(pair.tail)
            driver.doorbell(1, pair.tail)
            driver.run()
            found = 0
            while found < 15:
                at = pair.cq + 16 * pair.head
                assert driver.memory.read(at + 14, 1)[0] & 1 == pair.phase
                pair.head, found = (pair.head + 1) % 16, found + 1
                pair.phase ^= not pair.head
            driver.memory.write(tails + CQ1, struct.pack("<I", pair.head))
        # Nonsense in the shadow is passed over; shadows that are gone are fatal.
        tail(16)
        driver.doorbell(1, pair.tail)
        driver.run()
        assert not driver.status.CFS
        os.ftruncate(driver.memory.fd, tails)
        driver.doorbell(1, (pair.tail + 1) % 16)
        driver.run()
        assert driver.status.CFS
    both.close()
