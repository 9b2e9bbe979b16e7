"""What an IOMMU covers does only the DMA that its group's domain maps; without a group it does none.

Linux: a device whose probe fails (drivers/iommu/iommu.c, __iommu_probe_device) gets no entry in the IOMMU's tables, so
each of its requests is a fault.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.examples import examples
from tests.iommu.world import World, failing_attach, group_of, iommu
from vmodel._shim import Requester
from vmodel.dma import Dma
from vmodel.errors import DmaFault, IommuError, Reason
from vmodel.iommu import Endpoint, Iommu, dma_domain_alloc, paging_domain_alloc
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import Domain, DomainType, PagingDomain
from vmodel.iommu.driver import PlatformDevice
from vmodel.pci.topology import ISOLATION, Function, PortType
from vmodel.span import PAGE, Span

PAGES = 4


def mark(world: World) -> None:
    """Each page begins with its own address."""
    for gpa in range(0, PAGES * PAGE, PAGE):
        world.put(gpa, 0xC0DE_0000 | gpa)


def reached(dma: Dma) -> list[int | None]:
    """By page of IOVA: the guest's page that a read reaches; None: it fails."""
    found: list[int | None] = []
    for iova in range(0, PAGES * PAGE, PAGE):
        try:
            found.append(int.from_bytes(dma.read(iova, 8), "little") & 0xFFFF)
        except DmaFault:
            found.append(None)
    return found


NOTHING: list[int | None] = [None] * PAGES
ALL: list[int | None] = [page * PAGE for page in range(PAGES)]

UNIDENTIFIED: list[tuple[Callable[[], Iommu], str, str]] = [
    (lambda: iommu("smmu-v3", params={"stream_bits": 4}), "00:04.0", "it has no stream id of 4 bits"),
    (
        lambda: iommu("amd-vi", params={"device_table": 16}),
        "00:04.0",
        "it has no entry in the device table of 16 entries",
    ),
    (lambda: iommu("pamu"), "00:04.0", "it has no LIODN: params.liodns has no '0000:00:04.0'"),
]


@pytest.mark.parametrize(("make", "bdf", "why"), UNIDENTIFIED, ids=["smmu-v3", "amd-vi", "pamu"])
def test_one_that_cannot_be_identified(make: Callable[[], Iommu], bdf: str, why: str) -> None:
    world = World(make())
    mark(world)
    endpoint, dma = world.device(bdf)
    assert (endpoint.group, endpoint.why) == (None, f"no isolation: {why}")
    assert reached(dma) == NOTHING
    with pytest.raises(DmaFault) as caught:
        dma.write(0, b"x")
    assert caught.value.reason is Reason.BLOCKED
    last = world.system.iommus[0].faults.drain()[-1]
    assert (last.requester, last.domain, last.group, last.reason) == (bdf, "blocked", None, Reason.BLOCKED)
    assert str(last).endswith("BLOCKED (blocked domain, no group)")
    world.close()


def test_only_a_bypass_that_was_asked_for(world: World) -> None:
    mark(world)
    outside = world.plug(world.function("00:04.0"), bypass=True)
    assert (outside.group, outside.why) == (None, "it bypasses the IOMMUs")
    assert reached(world.dmas["00:04.0"]) == ALL


def test_one_that_belongs_to_two_groups(world: World) -> None:
    """A port without ACS is plugged into a switch whose other ports have it: their groups cannot become one."""
    mark(world)
    world.port("00:01.0", 1)
    world.port("01:00.0", 2, kind=PortType.UPSTREAM)
    for n in range(2):
        world.plug(world.port(f"02:0{n}.0", 3 + n, kind=PortType.DOWNSTREAM))
        group_of(world.device(f"0{3 + n}:00.0", PortType.ENDPOINT)[0]).claim_dma_owner("vfio")
    late = world.port("02:02.0", 5, acs=False, kind=PortType.DOWNSTREAM)
    endpoint, dma = world.device("05:00.0", PortType.ENDPOINT)
    assert endpoint.group is None, late
    assert endpoint.why.startswith("no isolation: it belongs to groups")
    assert reached(dma) == NOTHING


def test_one_beside_a_device_that_bypasses(world: World) -> None:
    mark(world)
    world.plug(world.function("00:03.0"), bypass=True)
    endpoint, dma = world.device("00:03.1")
    assert endpoint.group is None
    assert reached(dma) == NOTHING


def test_one_whose_groups_domain_does_not_fit(world: World) -> None:
    """A device that must have a region mapped joins a group that its owner has blocked."""
    mark(world)
    first, _ = world.device("00:03.0")
    group_of(first).claim_dma_owner("vfio")
    region = ReservedRegion(Span(0, PAGE - 1), RegionType.DIRECT)
    with pytest.raises(IommuError, match="must stay mapped"):
        world.plug(world.function("00:03.1"), reserved=[region])


def test_one_that_was_removed_and_comes_again(world: World) -> None:
    mark(world)
    endpoint, dma = world.device("00:03.0")
    assert reached(dma) == ALL
    world.system.remove(endpoint)
    assert reached(dma) == NOTHING
    again = world.system.add(endpoint.source, dma.requester)
    assert reached(dma) == ALL
    world.system.remove(again)
    world.system.add(endpoint.source, dma.requester, bypass=True)
    assert reached(dma) == ALL


def test_an_iommu_that_comes_later() -> None:
    """It takes the devices that are there: those that it cannot distinguish in one group, as if it had come first."""
    world = World()
    mark(world)
    first, dma = world.device("00:03.0")
    second, other = world.device("00:03.1")
    outside = world.plug(world.function("00:05.0"), bypass=True)
    assert (first.why, first.requester_id) == ("no IOMMU covers it", None)
    late = world.system.add_iommu(iommu())
    assert first.group is second.group is not None
    assert (first.iommu, first.requester_id, outside.iommu) == (late, 0x18, None)
    group_of(first).attach(late.blocked)
    assert reached(dma) == reached(other) == NOTHING
    assert reached(world.dmas["00:05.0"]) == ALL
    world.close()


def test_a_resolver_that_fails(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It is a bug of the IOMMU's model, which says so; the access is a fault like any other."""
    mark(world)
    endpoint, dma = world.device("00:03.0")
    one = world.system.iommus[0]
    group_of(endpoint).attach(one.blocked)

    def fails(_endpoint: Endpoint, _fault: DmaFault) -> bool:
        raise ZeroDivisionError

    one.resolver = fails
    assert reached(dma) == NOTHING
    assert len(one.faults.drain()) == PAGES
    assert "iommu0: finding the domain of 00:03.0 failed" in caplog.text


def test_owners_come_and_go_when_memory_runs_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocking needs no memory; without memory for the default domain the group is blocked, and has no owner.

    Linux: __iommu_group_set_domain_nofail.
    """
    mark(world)
    endpoint, dma = world.device("00:03.0")
    group = group_of(endpoint)
    with failing_attach(monkeypatch, 1):
        group.claim_dma_owner("vfio")
    assert (group.owner, reached(dma)) == ("vfio", NOTHING)
    group.attach(domain := paging_domain_alloc(endpoint))
    domain.map(0, PAGE, PAGE)
    assert reached(dma) == [PAGE, *NOTHING[1:]]
    with failing_attach(monkeypatch, 1):
        group.detach()
    assert (group.domain.type, domain.users, reached(dma)) == (DomainType.BLOCKED, 0, NOTHING)
    with failing_attach(monkeypatch, 1):
        group.release_dma_owner("vfio")
    assert (group.owner, group.domain.type, reached(dma)) == (None, DomainType.BLOCKED, NOTHING)
    group.detach()
    assert (group.domain.type, reached(dma)) == (DomainType.IDENTITY, ALL)


def test_one_that_cannot_be_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory for the log of stale uses."""
    world = World()
    mark(world)
    _, dma = world.device("00:03.0")

    def fails(_requester: Requester, on: bool) -> None:
        if on:
            raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(Requester, "check_stale", fails)
    world.system.add_iommu(iommu(params={"report_stale": True}))
    assert world.system["00:03.0"].why.startswith("no isolation: ")
    assert reached(dma) == NOTHING
    late = Dma(world.memory)
    late.bus_master = True
    with pytest.raises(OSError, match="no memory"):
        world.system.add(world.function("00:04.0"), late.requester)
    assert reached(late) == NOTHING
    world.close()


def test_what_one_needs_goes_with_it_if_it_cannot_join(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the members of the group would reach memory that only it must reach."""
    mark(world)
    first, dma = world.device("00:03.0")
    group_of(first).set_default(domain := dma_domain_alloc(first))
    domain.map(2 * PAGE, PAGE, PAGE)
    regions = [ReservedRegion(Span.sized(n * PAGE, PAGE), RegionType.DIRECT) for n in (0, 3)]
    before = list(domain.mappings())
    with failing_attach(monkeypatch, 1), pytest.raises(OSError, match="no memory"):
        world.plug(world.function("00:03.1"), reserved=regions)
    assert list(domain.mappings()) == before
    regions.append(ReservedRegion(Span.sized(2 * PAGE, PAGE), RegionType.DIRECT))
    with pytest.raises(IommuError, match="mapped 1:1"):
        world.plug(world.function("00:03.2"), reserved=regions)
    assert list(domain.mappings()) == before
    assert reached(dma) == [None, None, PAGE, None]


def test_one_that_no_iommu_covers_is_removed() -> None:
    """An IOMMU that comes later does not see it."""
    world = World()
    mark(world)
    endpoint, dma = world.device("00:03.0")
    world.system.remove(endpoint)
    world.system.add_iommu(iommu())
    assert reached(dma) == NOTHING
    world.close()


def test_teardown_under_load(world: World) -> None:
    """While threads read, their devices go and come again; no read reaches what their group's domain does not map."""
    mark(world)
    first, _ = world.device("00:03.0")
    group = group_of(first)
    group.attach(domain := paging_domain_alloc(first))
    domain.map(0, 2 * PAGE, PAGE)
    wrong: list[object] = []
    stop = threading.Event()
    pairs = [world.device(f"00:03.{n}") for n in range(1, 4)]

    def read(dma: Dma) -> None:
        while not stop.is_set():
            found = reached(dma)
            if found not in (NOTHING, [2 * PAGE, *NOTHING[1:]]):
                wrong.append(found)
                return

    threads = [threading.Thread(target=read, args=(dma,)) for _, dma in pairs]
    for thread in threads:
        thread.start()
    for _ in range(examples(100)):
        for n, (endpoint, dma) in enumerate(pairs):
            world.system.remove(endpoint)
            pairs[n] = world.system.add(endpoint.source, dma.requester), dma
    for endpoint, _ in pairs:
        world.system.remove(endpoint)
    world.system.close()
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert wrong == []
    assert [reached(dma) for _, dma in pairs] == [NOTHING] * 3


class FailClosed(RuleBasedStateMachine):
    """Functions come and go, ACS changes, domains are attached, owners claim, attachments and resolvers fail.

    Whatever happens, a device that an IOMMU covers reaches what its group's domain maps, and nothing else.
    """

    @initialize(
        kind=st.sampled_from(["vt-d", "amd-vi", "smmu-v3", "riscv", "pamu"]), narrow=st.booleans(), late=st.booleans()
    )
    def begin(self, kind: str, narrow: bool, late: bool) -> None:
        params: dict[str, Any] = {
            "vt-d": {},
            "amd-vi": {"device_table": 32 if narrow else 65536},
            "smmu-v3": {"stream_bits": 5 if narrow else 32},
            "riscv": {"directory_levels": 1 if narrow else 3, "extended": False},
            "pamu": {"liodns": {"0000:00:03.0": 1, "0000:00:03.1": 2, "0000:00:04.0": 1, "uart": 3}},
        }[kind]
        self.iommu = iommu(kind, "any", params=params)
        self.world = World(*([] if late else [self.iommu]))
        mark(self.world)
        world = self.world
        more = [world.port("00:01.0", 1), world.port("00:02.0", 2)]
        more += [world.port("02:00.0", 3, kind=PortType.UPSTREAM)]
        more += [world.port(f"03:0{n}.0", 4 + n, kind=PortType.DOWNSTREAM) for n in range(2)]
        more += [world.function(f"00:03.{n}", acs=ISOLATION if n == 2 else None) for n in range(3)]
        more += [world.function("00:04.0"), world.function("00:05.0", dma_aliases=(0x20, 0x18))]
        more += [world.function(f"01:00.{n}", PortType.ENDPOINT) for n in range(2)]
        more += [world.function(f"0{n}:00.0", PortType.ENDPOINT) for n in (4, 5)]
        self.sources: list[Function | PlatformDevice] = [*more, PlatformDevice("uart")]
        self.domains: list[PagingDomain] = []
        #: What each has mapped, by IOVA.
        self.maps: dict[Domain, dict[int, int]] = {}
        #: By requester: its DMA, and its endpoint while it is plugged in.
        self.plugged: dict[Dma, Endpoint] = {}
        #: Those that are out.
        self.out: list[tuple[Function | PlatformDevice, Dma]] = []
        self.patch = pytest.MonkeyPatch()

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()
            self.world.close()

    # ---- topology ---------------------------------------------------------------------------

    @rule(n=st.integers(0, 13), bypass=st.sampled_from([False] * 5 + [True]))
    def plug(self, n: int, bypass: bool) -> None:
        source = self.sources[n]
        if any(endpoint.source is source for endpoint in self.world.system.endpoints):
            return
        dma = Dma(self.world.memory)
        dma.bus_master = True
        self._add(source, dma, bypass)

    def _add(self, source: Function | PlatformDevice, dma: Dma, bypass: bool) -> None:
        try:
            endpoint = self.world.system.add(source, dma.requester, name=str(source), bypass=bypass)
        except OSError:
            self.out.append((source, dma))
        else:
            dma.endpoint = self.plugged[dma] = endpoint

    @precondition(lambda self: self.plugged)
    @rule(n=st.integers(0, 30))
    def unplug(self, n: int) -> None:
        dma, endpoint = list(self.plugged.items())[n % len(self.plugged)]
        self.world.system.remove(endpoint)
        del self.plugged[dma]
        self.out.append((endpoint.source, dma))

    @precondition(lambda self: self.out)
    @rule(n=st.integers(0, 30))
    def replug(self, n: int) -> None:
        """With the requester that it had before."""
        source, dma = self.out[n % len(self.out)]
        if all(endpoint.source is not source for endpoint in self.world.system.endpoints):
            self.out.remove((source, dma))
            self._add(source, dma, False)

    @rule(n=st.integers(0, 12), on=st.booleans())
    def acs(self, n: int, on: bool) -> None:
        source = self.sources[n]
        assert isinstance(source, Function)
        source.acs = ISOLATION if on else None

    @precondition(lambda self: not self.world.system.iommus)
    @rule()
    def add_iommu(self) -> None:
        self.world.system.add_iommu(self.iommu)

    # ---- domains ----------------------------------------------------------------------------

    @precondition(lambda self: any(e.group for e in self.plugged.values()))
    @rule(n=st.integers(0, 30))
    def make(self, n: int) -> None:
        found = [endpoint for endpoint in self.plugged.values() if endpoint.group]
        domain = paging_domain_alloc(found[n % len(found)])
        self.domains.append(domain)
        self.maps[domain] = {}

    @precondition(lambda self: self.domains)
    @rule(n=st.integers(0, 30), iova=st.integers(0, PAGES - 1), gpa=st.integers(0, PAGES - 1))
    def map(self, n: int, iova: int, gpa: int) -> None:
        domain = self.domains[n % len(self.domains)]
        with suppress(IommuError):
            domain.map(iova * PAGE, gpa * PAGE, PAGE)
            self.maps[domain][iova] = gpa * PAGE

    @precondition(lambda self: self.domains)
    @rule(n=st.integers(0, 30), iova=st.integers(0, PAGES - 1))
    def unmap(self, n: int, iova: int) -> None:
        domain = self.domains[n % len(self.domains)]
        with suppress(IommuError):
            domain.unmap(iova * PAGE, PAGE)
        self.maps[domain].pop(iova, None)

    @precondition(lambda self: self.world.system.groups)
    @rule(n=st.integers(0, 30), what=st.integers(0, 30), how=st.sampled_from(["attach", "detach", "set_default"]))
    def switch(self, n: int, what: int, how: str) -> None:
        group = self.world.system.groups[n % len(self.world.system.groups)]
        choice: list[Domain] = [group.iommu.identity, group.iommu.blocked, *self.domains]
        with suppress(OSError):
            if how == "detach":
                group.detach()
            else:
                getattr(group, how)(choice[what % len(choice)])

    @precondition(lambda self: self.world.system.groups)
    @rule(n=st.integers(0, 30), owner=st.sampled_from(["a", "b"]), how=st.sampled_from(["claim", "release"]))
    def own(self, n: int, owner: str, how: str) -> None:
        group = self.world.system.groups[n % len(self.world.system.groups)]
        with suppress(OSError):
            getattr(group, f"{how}_dma_owner")(owner)

    # ---- failures ---------------------------------------------------------------------------

    @rule(nth=st.integers(1, 4))
    def no_memory(self, nth: int) -> None:
        """One of the next attachments fails."""
        self.patch.undo()
        failing_attach(self.patch, nth).__enter__()

    @rule(how=st.sampled_from(["none", "fails", "says so"]))
    def resolver(self, how: str) -> None:
        """`says so`: it claims to have changed something, and has not."""

        def fails(_endpoint: Endpoint, _fault: DmaFault) -> bool:
            raise ZeroDivisionError

        self.iommu.resolver = {"none": None, "fails": fails, "says so": lambda _endpoint, _fault: True}[how]

    # ---- what holds -------------------------------------------------------------------------

    @invariant()
    def nothing_else_is_reached(self) -> None:
        if not hasattr(self, "world"):
            return
        for dma, endpoint in self.plugged.items():
            assert reached(dma) == self._expected(endpoint), endpoint
        for source, dma in self.out:
            assert reached(dma) == NOTHING, source

    def _expected(self, endpoint: Endpoint) -> list[int | None]:
        if endpoint.iommu is None:
            return ALL
        if endpoint.group is None:
            assert endpoint.why.startswith("no isolation")
            return NOTHING
        domain = endpoint.group.domain
        if domain is endpoint.iommu.identity:
            return ALL
        mapped = self.maps.get(domain, {})
        return [mapped.get(page) for page in range(PAGES)]


FailClosed.TestCase.settings = settings(
    max_examples=examples(100), stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWhateverHappens = FailClosed.TestCase
