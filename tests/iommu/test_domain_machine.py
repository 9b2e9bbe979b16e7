"""Paging domains, attachments and DMA of the shim, against a dict of pages: any order of calls."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.examples import examples
from vmodel import _shim
from vmodel.errors import Access, DmaFault, Reason
from vmodel.span import KiB, MiB

R, W, RW, NONE = Access.READ, Access.WRITE, Access.READ | Access.WRITE, Access(0)
RAM = 8 * MiB
#: The second half of the RAM: may only be read.
READ_ONLY = 6 * MiB
LAST_GPA = 12 * MiB - 1
APERTURE = 64 * MiB
#: Pages that a run may begin with, each a mapping of its own: the tree has several leaves then.
FILLED = 130
PAGE = 4 * KiB
PASIDS = (_shim.NO_PASID, 0, 7, 0xFFFFF)
SIZES = [
    4 * KiB,
    4 * KiB | 2 * MiB,
    4 * KiB | 64 * KiB | 2 * MiB,
    64 * KiB,
    64 * KiB | 1 * MiB,
    2 * MiB,
    8 * KiB | 16 * KiB | 32 * KiB,
]

#: (reason, iova, bytes done, gpa)
Failure = tuple[Reason, int, int, int]


@dataclass(frozen=True)
class Unit:
    """The smallest page's worth of a mapping, and the page that it is a part of."""

    gpa: int
    prot: Access
    mapping: int
    page: int
    page_size: int


@dataclass
class ModelDomain:
    """What the shim's paging domain is to do: each of its smallest pages in a dict."""

    page_sizes: int
    first: int
    max_mappings: int
    last: int = 0
    units: dict[int, Unit] = field(default_factory=dict)
    #: What an IOTLB may still say of an IOVA that was unmapped without a flush.
    stale: dict[int, set[tuple[int, Access]]] = field(default_factory=dict)
    dirty: set[int] | None = None
    made: int = 0

    def __post_init__(self) -> None:
        self.last = self.first + APERTURE - 1
        self.unit = self.page_sizes & -self.page_sizes
        self.sizes = [1 << n for n in range(63, 11, -1) if self.page_sizes >> n & 1]
        self.shim = _shim.Domain.paging(self.page_sizes, self.first, self.last, LAST_GPA, self.max_mappings)

    def mappings(self) -> list[tuple[int, int, int, int, int]]:
        found: list[tuple[int, int, int, int, int]] = []
        before: Unit | None = None
        for iova, unit in sorted(self.units.items()):
            if before and before.mapping == unit.mapping and found[-1][1] + 1 == iova:
                found[-1] = (found[-1][0], iova + self.unit - 1, *found[-1][2:])
            else:
                found.append((iova, iova + self.unit - 1, unit.gpa, int(unit.prot), 0))
            before = unit
        return found

    def map(self, iova: int, gpa: int, size: int, prot: int) -> int:
        """0 or an errno."""
        if not size or prot not in (1, 2, 3, _shim.PROT_NONE) or (iova | gpa | size) % self.unit:
            return errno.EINVAL
        if iova < self.first or iova + size - 1 > self.last or gpa + size - 1 > LAST_GPA:
            return errno.ERANGE
        if len(self.mappings()) >= self.max_mappings:
            return errno.ENOSPC
        wanted = range(iova, iova + size, self.unit)
        if any(at in self.units for at in wanted):
            return errno.EEXIST
        self.made += 1
        allowed = NONE if prot == _shim.PROT_NONE else Access(prot)
        at = iova
        while at < iova + size:
            page = next(s for s in self.sizes if not (at | gpa + at - iova) % s and at + s <= iova + size)
            for here in range(at, at + page, self.unit):
                self.units[here] = Unit(gpa + here - iova, allowed, self.made, at, page)
            at += page
        return 0

    def unmap(self, iova: int, size: int, defer: bool) -> int | tuple[int]:
        """(bytes,) or an errno."""
        if not size or (iova | size) % self.unit or iova + size > 2**64:
            return errno.EINVAL
        at, gone = iova, {}
        while at < iova + size:
            unit = self.units.get(at)
            if not unit or unit.page != at:
                break
            for here in range(at, at + unit.page_size, self.unit):
                gone[here] = self.units[here]
            at += unit.page_size
        ids = {unit.mapping for unit in gone.values()}
        ends = [self.units.get(iova - self.unit), self.units.get(at)]
        if len(ids) == 1 and all(end and end.mapping in ids for end in ends):  # cuts one in two
            if len(self.mappings()) >= self.max_mappings:
                return errno.ENOSPC
            # The second half counts as another mapping from now on.
            self.made += 1
            mapping, here = ids.pop(), at
            while (unit := self.units.get(here)) and unit.mapping == mapping:
                self.units[here] = Unit(unit.gpa, unit.prot, self.made, unit.page, unit.page_size)
                here += self.unit
        for here, unit in gone.items():
            del self.units[here]
            if defer:
                self.stale.setdefault(here, set()).add((unit.gpa, unit.prot))
        if gone and not defer:
            self.flush(iova, at - 1)
        return (at - iova,)

    def flush(self, start: int, last: int) -> None:
        self.stale = {at: old for at, old in self.stale.items() if at + self.unit - 1 < start or at > last}

    def translate(self, iova: int, access: Access) -> int | Reason:
        """The GPA."""
        if not self.first <= iova <= self.last:
            return Reason.INPUT_WIDTH
        unit = self.units.get(iova // self.unit * self.unit)
        if unit is None:
            return Reason.NOT_MAPPED
        return unit.gpa + iova % self.unit if access in unit.prot else Reason.PERMISSION

    def walk(self, iova: int, access: Access) -> Any:
        found = self.translate(iova, access)
        if isinstance(found, Reason):
            return found
        return next(m for m in self.mappings() if m[0] <= iova <= m[1])


class Plain:
    """Identity (True) or blocked."""

    def __init__(self, identity: bool) -> None:
        self.identity = identity
        self.shim = _shim.Domain.plain(_shim.DOMAIN_IDENTITY if identity else _shim.DOMAIN_BLOCKED)


Attached = ModelDomain | Plain | None


class ModelRequester:
    """A requester, and what it is attached to."""

    def __init__(self, memory: _shim.Memory) -> None:
        self.shim = _shim.Requester(memory)
        self.enabled = False
        self.attached: dict[int, Attached] = {}


def errno_of(call: Any, *args: Any) -> Any:
    """The result as a tuple (None: 0), or the errno."""
    try:
        result = call(*args)
    except OSError as error:
        return error.errno
    return 0 if result is None else (result,)


def failure(call: Any, *args: Any) -> Any:
    try:
        return call(*args)
    except DmaFault as fault:
        assert fault.level == 0 and fault.stage == 0
        return fault.reason, fault.iova, fault.done, fault.gpa


offsets = st.one_of(
    st.integers(0, 40).map(lambda n: n * 4 * KiB),
    st.integers(0, 24).map(lambda n: n * 64 * KiB),
    st.integers(0, 5).map(lambda n: n * 2 * MiB),
    st.integers(0, 5).map(lambda n: n * 2 * MiB - 8 * KiB),
    st.sampled_from([-4 * KiB, APERTURE, APERTURE - 4 * KiB, APERTURE - 2 * MiB, 0x800, 1]),
)
sizes = st.one_of(
    st.integers(1, 20).map(lambda n: n * 4 * KiB),
    st.integers(1, 16).map(lambda n: n * 64 * KiB),
    st.integers(1, 3).map(lambda n: n * 2 * MiB),
    st.integers(1, 2).map(lambda n: n * 2 * MiB + 16 * KiB),
    st.sampled_from([0, 1, 2049, 2 * APERTURE]),
)
accesses = st.sampled_from([R, W, RW, RW, RW, NONE])
which = st.integers(0, 1)
pasids = st.sampled_from([*PASIDS, _shim.NO_PASID, _shim.NO_PASID])


class DomainMachine(RuleBasedStateMachine):
    """Two paging domains, two requesters with PASIDs, and a memfd of RAM."""

    @initialize(
        shapes=st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)),
        bases=st.tuples(*2 * (st.sampled_from([0, 1 << 30, 2**64 - APERTURE]),)),
        limits=st.tuples(*2 * (st.sampled_from([2**64 - 1, 100, 5]),)),
        filled=st.sampled_from([0, FILLED]),
    )
    def begin(self, shapes: tuple[int, int], bases: tuple[int, int], limits: tuple[int, int], filled: int) -> None:
        self.fd = os.memfd_create("guest-ram")
        os.ftruncate(self.fd, RAM)
        self.ram = bytearray(RAM)
        self.memory = _shim.Memory(_shim.Files(), 8)
        self.memory.map(0, 4 * MiB, RW, self.fd, 0)
        self.memory.map(4 * MiB, 2 * MiB, RW, self.fd, 4 * MiB)
        self.memory.map(READ_ONLY, 2 * MiB, R, self.fd, READ_ONLY)
        self.domains = [ModelDomain(*one) for one in zip(shapes, bases, limits, strict=True)]
        self.requesters = [ModelRequester(self.memory) for _ in range(2)]
        for requester, domain in zip(self.requesters, self.domains, strict=True):
            requester.shim.enable(True)
            requester.enabled = True
            requester.shim.attach(domain.shim)
            requester.attached[_shim.NO_PASID] = domain
        self.counter = 0
        for domain in self.domains:
            for i in range(filled):
                at = (domain.first + i * domain.unit) % 2**64, i * domain.unit % (LAST_GPA + 1), domain.unit, RW
                assert errno_of(domain.shim.map, *at) == domain.map(*at)

    def teardown(self) -> None:
        if not hasattr(self, "fd"):
            return
        for domain in self.domains:
            self.check(domain)
        assert os.pread(self.fd, RAM, 0) == self.ram
        os.close(self.fd)

    def check(self, domain: ModelDomain) -> None:
        expected = domain.mappings()
        assert list(domain.shim.list()) == expected
        assert domain.shim.count()[0] == len(expected)
        domain.shim.check()

    # ---- mappings

    @rule(n=which, offset=offsets, gpa=offsets, size=sizes, prot=st.one_of(accesses, st.just(_shim.PROT_NONE)))
    def map(self, n: int, offset: int, gpa: int, size: int, prot: int) -> None:
        domain = self.domains[n]
        iova = max(domain.first + offset, 0) % 2**64
        gpa = max(gpa, 0)
        assert errno_of(domain.shim.map, iova, gpa, size, prot) == domain.map(iova, gpa, size, prot)

    @rule(n=which, first=st.integers(0, 60), gpa=st.integers(0, 400), count=st.integers(1, 8))
    def map_some(self, n: int, first: int, gpa: int, count: int) -> None:
        """Pages side by side, each a mapping of its own."""
        domain = self.domains[n]
        for i in range(count):
            at = (domain.first + (first + i) * domain.unit) % 2**64, (gpa + i) * domain.unit, domain.unit, RW
            assert errno_of(domain.shim.map, *at) == domain.map(*at)

    @rule(
        data=st.data(),
        n=which,
        at=st.integers(0, 12),
        gpa=st.integers(0, 12),
        count=st.integers(1, 3),
        ends=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        prot=st.sampled_from([R, W, RW, RW, RW]),
    )
    def map_large(
        self, data: st.DataObject, n: int, at: int, gpa: int, count: int, ends: tuple[int, int], prot: Access
    ) -> None:
        """Pages of one size, with some smallest ones before and behind them."""
        domain = self.domains[n]
        size = data.draw(st.sampled_from(domain.sizes))
        before, behind = (end * domain.unit for end in ends)
        iova, to = domain.first + at * size - before, gpa * size - before
        if iova < 0 or to < 0:
            return
        length = before + count * size + behind
        assert errno_of(domain.shim.map, iova, to, length, prot) == domain.map(iova, to, length, prot)

    @rule(n=which, offset=offsets, gpa=offsets, prot=st.sampled_from([0, 5, 7, 0x1000]))
    def map_badly(self, n: int, offset: int, gpa: int, prot: int) -> None:
        domain = self.domains[n]
        assert errno_of(domain.shim.map, max(domain.first + offset, 0) % 2**64, 0, domain.unit, prot) == errno.EINVAL
        assert errno_of(domain.shim.map, domain.first, 2**64 - domain.unit, 2 * domain.unit, R) == errno.ERANGE
        assert errno_of(domain.shim.map, 2**64 - domain.unit, 0, 2 * domain.unit, R) == errno.ERANGE

    @rule(n=which, offset=offsets, size=sizes, defer=st.booleans())
    def unmap(self, n: int, offset: int, size: int, defer: bool) -> None:
        domain = self.domains[n]
        iova = max(domain.first + offset, 0) % 2**64
        expected = domain.unmap(iova, size, defer)
        assert errno_of(domain.shim.unmap, iova, size, _shim.UNMAP_DEFER if defer else 0) == expected

    @precondition(lambda self: any(domain.units for domain in self.domains))
    @rule(data=st.data(), defer=st.booleans(), before=st.sampled_from([0, 0, 1, 2]), after=st.integers(-2, 2))
    def unmap_one(self, data: st.DataObject, defer: bool, before: int, after: int) -> None:
        """A mapping, or a little more or less: so that something does happen."""
        domain = data.draw(st.sampled_from([domain for domain in self.domains if domain.units]))
        start, last, *_ = data.draw(st.sampled_from(domain.mappings()))
        iova = (start + before * domain.unit) % 2**64
        size = min(max(last + 1 - iova + after * domain.unit, domain.unit), 2**64 - domain.unit)  # iova may be 0
        expected = domain.unmap(iova, size, defer)
        assert errno_of(domain.shim.unmap, iova, size, _shim.UNMAP_DEFER if defer else 0) == expected

    @rule(
        n=which,
        first=st.integers(0, FILLED),
        count=st.integers(2, 12),
        front=st.integers(1, 12),
        behind=st.integers(0, 3),
    )
    def join_and_cut(self, n: int, first: int, count: int, front: int, behind: int) -> None:
        """Pages become one mapping, wherever leaves of the tree end; it loses some page by page."""
        domain = self.domains[n]
        iova, gpa = domain.first + first * domain.unit, first * domain.unit % (LAST_GPA + 1)

        def unmap(at: int, size: int) -> None:
            at %= 2**64
            assert errno_of(domain.shim.unmap, at, size, 0) == domain.unmap(at, size, False)

        for i in range(count):
            unmap(iova + i * domain.unit, domain.unit)
        whole = iova % 2**64, gpa, count * domain.unit, RW
        assert errno_of(domain.shim.map, *whole) == domain.map(*whole)
        for i in [*range(min(front, count)), *range(count - 1, count - 1 - behind, -1)]:
            unmap(iova + i * domain.unit, domain.unit)

    @rule(n=which, offset=offsets, size=sizes, everything=st.booleans())
    def flush(self, n: int, offset: int, size: int, everything: bool) -> None:
        domain = self.domains[n]
        start = 0 if everything else max(domain.first + offset, 0) % 2**64
        last = 2**64 - 1 if everything else min(start + size, 2**64 - 1)
        assert errno_of(domain.shim.flush, start, last) == 0
        domain.flush(start, last)
        assert errno_of(domain.shim.flush, 1, 0) == errno.EINVAL

    @rule(n=which, offset=offsets, within=st.sampled_from([0, 1, 0xFFF, 0x1234]), access=accesses)
    def walk(self, n: int, offset: int, within: int, access: Access) -> None:
        """Past all IOTLBs: stale translations do not matter."""
        domain = self.domains[n]
        iova = max(domain.first + offset + within, 0) % 2**64
        expected = domain.walk(iova, access)
        if isinstance(expected, Reason):
            assert failure(domain.shim.walk, iova, access) == (expected, iova, 0, 0)
        else:
            assert domain.shim.walk(iova, access) == expected

    @rule(n=which)
    def list(self, n: int) -> None:
        self.check(self.domains[n])

    @invariant()
    def counts(self) -> None:
        for domain in getattr(self, "domains", []):
            count, taken = domain.shim.count()
            assert count <= domain.max_mappings
            assert (count == 0) == (not domain.units)
            assert taken or not count

    # ---- requesters

    @rule(n=which, pasid=pasids, to=st.sampled_from([0, 0, 1, 1, "identity", "blocked", None]))
    def attach(self, n: int, pasid: int, to: Any) -> None:
        """To another domain, to the same once more, or to none."""
        requester = self.requesters[n]
        domain: Attached = None
        if to is not None:
            domain = self.domains[to] if isinstance(to, int) else Plain(to == "identity")
        requester.shim.attach(domain.shim if domain else None, pasid)
        requester.attached[pasid] = domain

    @rule(n=which, on=st.sampled_from([True, True, False]))
    def enable(self, n: int, on: bool) -> None:
        self.requesters[n].shim.enable(on)
        self.requesters[n].enabled = on

    def translate_byte(self, at: Attached, iova: int, access: Access) -> int | Reason:
        if isinstance(at, ModelDomain):
            return at.translate(iova, access)
        return Reason.BLOCKED if at and not at.identity else iova

    def step(self, at: Attached, iova: int) -> int:
        """Bytes from iova on that share one fate."""
        return PAGE - iova % PAGE

    def expect(self, n: int, pasid: int, iova: int, data: bytearray, write: bool) -> Failure | None:
        """What an access does; reads fill `data`, writes change the model's RAM."""
        requester, access = self.requesters[n], W if write else R
        at = requester.attached.get(pasid)
        if not requester.enabled:
            return Reason.BUS_MASTER_OFF, iova, 0, 0
        if pasid != _shim.NO_PASID and at is None:
            return Reason.PASID, iova, 0, 0
        if iova + len(data) > 2**64:
            return Reason.WRAP, iova, 0, 0
        done = 0
        while done < len(data):
            here = iova + done
            gpa = self.translate_byte(at, here, access)
            if isinstance(gpa, Reason):
                return gpa, here, done, 0
            if gpa >= RAM:
                return Reason.NO_WINDOW, here, done, gpa
            if write and gpa >= READ_ONLY:
                return Reason.PERMISSION, here, done, gpa
            size = min(self.step(at, here), len(data) - done)
            if write:
                self.ram[gpa : gpa + size] = data[done : done + size]
                if isinstance(at, ModelDomain) and at.dirty is not None:
                    unit = at.units.get(here // at.unit * at.unit)
                    # An entry of the table has one dirty bit.  A stale translation may have none any more.
                    first, last = (unit.page, unit.page + unit.page_size - 1) if unit else (here, here + size - 1)
                    at.dirty.update(range(first // PAGE, last // PAGE + 1))
            else:
                data[done : done + size] = self.ram[gpa : gpa + size]
            done += size
        return None

    def is_stale(self, at: Attached, iova: int, size: int) -> bool:
        if not isinstance(at, ModelDomain):
            return False
        return any(start <= iova + size - 1 and iova <= start + at.unit - 1 for start in at.stale)

    def target(self, n: int, pasid: int, offset: int) -> tuple[Attached, int]:
        at = self.requesters[n].attached.get(pasid)
        return at, max((at.first if isinstance(at, ModelDomain) else 0) + offset, 0) % 2**64

    @rule(
        n=which,
        pasid=pasids,
        offset=offsets,
        within=st.integers(0, PAGE - 1),
        size=st.sampled_from([0, 1, 4, 64, 4096, 5000, 20000, 70000]),
        write=st.booleans(),
    )
    def dma(self, n: int, pasid: int, offset: int, within: int, size: int, write: bool) -> None:
        at, iova = self.target(n, pasid, offset + within)
        if self.is_stale(at, iova, size):
            self.translate(n, pasid, offset, within, W if write else R)
            return
        self.access(n, pasid, iova, size, write)

    def access(self, n: int, pasid: int, iova: int, size: int, write: bool) -> None:
        self.counter += 1
        data = bytearray(self.counter.to_bytes(4, "little") * (size // 4 + 1))[:size]
        found = bytearray(size)
        shim = self.requesters[n].shim
        if write:
            result = failure(shim.write, iova, data, pasid)
            assert result == self.expect(n, pasid, iova, data, True)
        else:
            result = failure(shim.readinto, iova, found, pasid)
            expected = bytearray(size)
            assert result == self.expect(n, pasid, iova, expected, False)
            assert found == expected

    @precondition(lambda self: any(domain.units for domain in self.domains))
    @rule(
        data=st.data(),
        n=which,
        pasid=pasids,
        before=st.integers(0, 9),
        size=st.sampled_from([1, 64, 4096, 12345]),
        write=st.booleans(),
    )
    def dma_to_a_mapping(self, data: st.DataObject, n: int, pasid: int, before: int, size: int, write: bool) -> None:
        """Where something is, so that the access succeeds, and is known to an IOTLB afterwards."""
        at = self.requesters[n].attached.get(pasid)
        if not isinstance(at, ModelDomain) or not at.units:
            return
        iova = data.draw(st.sampled_from(sorted({unit.page for unit in at.units.values()}))) - before
        if iova < 0 or self.is_stale(at, iova, size):
            return
        self.access(n, pasid, iova, size, write)

    @rule(n=which, pasid=pasids, offset=offsets, within=st.integers(0, PAGE - 1), access=accesses)
    def translate(self, n: int, pasid: int, offset: int, within: int, access: Access) -> None:
        """Twice: the second time it is in the IOTLB, unless it cannot be."""
        at, iova = self.target(n, pasid, offset + within)
        requester = self.requesters[n]
        for attempt in range(2):
            before = requester.shim.stats()
            found = failure(requester.shim.translate, [iova], access, pasid)
            after = requester.shim.stats()
            expected: Any = self.translate_byte(at, iova, access)
            if not requester.enabled:
                expected = Reason.BUS_MASTER_OFF
            elif pasid != _shim.NO_PASID and at is None:
                expected = Reason.PASID
            good = [(expected, iova, 0, 0) if isinstance(expected, Reason) else [expected]]
            if isinstance(at, ModelDomain) and requester.enabled:
                for gpa, prot in at.stale.get(iova // at.unit * at.unit, ()):
                    if access in prot:
                        good.append([gpa + iova % at.unit])
            assert found in good
            if attempt and isinstance(found, list) and at is not None:
                assert (after[5] - before[5], after[6] - before[6]) == (1, 0)  # hits, misses
            if isinstance(found, tuple):
                assert after[4] == before[4] + 1  # faults

    # ---- the log of writes

    @rule(n=which)
    def dirty_start(self, n: int) -> None:
        domain = self.domains[n]
        expected = errno.EBUSY if domain.dirty is not None else 0
        assert errno_of(domain.shim.dirty_start) == expected
        if domain.dirty is None:
            domain.dirty = set()

    @precondition(lambda self: any(domain.dirty is not None for domain in self.domains))
    @rule(n=which)
    def dirty_stop(self, n: int) -> None:
        domain = self.domains[n]
        expected = errno.EINVAL if domain.dirty is None else 0
        assert errno_of(domain.shim.dirty_stop) == expected
        domain.dirty = None

    @rule(
        n=which,
        offset=offsets,
        pages=st.integers(1, 3000),
        size=st.sampled_from([1, 1, 2, 16, 512]),
        keep=st.booleans(),
    )
    def dirty_report(self, n: int, offset: int, pages: int, size: int, keep: bool) -> None:
        domain = self.domains[n]
        page_size = PAGE * size
        start = max(domain.first + offset, 0) // page_size * page_size % 2**64
        length = min((pages + size - 1) // size * page_size, 2**64 - start)
        found = errno_of(domain.shim.dirty_report, start, length, page_size, keep)
        if domain.dirty is None:
            assert found == errno.EINVAL
            return
        inside = {page for page in domain.dirty if start <= page * PAGE < start + length}
        expected = 0
        for page in inside:
            expected |= 1 << (page * PAGE - start) // page_size
        assert int.from_bytes(found[0], "little") == expected
        if not keep:
            domain.dirty -= inside
        for bad in ((start + 1, length, page_size), (start, length + 1, page_size), (start, 0, page_size)):
            assert errno_of(domain.shim.dirty_report, *bad, keep) == errno.EINVAL
        for bad_size in (0, 2048, 3 * PAGE):
            assert errno_of(domain.shim.dirty_report, 0, PAGE, bad_size, keep) == errno.EINVAL


DomainMachine.TestCase.settings = settings(
    max_examples=examples(400),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestDomains = DomainMachine.TestCase
