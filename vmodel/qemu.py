"""QEMU's command line for a machine; see `docs/system/devices/vfio-user.rst` of QEMU."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def memory_args(size: str) -> list[str]:
    """Guest RAM that the client can pass on as files: else each DMA access would be a message."""
    return [
        "-object",
        f"memory-backend-memfd,id=vmodel-ram,size={size},share=on",
        "-machine",
        "q35,memory-backend=vmodel-ram",
        "-m",
        size,
    ]


def spare_default_devices(addresses: Iterable[str]) -> list[str]:
    """What keeps q35's default devices out of these slots: the display is in slot 1, the network card in slot 2.

    Without the display the network card would be the first to ask for a slot, and get slot 1.
    """
    slots = {int(address[8:10], 16) for address in addresses}
    args = ["-vga", "none"] if 1 in slots else []
    return [*args, "-nic", "none"] if slots & {1, 2} else args


def device_args(name: str, socket: Path, address: str, multifunction: bool) -> list[str]:
    """`-device` for one function at `address`, "SSSS:BB:DD.F" on bus 00."""
    slot, function = address[8:].split(".")
    device: dict[str, object] = {
        "driver": "vfio-user-pci",
        "id": name,
        "socket": {"type": "unix", "path": str(socket)},
        "bus": "pcie.0",
        "addr": f"{int(slot, 16):x}.{function}",
    }
    if multifunction and function == "0":
        device["multifunction"] = True
    return ["-device", json.dumps(device)]
