"""Finds the group of a device, as Linux's pci_device_group does, together with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.group import Group
from vmodel.pci.topology import Function, PortType, acs_on_path, bridges_above, dma_aliases, isolates, ports_beside

if TYPE_CHECKING:
    from vmodel.iommu.endpoint import Endpoint
    from vmodel.iommu.system import System


@dataclass(frozen=True)
class Grouping:
    """The result of `find_group`.

    `group`: the group to join, None for a new one; `why`: the reason, for people; `isolated` False: the device cannot
    be in any group.
    """

    group: Group | None
    why: str
    isolated: bool = True


def find_group(system: System, endpoint: Endpoint) -> Grouping:
    """The group of a device that an IOMMU covers, given the endpoints that the system already has."""
    assert endpoint.iommu is not None
    if endpoint.requester_id is None:
        return Grouping(None, f"no isolation: {endpoint.iommu.driver.why_not(endpoint.source)}", False)
    found: dict[Group, str] = {}
    for other, why in _not_apart(system, endpoint):
        if other.iommu is not endpoint.iommu:
            # Sharing a group with a device behind another IOMMU, or behind none, would undo the isolation.
            return Grouping(None, f"no isolation: {why}, which {_whose(other)}", False)
        if other.group is None:
            return Grouping(None, f"no isolation: {why}, which has no group", False)
        found.setdefault(other.group, why)
    if len(found) > 1:
        # The groups were separate when they were made, and may have different owners by now: they cannot be merged.
        numbers = " and ".join(str(group.number) for group in found)
        return Grouping(None, f"no isolation: it belongs to groups {numbers}: {'; '.join(found.values())}", False)
    return next((Grouping(group, why) for group, why in found.items()), Grouping(None, _alone(endpoint)))


def _whose(other: Endpoint) -> str:
    return "no IOMMU covers" if other.iommu is None else f"is behind {other.iommu.name}"


def _alone(endpoint: Endpoint) -> str:
    source = endpoint.source
    if endpoint.iommu is not None and (part := endpoint.iommu.driver.partition(source)) is not None:
        return part[1]
    if isinstance(source, PlatformDevice):
        return "it has an id of its own"
    if why := _anchor(source)[1]:
        return f"{why}; the first one there"
    ports = [source, *(port for bridge in bridges_above(source) for port in ports_beside(bridge))]
    quirks = _acs_by_quirk(*(port for port in ports if port.has_acs))
    if source.physical is not None:
        return f"a virtual function, {'isolated by ACS' if _bridges(source) else 'on the root bus'}{quirks}"
    return f"{'isolated by ACS up to the root' if _bridges(source) else _ON_ROOT_BUS}{quirks}"


_ON_ROOT_BUS = "on the root bus, with a requester id of its own"


def _acs_by_quirk(*functions: Function) -> str:
    """Which quirks decided whether functions have ACS, to append to a reason."""
    return _by_quirk(*((function, function.acs_by_quirk) for function in functions))


def _by_quirk(*origins: tuple[Function, str]) -> str:
    found = dict.fromkeys(f"{origin} of {function.name}" for function, origin in origins if origin)
    return f", by a quirk: {', '.join(found)}" if found else ""


def _bridges(function: Function) -> bool:
    return function.home.bridge is not None


def _not_apart(system: System, endpoint: Endpoint) -> Iterator[tuple[Endpoint, str]]:
    """The devices from which this one cannot be isolated, each with the reason."""
    assert endpoint.iommu is not None
    driver, source = endpoint.iommu.driver, endpoint.source
    part = driver.partition(source)
    for other in system.endpoints:
        is_bridge = isinstance(other.source, Function) and other.source.kind.is_bridge
        if is_bridge and (other.group is None or other.iommu is not endpoint.iommu):
            continue  # a bridge does no DMA of its own: it matters only if this IOMMU has a group for it
        why = ""
        if part is None and isinstance(source, Function) and isinstance(other.source, Function):
            why = _by_topology(source, other.source, system.group_mf)
        elif part is not None and driver.requester_id(other.source) is not None:
            theirs = driver.partition(other.source)
            why = part[1] if theirs is not None and theirs[0] == part[0] else ""
        if not why and other.iommu is endpoint.iommu and other.requester_id == endpoint.requester_id:
            why = f"same requester id as {other.name}: {driver.describe_id(endpoint.requester_id or 0)}"
        if why:
            yield other, why


def _anchor(function: Function) -> tuple[Function, str]:
    """The highest bridge below which a function is not isolated, and why; or the function itself, without a reason.

    Below that bridge, requests have the same requester id, or can reach other devices without passing the IOMMU.
    """
    anchor, why = function, ""
    for alias in dma_aliases(function):  # a bridge may replace the requester id by its own
        if alias.by is not function:
            anchor, why = alias.by, f"its DMA carries the id of {alias.by.kind.value} {alias.by.name}, {alias.bdf}"
            why += _by_quirk((anchor, anchor.bridge_quirk))
    for bridge in bridges_above(anchor):
        if acs_on_path(bridge):
            break
        anchor, why = bridge, f"no ACS on the path from {bridge.kind.value} {bridge.name} to the root"
        path = (bridge, *bridges_above(bridge))
        why += _acs_by_quirk(*(port for above in path for port in ports_beside(above) if not port.has_acs))
    return anchor, why


def _alias_quirk(function: Function, other: Function) -> str:
    """The quirk by which a function's DMA carries an id of another one, or "": none does."""
    shared = {other.bdf.devfn, *other.dma_aliases} & {*function.dma_aliases}
    return function.alias_quirk.origin if shared and function.alias_quirk is not None else ""


def _by_topology(function: Function, other: Function, group_mf: bool) -> str:
    """The reason why two functions are not isolated from each other, or "".  The order of the two does not matter."""
    (anchor, why), (theirs, their_why) = _anchor(function), _anchor(other)
    if anchor is theirs:
        return f"{why or f'{other.name}: {their_why}'}, as {other.name}"
    if anchor.home is not theirs.home:
        return ""
    names = f"{f'{why}; ' if why else ''}{anchor.name} and {theirs.name}"
    if anchor.kind is theirs.kind is PortType.DOWNSTREAM and not isolates(anchor):
        quirks = _acs_by_quirk(*(port for port in ports_beside(anchor) if not port.has_acs))
        return f"{names} are ports of one switch, of which one has no ACS{quirks}"
    if {anchor.bdf.devfn, *anchor.dma_aliases} & {theirs.bdf.devfn, *theirs.dma_aliases}:
        by = _by_quirk((anchor, _alias_quirk(anchor, theirs)), (theirs, _alias_quirk(theirs, anchor)))
        return f"{names} have a requester id in common (DMA alias){by}"
    if anchor.bdf.slot != theirs.bdf.slot or anchor.physical is not None or theirs.physical is not None:
        return ""
    if not anchor.has_acs and not theirs.has_acs:
        return f"{names} are functions of one device, without ACS{_acs_by_quirk(anchor, theirs)}"
    # The device's bit: whichever of its functions has it.
    if group_mf or any(f.group_mf for f in anchor.home.functions if f.bdf.slot == anchor.bdf.slot and not f.physical):
        return f"{names} are functions of one device (group_mf)"
    return ""
