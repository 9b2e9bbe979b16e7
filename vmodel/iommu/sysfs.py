"""Groups as files in the layout of Linux's /sys/kernel/iommu_groups, for tools and tests that read it."""

from __future__ import annotations

import errno
from pathlib import Path

from vmodel.errors import IommuError
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.system import System
from vmodel.pci.topology import Function, bridges_above


def export(system: System, folder: Path) -> None:
    """Writes iommu_groups/N/{type,reserved_regions,name,devices/} and devices/ to `folder`, a snapshot of the system.

    `folder` must not exist or be empty; the files are read-only.  IommuError(EEXIST): it is not empty.  OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise IommuError(errno.EEXIST, "is not empty: choose another folder")
    for endpoint in system.endpoints:
        (folder / _place(endpoint)).mkdir(parents=True, exist_ok=True)
    for group in system.groups:
        here = folder / "iommu_groups" / str(group.number)
        members = here / "devices"
        members.mkdir(parents=True)
        regions = "".join(_line(region) for region in group.reserved_regions)
        _write(here / "type", f"{group.default_domain.type.value}\n")
        _write(here / "reserved_regions", regions)
        if group.name:
            _write(here / "name", f"{group.name}\n")
        for endpoint in group.endpoints:
            place = _place(endpoint)
            (members / place.name).symlink_to(Path("../../..") / place)
            up = Path(*[".."] * len(place.parts))
            (folder / place / "iommu_group").symlink_to(up / "iommu_groups" / str(group.number))
        members.chmod(0o555)
        here.chmod(0o555)


def _line(region: ReservedRegion) -> str:
    kind = RegionType.MSI if region.type is RegionType.SW_MSI else region.type  # as Linux: tools look for "msi"
    return f"{region.span.start:#018x} {region.span.last:#018x} {kind.value}\n"


def _place(endpoint: Endpoint) -> Path:
    """A device's path below /sys: devices/pci0000:00/0000:00:04.0/0000:01:00.0, or devices/platform/NAME."""
    source = endpoint.source
    if not isinstance(source, Function):
        return Path("devices", "platform", source.name.replace("/", "!"))  # as Linux's kobject names
    above = [str(bridge.bdf) for bridge in bridges_above(source)][::-1]
    root = next((b for b in bridges_above(source) if b.home.bridge is None), source)
    return Path("devices", f"pci{root.bdf.segment:04x}:{root.bdf.bus:02x}", *above, str(source.bdf))


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o444)
