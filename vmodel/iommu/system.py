"""`System`: the IOMMUs, devices and groups of a machine."""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
from collections.abc import Iterable, Iterator

from vmodel import _shim
from vmodel.errors import IommuError
from vmodel.iommu.capabilities import ReservedRegion
from vmodel.iommu.domain import PagingDomain
from vmodel.iommu.driver import Source
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.group import Group
from vmodel.iommu.grouping import find_group
from vmodel.iommu.iommu import Iommu
from vmodel.pci.topology import Function, Topology


class System:
    """The IOMMUs, endpoints and groups of one machine.

    `group_mf`: all functions of a multifunction device form one group (never its virtual functions).
    """

    def __init__(self, topology: Topology | None = None, *, group_mf: bool = False) -> None:
        self.topology = topology or Topology()
        self.group_mf = group_mf
        self.iommus: list[Iommu] = []
        self.endpoints: list[Endpoint] = []
        self.groups: list[Group] = []
        self._lock = threading.RLock()
        self._numbers = itertools.count()

    def add_iommu(self, iommu: Iommu) -> Iommu:
        """Adds an IOMMU; it must be added before the devices that it covers.  IommuError(EEXIST): the name is used."""
        with self._lock:
            if any(other.name == iommu.name for other in self.iommus):
                raise IommuError(errno.EEXIST, f"an IOMMU {iommu.name!r} already exists")
            self.iommus.append(iommu)
        return iommu

    def add(
        self,
        source: Source,
        requester: _shim.Requester | None = None,
        *,
        name: str = "",
        iommu: Iommu | None = None,
        bypass: bool = False,
        reserved: Iterable[ReservedRegion] = (),
    ) -> Endpoint:
        """Adds a device, at the start or hot-plugged, and attaches it to its group's domain before its first DMA.

        `iommu`: the IOMMU to use instead of the first that covers the device; `bypass`: use none.  DMA of a device
        without a group is not translated.  IommuError: EEXIST the device already exists; EINVAL its group has a domain
        that does not fit it.
        """
        with self._lock:
            if any(e.source == source for e in self.endpoints):
                raise IommuError(errno.EEXIST, f"{source} already exists")
            if iommu is None and not bypass:
                iommu = next((candidate for candidate in self.iommus if source in candidate), None)
            endpoint = Endpoint(name or getattr(source, "name", ""), source, iommu, requester, reserved)
            if iommu is not None:
                found = find_group(self, endpoint)
                endpoint.why = found.why
                if found.isolated:
                    group = found.group or Group(iommu, next(self._numbers), iommu.identity, self._lock)
                    group.join(endpoint)
                    if found.group is None:
                        self.groups.append(group)
            if endpoint.group is None:
                endpoint.attach(None)  # its requester may still have a domain from an earlier add()
            self.endpoints.append(endpoint)
            return endpoint

    def remove(self, endpoint: Endpoint) -> None:
        """Removes and detaches a device; the last one of a group removes the group.  ValueError: it was not added."""
        with self._lock:
            self.endpoints.remove(endpoint)
            group = endpoint.group
            if group is not None:
                group.leave(endpoint)
                if not group.endpoints:
                    self.groups.remove(group)

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
        for domain in {d for g in self.groups for d in (g.domain, g.default_domain, *g.pasids.values())}:
            if isinstance(domain, PagingDomain):
                with contextlib.suppress(IommuError):
                    domain.flush()
