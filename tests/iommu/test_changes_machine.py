"""Whatever happens to a system, its changes say all of it: a copy that is made from them alone is equal to it.

So is a folder that follows it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.examples import examples
from tests.iommu.folder import found
from tests.iommu.world import World, iommu
from vmodel.errors import IommuError
from vmodel.iommu import Change, ChangeKind, Endpoint, System, dma_domain_alloc, paging_domain_alloc, sysfs
from vmodel.iommu.domain import Domain
from vmodel.iommu.group import Group

K = ChangeKind


class Copy:
    """What a subscriber knows."""

    def __init__(self) -> None:
        self.devices: dict[Endpoint, Group | None] = {}
        self.drivers: dict[Endpoint, object] = {}
        self.domains: dict[tuple[Group, int | None], Domain] = {}
        self.defaults: dict[Group, object] = {}
        self.owners: dict[Group, object] = {}
        self.names: dict[Group, object] = {}
        #: What is between "about to" and what follows.
        self.open: set[tuple[ChangeKind, Endpoint]] = set()

    def changed(self, change: Change) -> None:
        group, endpoint, value = change.group, change.endpoint, change.value
        match change.kind:
            case K.ADD_GROUP:
                assert group is not None and isinstance(value, Domain)
                self.domains[group, None] = self.defaults[group] = value
                self.owners[group], self.names[group] = None, ""
            case K.REMOVED_GROUP:
                assert group is not None and group not in self.devices.values()
                del self.defaults[group], self.owners[group], self.names[group]
                self.domains = {key: other for key, other in self.domains.items() if key[0] is not group}
            case K.DOMAIN:
                assert group is not None
                if value is None:
                    del self.domains[group, change.pasid]
                else:
                    assert isinstance(value, Domain)
                    self.domains[group, change.pasid] = value
            case K.DEFAULT_DOMAIN:
                assert group is not None
                self.defaults[group] = value
            case K.OWNER:
                assert group is not None and group in self.owners
                self.owners[group] = value
            case K.NAME:
                assert group is not None
                self.names[group] = value
            case _:
                assert endpoint is not None
                self._device(change.kind, endpoint, group, value)

    def _device(self, kind: ChangeKind, endpoint: Endpoint, group: Group | None, value: object) -> None:
        before = {K.REMOVED_DEVICE: K.DEL_DEVICE, K.BOUND_DRIVER: K.BIND_DRIVER, K.UNBOUND_DRIVER: K.UNBIND_DRIVER}
        if kind in before.values():
            self.open.add((kind, endpoint))
        elif kind in before:
            self.open.remove((before[kind], endpoint))
        if kind is K.ADD_DEVICE:
            self.devices[endpoint] = group
            self.drivers.setdefault(endpoint, None)
        elif kind is K.REMOVED_DEVICE:
            assert self.devices.pop(endpoint) is group
            assert self.drivers.pop(endpoint) is None
        elif kind is K.BOUND_DRIVER:
            self.drivers[endpoint] = value
        elif kind is K.UNBOUND_DRIVER:
            assert self.drivers[endpoint] == value
            self.drivers[endpoint] = None


class ChangesMachine(RuleBasedStateMachine):
    """Devices of a few slots behind an IOMMU, and all that can be done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.system = self.system = System(self.world.topology, hotplug_binds_to_owner=True)
        self.copy = Copy()
        self.system.subscribe(self.copy.changed)
        self.folder = tempfile.TemporaryDirectory()
        self.following = sysfs.follow(self.system, Path(self.folder.name))
        self.functions = {(slot, n): self.world.function(f"00:0{slot}.{n}") for slot in (3, 4) for n in (0, 1)}

    def teardown(self) -> None:
        self.following.close()
        self.folder.cleanup()
        self.world.close()

    def pick(self, number: int) -> Endpoint | None:
        endpoints = self.system.endpoints
        return endpoints[number % len(endpoints)] if endpoints else None

    def with_group(self, number: int, call: Callable[[Endpoint, Group], object]) -> None:
        endpoint = self.pick(number)
        if endpoint is not None and endpoint.group is not None:
            with suppress(IommuError):
                call(endpoint, endpoint.group)

    @initialize(first=st.booleans())
    def start(self, first: bool) -> None:
        """Two devices of one group; the IOMMU is there, or comes later."""
        if first:
            self.add_iommu()
        for n in (0, 1):
            self.add(3, n, False)

    @rule()
    def add_iommu(self) -> None:
        if not self.system.iommus:
            self.system.add_iommu(iommu(pasid_bits=4, strict=True))

    @rule(slot=st.sampled_from((3, 4)), n=st.sampled_from((0, 1)), bypass=st.sampled_from((False, False, False, True)))
    def add(self, slot: int, n: int, bypass: bool) -> None:
        with suppress(IommuError):  # it is there
            self.world.plug(self.functions[slot, n], bypass=bypass)

    @rule(number=st.integers(0, 3))
    def remove(self, number: int) -> None:
        if (endpoint := self.pick(number)) is not None:
            self.system.remove(endpoint)

    @rule(number=st.integers(0, 3), driver=st.sampled_from(("nvme", "vm", "pcieport")))
    def bind(self, number: int, driver: str) -> None:
        if (endpoint := self.pick(number)) is not None:
            with suppress(IommuError):
                endpoint.bind(driver)

    @rule(number=st.integers(0, 3))
    def unbind(self, number: int) -> None:
        if (endpoint := self.pick(number)) is not None:
            endpoint.unbind()

    @rule(number=st.integers(0, 3), owner=st.sampled_from(("vm", "other")), for_device=st.booleans())
    def claim(self, number: int, owner: str, for_device: bool) -> None:
        self.with_group(number, lambda _, g: (g.claim_for_device if for_device else g.claim_dma_owner)(owner))

    @rule(number=st.integers(0, 3), for_device=st.booleans())
    def release(self, number: int, for_device: bool) -> None:
        self.with_group(number, lambda _, g: (g.release_for_device if for_device else g.release_dma_owner)(g.owner))

    @rule(number=st.integers(0, 3), pasid=st.sampled_from((None, 1, 2)))
    def attach(self, number: int, pasid: int | None) -> None:
        def call(endpoint: Endpoint, group: Group) -> None:
            domain = paging_domain_alloc(endpoint)
            group.attach(domain) if pasid is None else group.attach_pasid(domain, pasid)

        self.with_group(number, call)

    @rule(number=st.integers(0, 3), pasid=st.sampled_from((None, 1, 2)))
    def detach(self, number: int, pasid: int | None) -> None:
        self.with_group(number, lambda _, g: g.detach() if pasid is None else g.detach_pasid(pasid))

    @rule(number=st.integers(0, 3), dma=st.booleans(), forced=st.booleans())
    def set_default(self, number: int, dma: bool, forced: bool) -> None:
        self.with_group(
            number, lambda e, g: g.set_default(dma_domain_alloc(e) if dma else g.iommu.identity, forced=forced)
        )

    @rule(number=st.integers(0, 3))
    def defer_flushes(self, number: int) -> None:
        self.with_group(number, lambda _, g: getattr(g.default_domain, "defer_flushes", lambda: None)())

    @rule(number=st.integers(0, 3), name=st.sampled_from(("", "nets")))
    def call_it(self, number: int, name: str) -> None:
        self.with_group(number, lambda _, g: setattr(g, "name", name))

    @invariant()
    def the_copy_is_equal(self) -> None:
        copy, groups = self.copy, self.system.groups
        assert copy.devices == {e: e.group for e in self.system.endpoints}
        assert copy.drivers == {e: e.driver for e in self.system.endpoints}
        domains = {(g, None): g.domain for g in groups} | {(g, n): d for g in groups for n, d in g.pasids.items()}
        assert copy.domains == domains
        assert copy.defaults == {g: g.default_domain for g in groups}
        assert copy.owners == {g: g.owner for g in groups}
        assert copy.names == {g: g.name for g in groups}
        assert copy.open == set()

    @invariant()
    def the_folder_is_equal(self) -> None:
        assert self.following.error is None
        assert found(Path(self.folder.name)) == sysfs.tree(self.system)


ChangesMachine.TestCase.settings = settings(
    max_examples=examples(60), stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestChanges = ChangesMachine.TestCase
