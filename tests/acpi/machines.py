"""Machines whose tables are tested."""

from __future__ import annotations

from pathlib import Path

from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.machine import Machine, parse
from vmodel.span import Span

EXAMPLES = Path(__file__).parents[2] / "examples"
VIOMMU, VTD = "virtio-iommu", "vt-d"
VTD_BASE = 0xE000_0000
#: What SeaBIOS and Linux know of the bridges in `BRIDGES`: the bus behind each requester id.
SECONDARY = {0x20: 1, 0x100: 2, 0x200: 3, 0x208: 4, 0x28: 5, 0x500: 6, 0x608: 7, 0x30: 8, 0x40: 9}
BRIDGES = (
    ("rp0", "root-port", "00:04.0"),
    ("up", "switch-upstream", "01:00.0"),
    ("down0", "switch-downstream", "02:00.0"),
    ("down1", "switch-downstream", "02:01.0"),
    ("rp1", "root-port", "00:05.0"),
    ("to-pci", "pcie-to-pci", "05:00.0"),
    ("below", "pci-bridge", "06:01.0"),
    ("rp2", "root-port", "00:06.0"),
    ("flat", "pci-bridge", "00:08.0"),
)
#: "out" are those that no IOMMU covers.
DEVICES = {
    "x": "03:00.0",
    "out0": "04:00.0",
    "c": "06:02.0",
    "d": "07:03.0",
    "out1": "08:00.0",
    "e0": "00:07.0",
    "e1": "00:07.1",
    "f": "09:01.0",
}
OUTSIDE = {0x400, 0x800}


def bridged(kind: str) -> Machine:
    """Bridges of every kind; two devices are not behind the IOMMU."""
    text = f'[machine]\nname = "m"\n[[iommu]]\nname = "i"\nkind = "{kind}"\naddress = "0000:00:02.0"\n'
    for number, (name, bridge, address) in enumerate(BRIDGES, 1):
        text += f'[[bridge]]\nname = "{name}"\nkind = "{bridge}"\naddress = "0000:{address}"\nsecondary = {number}\n'
    for name, address in DEVICES.items():
        text += f'[[device]]\nname = "{name}"\nmodel = "edu"\naddress = "0000:{address}"\n'
        text += 'iommu = "none"\n' if name.startswith("out") else ""
    return parse(text, Path("m.toml"))


def two(first: str, second: str) -> str:
    """Two units; edu "a" is behind the first, "b" behind the second."""
    text = '[machine]\nname = "m"\n'
    for n, kind in enumerate((first, second)):
        text += f'[[iommu]]\nname = "i{n}"\nkind = "{kind}"\naddress = "0000:00:0{n + 1}.0"\n'
        text += f'covers = ["0000:00:0{n + 5}.0"]\n'
    for n, name in enumerate("ab"):
        text += f'[[device]]\nname = "{name}"\nmodel = "edu"\naddress = "0000:00:0{n + 5}.0"\n'
    return text


def tables(machine: Machine) -> dict[str, bytes]:
    found = machine.acpi_tables()
    machine.close()
    return found


def with_ats() -> Machine:
    text = (EXAMPLES / "edu-vtd.toml").read_text()
    return parse(text.replace("[[device]]", "params = { ats = true }\n[[device]]", 1), Path("m.toml"))


def described(tmp_path: Path) -> bytes:
    """DMAR of a machine with a namespace device, and a region that two devices need 1:1."""
    text = (EXAMPLES / "edu-vtd.toml").read_text()
    text = text.replace(
        'address = "0000:00:02.0"\n',
        'address = "0000:00:02.0"\nparams = { namespace = { "\\\\_SB.UART" = "0000:00:1e.5" } }\n',
    )
    machine = parse(text, tmp_path / "m.toml")
    machine.system["edu0"].reserved.append(ReservedRegion(Span(0x7000_0800, 0x7000_1FFF), RegionType.DIRECT))
    return tables(machine)["DMAR"]
