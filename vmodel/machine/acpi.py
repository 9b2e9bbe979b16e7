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
    units = [
        Unit(_own(device).segment, device.base, [_way(function) for function in _functions(device.covered())])
        for device in devices
        if device.iommu.driver.kind == "vt-d"
    ]
    return dmar(units) if units else None


def _own(device: IommuDevice) -> Bdf:
    return next(f.bdf for f in device.system.topology.functions() if f.name == device.name)


def _functions(endpoints: Iterable[Endpoint]) -> list[Function]:
    return [endpoint.source for endpoint in endpoints if isinstance(endpoint.source, Function)]


def _way(function: Function) -> tuple[int, list[tuple[int, int]]]:
    """From the root bus down."""
    above = [*list(bridges_above(function))[::-1], function]
    return above[0].bdf.bus, [(step.bdf.device, step.bdf.function) for step in above]
