"""The ACPI tables of a machine's IOMMUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmodel.acpi.dmar import RemappingUnit, Reserved, Scope, dmar
from vmodel.acpi.viot import PciRange, viot
from vmodel.devices.iommu import IommuDevice
from vmodel.iommu.capabilities import RegionType
from vmodel.iommu.endpoint import Endpoint
from vmodel.pci.topology import Bdf, Function, bridges_above, dma_aliases
from vmodel.span import PAGE, Span


def viot_of(devices: Iterable[IommuDevice]) -> bytes | None:
    """VIOT with all requester ids that the devices' DMA may carry; None: there is no virtio-iommu."""
    units = []
    for device in devices:
        if device.iommu.driver.kind == "virtio-iommu":
            first = int(device.iommu.driver.params.first_endpoint)
            units.append((_own(device), _ranges(device.covered(), first)))
    return viot(units) if units else None


def _ranges(endpoints: Sequence[Endpoint], first: int) -> list[PciRange]:
    """The endpoints' ids, each once; consecutive ids form one range."""
    ids = sorted({alias.bdf for function in _functions(endpoints) for alias in dma_aliases(function)})
    runs: list[list[Bdf]] = []
    for bdf in ids:
        if runs and runs[-1][-1].segment == bdf.segment and runs[-1][-1].rid + 1 == bdf.rid:
            runs[-1].append(bdf)
        else:
            runs.append([bdf])
    return [PciRange(run[0], run[-1], first + (run[0].segment << 16 | run[0].rid)) for run in runs]


def dmar_of(devices: Iterable[IommuDevice]) -> bytes | None:
    """DMAR; None: there is no VT-d unit."""
    served = [device for device in devices if device.iommu.driver.kind == "vt-d"]
    units = [
        RemappingUnit(
            _own(device).segment,
            device.base,
            [*_scopes(_functions(device.covered())), *_namespace(device).values()],
            device.iommu.driver.params.ats,
        )
        for device in served
    ]
    return dmar(units, [part for device in served for part in _reserved(device)]) if units else None


def _namespace(device: IommuDevice) -> dict[str, Scope]:
    """The scopes of devices of the ACPI namespace, by name."""
    found = {}
    for name, text in device.iommu.driver.params.namespace.items():
        bdf = Bdf.parse(text)
        found[name] = Scope(bdf.bus, [(bdf.device, bdf.function)], False, name)
    return found


def _reserved(device: IommuDevice) -> list[Reserved]:
    """The memory that a guest must map 1:1, in whole pages, each with the devices concerned (8.4)."""
    named = _namespace(device)
    found: dict[Span, list[Scope]] = {}
    for endpoint in device.covered():
        source = endpoint.source
        scope = _scope(source) if isinstance(source, Function) else named.get(source.name)
        for region in endpoint.reserved:
            if scope is not None and region.type in (RegionType.DIRECT, RegionType.DIRECT_RELAXABLE):
                pages = Span(region.span.start // PAGE * PAGE, region.span.last | PAGE - 1)
                found.setdefault(pages, []).append(scope)
    return [Reserved(_own(device).segment, span, scopes) for span, scopes in found.items()]


def _own(device: IommuDevice) -> Bdf:
    return next(f.bdf for f in device.system.topology.functions() if f.name == device.name)


def _functions(endpoints: Iterable[Endpoint]) -> list[Function]:
    return [endpoint.source for endpoint in endpoints if isinstance(endpoint.source, Function)]


def _scopes(covered: Sequence[Function]) -> list[Scope]:
    """Device scopes: one for a bridge if everything behind it is covered, else one for each device."""
    whole = [bridge for bridge in covered if bridge.secondary is not None and _all_below(bridge) <= set(covered)]
    listed = [
        function
        for function in covered
        if not any(above in whole for above in bridges_above(function))
        and (function in whole or function.secondary is None)
    ]
    return [_scope(function) for function in listed]


def _all_below(bridge: Function) -> set[Function]:
    found: set[Function] = set()
    for function in bridge.secondary.functions if bridge.secondary is not None else []:
        found |= {function} | _all_below(function)
    return found


def _scope(function: Function) -> Scope:
    way = [*list(bridges_above(function))[::-1], function]
    return Scope(way[0].bdf.bus, [(f.bdf.device, f.bdf.function) for f in way], function.secondary is not None)
