"""The ACPI tables of a machine's IOMMUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmodel.acpi.dmar import Unit, dmar
from vmodel.acpi.viot import PciRange, viot
from vmodel.devices.iommu import IommuDevice
from vmodel.iommu.core import Endpoint
from vmodel.pci.topology import Bdf, Function, bridges_above, dma_aliases


def viot_of(devices: Iterable[IommuDevice]) -> bytes | None:
    """VIOT, with all ids under which a device's DMA may arrive; None without a virtio-iommu."""
    units = []
    for device in devices:
        if device.iommu.driver.kind == "virtio-iommu":
            first = int(device.iommu.driver.params.first_endpoint)
            units.append((_own(device), _ranges(device.covered(), first)))
    return viot(units) if units else None


def _ranges(endpoints: Sequence[Endpoint], first: int) -> list[PciRange]:
    """Each id once; neighbours in one range."""
    ids = sorted({alias.bdf for function in _functions(endpoints) for alias in dma_aliases(function)})
    runs: list[list[Bdf]] = []
    for bdf in ids:
        if runs and runs[-1][-1].segment == bdf.segment and runs[-1][-1].rid + 1 == bdf.rid:
            runs[-1].append(bdf)
        else:
            runs.append([bdf])
    return [PciRange(run[0], run[-1], first + (run[0].segment << 16 | run[0].rid)) for run in runs]


def dmar_of(devices: Iterable[IommuDevice]) -> bytes | None:
    """DMAR; None without a VT-d unit."""
    units = [_unit(device) for device in devices if device.iommu.driver.kind == "vt-d"]
    return dmar(units) if units else None


def _unit(device: IommuDevice) -> Unit:
    """A bridge stands for all that is below it, so it is there only if all of that is behind the unit."""
    covered = {id(function) for function in _functions(device.covered())}
    uncovered = [f for f in device.system.topology.functions() if id(f) not in covered]
    torn = {id(bridge) for function in uncovered for bridge in (function, *bridges_above(function))}
    bridges, endpoints = [], []
    for function in _functions(device.covered()):
        if any(id(bridge) not in torn for bridge in bridges_above(function)):
            continue
        if not function.kind.is_bridge:
            endpoints.append(_way(function))
        elif id(function) not in torn:
            bridges.append(_way(function))
    return Unit(_own(device).segment, device.base, endpoints, bridges)


def _own(device: IommuDevice) -> Bdf:
    return next(f.bdf for f in device.system.topology.functions() if f.name == device.name)


def _functions(endpoints: Iterable[Endpoint]) -> list[Function]:
    return [endpoint.source for endpoint in endpoints if isinstance(endpoint.source, Function)]


def _way(function: Function) -> tuple[int, list[tuple[int, int]]]:
    """From the root bus down."""
    above = [*list(bridges_above(function))[::-1], function]
    return above[0].bdf.bus, [(step.bdf.device, step.bdf.function) for step in above]
