"""QEMU's arguments for a machine; see QEMU's `docs/system/devices/vfio-user.rst`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vmodel.pci.topology import Bdf, Function, PortType


def memory_args(size: str) -> list[str]:
    """Arguments for shared guest RAM, which QEMU passes on as files; otherwise each DMA access would be a message."""
    return [
        "-object",
        f"memory-backend-memfd,id=vmodel-ram,size={size},share=on",
        "-machine",
        "q35,memory-backend=vmodel-ram",
        "-m",
        size,
    ]


def spare_default_devices(addresses: Iterable[Bdf]) -> list[str]:
    """Arguments that remove q35's default devices from these slots: the display (slot 1), the network card (slot 2).

    Without the display, the network card would get slot 1 instead.
    """
    slots = {bdf.device for bdf in addresses if bdf.bus == 0}
    args = ["-vga", "none"] if 1 in slots else []
    return [*args, "-nic", "none"] if slots & {1, 2} else args


def _place(function: Function) -> dict[str, object]:
    """The bus and address properties of a function's `-device`."""
    bridge = function.home.bridge
    place: dict[str, object] = {
        "bus": "pcie.0" if bridge is None else bridge.name,
        "addr": f"{function.bdf.device:x}.{function.bdf.function}",
    }
    if function.multifunction and function.bdf.function == 0:
        place["multifunction"] = True
    return place


def bridge_args(bridge: Function, number: int) -> list[str]:
    """`-device` for a bridge; `number`, from 1, is its unique chassis number."""
    device: dict[str, object] = {"id": bridge.name}
    if bridge.kind is PortType.ROOT_PORT:
        # pcie-root-port always has ACS, ioh3420 never has.
        driver = "pcie-root-port" if bridge.acs is not None else "ioh3420"
        device |= {"driver": driver, "chassis": number, "slot": number}
    elif bridge.kind is PortType.DOWNSTREAM:
        device |= {"driver": "xio3130-downstream", "chassis": number, "slot": number}
    elif bridge.kind is PortType.UPSTREAM:
        device["driver"] = "x3130-upstream"
    elif bridge.kind is PortType.PCIE_TO_PCI:
        device["driver"] = "pcie-pci-bridge"
    else:
        device |= {"driver": "pci-bridge", "chassis_nr": number}
    return ["-device", json.dumps(device | _place(bridge))]


#: `x-msg-timeout` in ms, a day, where a debugger may hold up an answer; QEMU's default is 5 s.
_DEBUG_TIMEOUT = 86_400_000


def device_args(
    name: str, socket: Path, function: Function, bootindex: int | None = None, *, debug: bool = False
) -> list[str]:
    """`-device` for a function that is served on `socket`.  `debug`: it waits for answers for a day."""
    device: dict[str, object] = {
        "driver": "vfio-user-pci",
        "id": name,
        "socket": {"type": "unix", "path": str(socket)},
    }
    if bootindex is not None:
        device["bootindex"] = bootindex
    if debug:
        device["x-msg-timeout"] = _DEBUG_TIMEOUT
    return ["-device", json.dumps(device | _place(function))]
