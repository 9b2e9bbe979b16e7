"""A guest with three NVMe controllers, plain or behind an IOMMU that it drives, and a shell in it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.guest.shell import LOOP, Shell
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.running import Guest, GuestSpec
from vmodel.machine import Machine, parse
from vmodel.patience import patience
from vmodel.span import MiB

#: The controllers' addresses: the first is for data, the second (with MSI only) is unplugged, the third is for the
#: administration commands.
DATA, PORT, ADMIN = "0000:00:03.0", "0000:01:00.0", "0000:00:05.0"
#: Bytes of the data controller's namespaces: 1 is a file with blocks of 512 bytes, 2 is memory with blocks of 4096.
FILE, MEMORY = 256 * MiB, 64 * MiB

MACHINE = """
[machine]
name = "nvme"
memory = "640M"

[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:03.0"

[device.params]
serial = "DATA"
queues = 4
namespaces = [ { path = "disk.img", size = "256M" }, { memory = "64M", lba = 4096 } ]

[[bridge]]
name = "rp0"
kind = "root-port"
address = "0000:00:04.0"
secondary = 1

[[device]]
name = "nvme1"
model = "nvme"
address = "0000:01:00.0"
params = { serial = "PORT", interrupts = "msi", queues = 4, namespaces = [ { memory = "32M" } ] }

[[device]]
name = "nvme2"
model = "nvme"
address = "0000:00:05.0"

[device.params]
serial = "ADMIN"
product = "A model"
firmware = "1.5"
queues = 2
subsystem_reset = true
capacity = "64M"
namespaces = [ { memory = "32M" }, { path = "admin.img", size = "16M", lba = 4096 } ]
"""
IOMMU = """
[[iommu]]
name = "iommu0"
kind = "{kind}"
address = "0000:00:02.0"
"""
TOOLS = [
    "nvme-cli:nvme",
    "fio:fio",
    "fdisk:sfdisk",
    "e2fsprogs:mkfs.ext4",
    "e2fsprogs:e2fsck",
    "util-linux:fstrim",
]
#: Names a block device by its controller's address and the namespace's id: names like nvme0n1 come as drivers probe.
NAMES = """
controller() { cd /sys/bus/pci/devices/$1/nvme && echo nvme*; cd /root; }
block() {
    for file in /sys/class/nvme/$(controller $1)/nvme*n*/nsid; do
        [ "$(cat $file)" != $2 ] || { file=${file%/nsid}; echo ${file##*/}; }
    done
}
"""


class Rig:
    """The machine, the guest and its shell."""

    def __init__(self, machine: Machine, guest: Guest, folder: Path) -> None:
        self.machine, self.guest, self.folder = machine, guest, folder
        self.booted()

    def booted(self) -> None:
        """The guest has booted, or will."""
        self.shell = Shell(self.guest)
        self.shell.run(NAMES)

    def controller(self, address: str) -> str:
        """The guest's name of a controller, such as nvme0."""
        return self.shell.run(f"controller {address}").strip()

    def block(self, address: str, nsid: int) -> str:
        """The guest's block device of a namespace; drivers look for namespaces after they have been loaded."""
        deadline = time.monotonic() + patience(10)
        while not (name := self.shell.run(f"block {address} {nsid} 2>/dev/null").strip()):
            assert time.monotonic() < deadline, f"{address} has no namespace {nsid}"
        return f"/dev/{name}"

    def json(self, command: str) -> Any:
        """What an nvme command says in JSON."""
        return json.loads(self.shell.run(f"nvme {command} -o json"))


@contextmanager
def boot(folder: Path, logs: Path, kernel: str, kind: str | None, *, reboot: bool = False) -> Iterator[Rig]:
    """`kind`: that of the IOMMU, if there is one."""
    machine = parse(MACHINE + (IOMMU.format(kind=kind) if kind else ""), folder / "m.toml")
    modules = ["virtio_iommu"] if kind == "virtio-iommu" else []
    # ext4 asks the older kernel for crc32c by name.
    modules += ["nvme", *(["crc32c_generic"] if find_kernel(kernel).version < (7, 0) else []), "ext4"]
    try:
        with machine.serve(folder):
            spec = GuestSpec(
                command=LOOP,
                kernel=find_kernel(kernel),
                modules=modules,
                tools=TOOLS,
                qemu_args=["-smp", "2", *machine.qemu_args(folder)],
                allow_reboot=reboot,
                timeout=300,
            )
            with Guest(spec, artifacts=logs) as guest:
                rig = Rig(machine, guest, folder)
                yield rig
    finally:
        machine.close()
