"""Groups as files: what a script that reads /sys/kernel/iommu_groups would find."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.iommu.world import World, group_of, iommu
from vmodel.errors import IommuError
from vmodel.iommu import Coverage, dma_domain_alloc, sysfs
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.driver import PlatformDevice
from vmodel.pci.topology import PortType
from vmodel.span import Span


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shape(world: World, tmp_path: Path) -> None:
    world.topology.add_root(0, 0x80)
    world.plug(world.port("00:04.0", 1))
    behind, _ = world.device("01:00.0", PortType.ENDPOINT, reserved=[ReservedRegion(Span(0, 0xFFF), RegionType.DIRECT)])
    first, _ = world.device("80:03.0")
    world.device("80:03.1")
    world.plug(world.function("00:05.0"), bypass=True)
    group_of(first).name = "nets"
    group_of(first).set_default(dma_domain_alloc(first))
    sysfs.export(world.system, tmp_path / "sys")
    top = tmp_path / "sys"
    groups = top / "iommu_groups"
    assert listed(groups) == ["0", "1", "2"]
    members = {n: listed(groups / n / "devices") for n in "012"}
    assert members == {"0": ["0000:00:04.0"], "1": ["0000:01:00.0"], "2": ["0000:80:03.0", "0000:80:03.1"]}
    number = str(group_of(behind).number)
    device = groups / number / "devices" / "0000:01:00.0"
    assert device.is_symlink()
    assert device.resolve() == (top / "devices/pci0000:00/0000:00:04.0/0000:01:00.0").resolve()
    assert (device / "iommu_group").resolve() == (groups / number).resolve()
    assert (top / "devices/pci0000:80/0000:80:03.1/iommu_group").resolve() == (groups / "2").resolve()
    assert listed(top / "devices/pci0000:00/0000:00:05.0") == []  # no group
    assert [(groups / n / "type").read_text() for n in "012"] == ["identity\n", "identity\n", "DMA-FQ\n"]
    assert (groups / "2" / "name").read_text() == "nets\n"
    assert not (groups / "1" / "name").exists()
    assert (groups / "1" / "reserved_regions").read_text() == (
        "0x0000000000000000 0x0000000000000fff direct\n0x00000000fee00000 0x00000000feefffff msi\n"
    )
    for path in groups.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o222 == 0 or path.name in "012", path


def test_types_of_regions(tmp_path: Path) -> None:
    """SW_MSI is "msi" as well, as Linux prints it."""
    world = World(iommu("smmu-v3"))
    kinds = [RegionType.DIRECT, RegionType.DIRECT_RELAXABLE, RegionType.RESERVED, RegionType.MSI]
    world.device("00:03.0", reserved=[ReservedRegion(Span(n << 32, n << 32 | 0xFFF), k) for n, k in enumerate(kinds)])
    sysfs.export(world.system, tmp_path)
    lines = (tmp_path / "iommu_groups/0/reserved_regions").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["direct", "msi", "direct-relaxable", "reserved", "msi"]
    assert lines[1] == "0x0000000008000000 0x00000000080fffff msi"
    world.close()


def test_platform_devices(tmp_path: Path) -> None:
    names = ("fman@1a000000", "/soc/../dma")
    one = iommu("pamu", params={"liodns": {name: n for n, name in enumerate(names)}})
    one.covers = [Coverage.platform(*names)]
    world = World(one)
    for name in names:
        world.plug(PlatformDevice(name))
    sysfs.export(world.system, tmp_path / "sys")
    assert listed(tmp_path / "sys/devices/platform") == ["!soc!..!dma", "fman@1a000000"]
    assert listed(tmp_path / "sys/iommu_groups/1/devices") == ["!soc!..!dma"]
    assert listed(tmp_path) == ["sys"]
    world.close()


def test_never_over_something_else(world: World, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(IommuError) as caught:
        sysfs.export(world.system, tmp_path)
    assert caught.value.errno == errno.EEXIST
    assert listed(tmp_path) == ["precious"]
