"""`System`: the IOMMUs, devices and groups of a machine."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator

from vmodel import _shim
from vmodel.errors import IommuError
from vmodel.iommu.capabilities import ReservedRegion
from vmodel.iommu.changes import ChangeKind, Changes, Subscriber
from vmodel.iommu.domain import DEFAULT_TYPES, AllocFlags, Domain, DomainType, PagingDomain
from vmodel.iommu.driver import PlatformDevice, Source
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.group import Group
from vmodel.iommu.grouping import find_group
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.release import released, wait_for_owner
from vmodel.iommu.seconds import check_seconds
from vmodel.pci.topology import Function, Topology

log = logging.getLogger(__name__)


def _place(source: Source) -> Source | str:
    """What no two devices have in common: platform devices their name in sysfs."""
    return source.folder if isinstance(source, PlatformDevice) else source


class System:
    """The IOMMUs, endpoints and groups of one machine.

    `group_mf`: all functions of a multifunction device form one group (never its virtual functions); `default`: the
    type of new groups' default domains, IDENTITY, DMA or DMA_FQ, as Linux's iommu.passthrough and iommu.strict choose
    it.  ValueError: another type.

    `unbind_waits`: how many seconds the unbinding of a driver, and the removal of a device, wait until the owner of the
    group has released it; 0: they do not wait; ValueError: less, or NaN.  `hotplug_binds_to_owner`: a device that is
    added to a group with an owner is bound to that owner; otherwise it has no driver.

    >>> system = System(default=DomainType.DMA)  # as iommu.passthrough=0 iommu.strict=1
    """

    def __init__(
        self,
        topology: Topology | None = None,
        *,
        group_mf: bool = False,
        default: DomainType = DomainType.IDENTITY,
        unbind_waits: float = 0.0,
        hotplug_binds_to_owner: bool = False,
    ) -> None:
        if default not in DEFAULT_TYPES:
            raise ValueError(f"{default.value} is no type of default domains")
        check_seconds("unbind_waits", unbind_waits)
        self.default = default
        self.topology = topology or Topology()
        self.group_mf = group_mf
        self.iommus: list[Iommu] = []
        self.endpoints: list[Endpoint] = []
        self.groups: list[Group] = []
        self.unbind_waits = unbind_waits
        self.hotplug_binds_to_owner = hotplug_binds_to_owner
        #: The lock of the system and its groups, which reports changes.
        self._lock = self.changes = Changes()
        self._numbers = itertools.count()

    def add_iommu(self, iommu: Iommu) -> Iommu:
        """Adds an IOMMU.  Devices that it covers, and that no other IOMMU does, are behind it from now on.

        A device whose group has a domain that does not fit it, or has no memory for it, is in no group, and is blocked.
        IommuError(EEXIST): the name is used.  (Linux bus_iommu_probe)
        """
        with self._lock:
            if any(other.name == iommu.name for other in self.iommus):
                raise IommuError(errno.EEXIST, f"an IOMMU {iommu.name!r} already exists")
            self.iommus.append(iommu)
            self.topology.has_ivrs |= iommu.driver.in_ivrs
            found = [e for e in self.endpoints if e.iommu is None and not e.bypasses and e.source in iommu]
            # All of them first: none gets a group that counts on another one's staying outside.
            self.endpoints = [e for e in self.endpoints if e not in found]
            for endpoint in found:
                endpoint.block()
            for endpoint in found:
                try:
                    endpoint.cover(iommu)
                except OSError as error:
                    endpoint.why = f"no isolation: {error}"
            for endpoint in found:
                try:
                    if not endpoint.why:
                        self._find_group(endpoint)
                except OSError as error:  # IommuError is one
                    endpoint.why = f"no isolation: {error}"
                    log.warning("%s is blocked: %s", endpoint.name, endpoint.why)
                self.endpoints.append(endpoint)
                self.changes.notify(ChangeKind.ADD_DEVICE, endpoint, endpoint.group)
        return iommu

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` with each Change from now on; returns a function that ends it.

        It is called after the change, or before one that has a kind "about to", on the thread that makes the change,
        without the System's lock: it may call the System, its groups and endpoints.  Changes that are made during the
        call, by itself or another thread, follow when it has returned.  Its exceptions are logged, and change nothing.

        >>> system = System()
        >>> end = system.subscribe(lambda change: print(change.kind.value, change.endpoint))
        >>> end()
        """
        return self.changes.subscribe(subscriber)

    def add(
        self,
        source: Source,
        requester: _shim.Requester | None = None,
        *,
        name: str = "",
        iommu: Iommu | None = None,
        bypass: bool = False,
        reserved: Iterable[ReservedRegion] = (),
        max_pasids: int | None = None,
        untrusted: bool = False,
        enforce_snoop: bool | None = None,
    ) -> Endpoint:
        """Adds a device, at the start or hot-plugged, and attaches it to its group's domain before its first DMA.

        `iommu`: the IOMMU to use instead of the first that covers the device; `bypass`: use none; `max_pasids`: how
        many PASIDs the device can use, 0 without PCIe's PASID capability, None: as many as the IOMMU has; `untrusted`:
        it is behind an external port, and a new group gets a DMA domain whatever the default is; `enforce_snoop`:
        whether its DMA can be made to snoop (on Arm a property of the root complex, CANWBS of the IORT), None: as its
        IOMMU can.  DMA of a device that no IOMMU covers is not translated.  A covered device that cannot be in a group
        does no DMA: each access is a fault, and `why` has the reason.  IommuError: EEXIST the device, or its name in
        sysfs, exists already; EINVAL its group has a domain that does not fit it, so it was not added, and does no DMA.
        """
        with self._lock:
            if any(_place(e.source) == _place(source) for e in self.endpoints):
                raise IommuError(errno.EEXIST, f"{source} already exists")
            if iommu is None and not bypass:
                iommu = next((candidate for candidate in self.iommus if source in candidate), None)
            if requester is not None and iommu is not None:
                requester.block()  # before anything that can fail
            name = name or getattr(source, "name", "")
            endpoint = Endpoint(
                name,
                source,
                iommu,
                requester,
                reserved,
                bypass=bypass,
                max_pasids=max_pasids,
                enforce_snoop=enforce_snoop,
                changes=self.changes,
                unbind_waits=self.unbind_waits,
            )
            endpoint.untrusted = untrusted
            if iommu is None:
                endpoint.attach(None)  # its requester may still have a domain from an earlier add()
            else:
                self._find_group(endpoint)
            self.endpoints.append(endpoint)
            self.changes.notify(ChangeKind.ADD_DEVICE, endpoint, endpoint.group)
            owner = None if endpoint.group is None else endpoint.group.owner
            if self.hotplug_binds_to_owner and owner is not None:
                endpoint.bind(owner)
            return endpoint

    def _find_group(self, endpoint: Endpoint) -> None:
        """Puts a covered device into its group, or blocks it.  IommuError: see `add`."""
        iommu = endpoint.iommu
        assert iommu is not None
        endpoint.block()
        found = find_group(self, endpoint)
        endpoint.why = found.why
        if found.isolated:
            group = found.group or Group(iommu, next(self._numbers), self._default(iommu, [endpoint]), self._lock)
            group.join(endpoint)
            if found.group is None:
                self.groups.append(group)
                self.changes.notify(ChangeKind.ADD_GROUP, group=group, value=group.default_domain)

    def _default_type(self, iommu: Iommu, endpoints: Iterable[Endpoint]) -> DomainType:
        """The type of a group's default domain (Linux iommu_get_default_domain_type).

        IommuError(EINVAL): a member is untrusted, and the IOMMU's driver must not translate the group.
        """
        endpoints = list(endpoints)
        needs = {iommu.driver.default_domain_type(e.source, e.max_pasids) for e in endpoints} - {None}
        # Where drivers contradict each other, identity wins (iommu_get_def_domain_type).
        needed = DomainType.IDENTITY if DomainType.IDENTITY in needs else next(iter(needs), None)
        untrusted = next((endpoint for endpoint in endpoints if endpoint.untrusted), None)
        if untrusted is not None and needed not in (None, DomainType.DMA):
            text = f"{untrusted.name} is untrusted: {iommu.driver.title} cannot translate it"
            raise IommuError(errno.EINVAL, text)
        return needed or (DomainType.DMA if untrusted is not None else iommu.default or self.default)

    def _default(self, iommu: Iommu, endpoints: Iterable[Endpoint]) -> Domain:
        kind = self._default_type(iommu, endpoints)
        if kind is DomainType.IDENTITY:
            return iommu.identity
        tracking = iommu.capabilities.dirty_tracking
        return PagingDomain(kind, iommu, AllocFlags.DIRTY_TRACKING if tracking else AllocFlags.NONE)

    def set_defaults(self, groups: Iterable[Group]) -> None:
        """Gives groups, without drivers and owners, the default domains that all their members need.

        Linux does so at boot, when it knows all devices (bus_iommu_probe); one that is added later gets the default
        domain that its group has.  IommuError: EINVAL a driver needs identity for an untrusted member; else as
        Group.set_default.
        """
        with self._lock:
            for group in groups:
                if group.default_domain.type is not self._default_type(group.iommu, group.endpoints):
                    group.set_default(self._default(group.iommu, group.endpoints))

    def remove(self, endpoint: Endpoint) -> None:
        """Removes and detaches a device; the last one of a group removes the group.

        It does no DMA afterwards.  ValueError: it was not added.  IommuError(EBUSY): with `unbind_waits`, the group
        still has an owner after that time; nothing changes.
        """
        self._check_present(endpoint)
        wait_for_owner(endpoint)
        self.changes.notify(ChangeKind.DEL_DEVICE, endpoint, endpoint.group)
        endpoint.unbind()
        with released(endpoint):
            self._check_present(endpoint)  # subscribers may have removed it
            group = endpoint.group
            self.endpoints.remove(endpoint)
            endpoint.removed = True
            if group is None:
                endpoint.block()
            else:
                group.leave(endpoint)
            self.changes.notify(ChangeKind.REMOVED_DEVICE, endpoint, group)
            if group is not None and not group.endpoints:
                self.groups.remove(group)
                group.default_domain.defaults.discard(group)
                self.changes.notify(ChangeKind.REMOVED_GROUP, group=group)

    def _check_present(self, endpoint: Endpoint) -> None:
        if endpoint not in self.endpoints:
            raise ValueError(f"{endpoint.name} is not in the system")

    def __getitem__(self, name: str) -> Endpoint:
        for endpoint in self.endpoints:
            if endpoint.name == name:
                return endpoint
        raise KeyError(name)

    def settle(self) -> Iterator[Endpoint]:
        """The endpoints in the order in which a guest enumerates them; platform devices last."""
        order = {function: n for n, function in enumerate(self.topology.functions())}
        yield from sorted(
            self.endpoints,
            key=lambda e: (order.get(e.source, len(order)) if isinstance(e.source, Function) else len(order), e.name),
        )

    def close(self) -> None:
        """Flushes all domains with deferred flushes, which ends their timers."""
        with self._lock:
            domains = {d for g in self.groups for d in (g.domain, g.default_domain, *g.pasids.values())}
        for domain in domains:
            if isinstance(domain, PagingDomain):
                with contextlib.suppress(IommuError):
                    domain.flush()
