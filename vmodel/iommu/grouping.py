"""Which group a device belongs to, and why: Linux's pci_device_group, with the reason kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.group import Group
from vmodel.pci.topology import Function, PortType, acs_on_path, bridges_above, dma_aliases, isolates

if TYPE_CHECKING:
    from vmodel.iommu.core import Endpoint, System


@dataclass(frozen=True)
class Grouping:
    """`group` to join, None: a new one; `why` for people; `isolated` False: there can be no group."""

    group: Group | None
    why: str
    isolated: bool = True


def find_group(system: System, endpoint: Endpoint) -> Grouping:
    """Where a device that an IOMMU covers belongs, given the devices that are there already."""
    assert endpoint.iommu is not None
    if endpoint.requester_id is None:
        return Grouping(None, f"no isolation: {endpoint.iommu.driver.why_not(endpoint.source)}", False)
    for other, why in _not_apart(system, endpoint):
        if other.iommu is not endpoint.iommu:
            # To share a group with what another IOMMU translates, or none, would undo that one's isolation.
            return Grouping(None, f"no isolation: {why}, which {_whose(other)}", False)
        if other.group is not None:
            return Grouping(other.group, why)
        return Grouping(None, f"no isolation: {why}, which has none", False)
    return Grouping(None, _alone(endpoint))


def _whose(other: Endpoint) -> str:
    return "no IOMMU covers" if other.iommu is None else f"is behind {other.iommu.name}"


def _alone(endpoint: Endpoint) -> str:
    source = endpoint.source
    if endpoint.iommu is not None and (part := endpoint.iommu.driver.partition(source)) is not None:
        return part[1]
    if isinstance(source, PlatformDevice):
        return "it has an id of its own"
    if source.physical is not None:
        return "a virtual function, isolated by ACS" if _bridges(source) else "a virtual function on the root bus"
    return "isolated by ACS up to the root" if _bridges(source) else "on the root bus, with a requester id of its own"


def _bridges(function: Function) -> bool:
    return function.home.bridge is not None


def _not_apart(system: System, endpoint: Endpoint) -> Iterator[tuple[Endpoint, str]]:
    """Devices from which this one cannot be kept apart, with the reason, the weightiest first."""
    assert endpoint.iommu is not None
    others = [e for e in system.endpoints if e is not endpoint]
    driver, source = endpoint.iommu.driver, endpoint.source
    if (part := driver.partition(source)) is not None:
        for other in others:
            if other.iommu is endpoint.iommu and other.requester_id is not None:
                theirs = driver.partition(other.source)
                if theirs is not None and theirs[0] == part[0]:
                    yield other, part[1]
        return
    if isinstance(source, Function):
        by_function = {e.source: e for e in others if isinstance(e.source, Function)}
        yield from _by_topology(system, endpoint, source, by_function)
    for other in others:
        if other.iommu is endpoint.iommu and other.requester_id == endpoint.requester_id:
            yield other, f"same requester id as {other.name}: {driver.describe_id(endpoint.requester_id or 0)}"


def _by_topology(
    system: System, endpoint: Endpoint, function: Function, there: dict[Function, Endpoint]
) -> Iterator[tuple[Endpoint, str]]:
    anchor, devfns = function, {function.bdf.devfn, *function.dma_aliases}
    # Up to where the IOMMU can tell it apart: bridges put their own id in place of it.
    for alias in dma_aliases(function):
        anchor = alias.by
        if anchor is not function:
            why = f"its DMA carries the id of {anchor.kind.value} {anchor.name}, {alias.bdf}"
            yield from _bridge_itself(endpoint, there.get(anchor), why)
            for peer in _behind(anchor, there):
                yield peer, f"{why}, as that of {peer.name}"
    # Up to where peer-to-peer requests have to pass the IOMMU.
    for bridge in bridges_above(anchor):
        if acs_on_path(bridge):
            break
        anchor = bridge
        why = f"no ACS on the path from {bridge.kind.value} {bridge.name} to the root"
        yield from _bridge_itself(endpoint, there.get(bridge), why)
        for peer in _behind(bridge, there):
            yield peer, f"{why}: {peer.name} can be reached"
    if anchor.kind is PortType.DOWNSTREAM and not isolates(anchor):
        for port in anchor.home.functions:
            if port is not anchor:
                why = f"ports {anchor.name} and {port.name} of one switch do not both have ACS"
                yield from _bridge_itself(endpoint, there.get(port), why)
                for peer in _behind(port, there):
                    yield peer, why
    if anchor is not function:
        devfns = {anchor.bdf.devfn, *anchor.dma_aliases}
    for other in anchor.home.functions:
        if other is anchor or other not in there:
            continue
        if other.bdf.devfn in devfns or devfns & set(other.dma_aliases):
            yield there[other], f"DMA alias: one of it and {there[other].name} uses the other's requester id"
    if anchor.multifunction and not anchor.has_acs:
        for other in _siblings(anchor):
            if other in there and not other.has_acs:
                yield there[other], f"a function of the same device as {there[other].name}, without ACS"
    if system.group_mf and function.physical is None:
        for other in _siblings(function):
            if other in there:
                yield there[other], f"group_mf: a function of the same device as {there[other].name}"


def _bridge_itself(endpoint: Endpoint, bridge: Endpoint | None, why: str) -> Iterator[tuple[Endpoint, str]]:
    """A bridge does no DMA of its own: it matters only where the IOMMU has a group for it."""
    if bridge is not None and bridge.group is not None and bridge.iommu is endpoint.iommu:
        yield bridge, why


def _siblings(function: Function) -> Iterator[Function]:
    for other in function.home.functions:
        if other is not function and other.bdf.slot == function.bdf.slot and other.physical is None:
            yield other


def _behind(bridge: Function, there: dict[Function, Endpoint]) -> Iterator[Endpoint]:
    """What is below a bridge and has been met already."""
    for other, endpoint in there.items():
        if bridge in bridges_above(other):
            yield endpoint
