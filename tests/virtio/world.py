"""A machine behind a virtio-iommu, and a driver for that."""

from __future__ import annotations

import os
import struct
import time

from tests.virtio.driver import Driver
from vmodel.devices.virtio_iommu import RequestStatus, VirtioIommuDevice
from vmodel.errors import DmaFault
from vmodel.machine import Machine

MACHINE = """
[machine]
name = "m"
[[iommu]]
name = "viommu0"
kind = "virtio-iommu"
address = "0000:00:02.0"
capabilities = { input_bits = 48 }
[[bridge]]
name = "rp0"
kind = "root-port"
address = "0000:00:05.0"
secondary = 1
[[bridge]]
name = "pci0"
kind = "pcie-to-pci"
address = "0000:01:00.0"
secondary = 2
""" + "".join(
    f'[[device]]\nname = "{name}"\nmodel = "edu"\naddress = "{address}"\n'
    for name, address in (
        ("a", "0000:00:03.0"),
        ("b", "0000:00:04.0"),
        ("left", "0000:02:01.0"),
        ("right", "0000:02:02.0"),
    )
)
A, B, LEFT, RIGHT, BRIDGE = 0x18, 0x20, 0x208, 0x210, 0x200
READ, WRITE, MMIO = 1, 2, 4


class World:
    """The machine, its memory, and a driver of the virtio-iommu."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        device = machine.devices["viommu0"]
        assert isinstance(device, VirtioIommuDevice)
        self.iommu = device
        self.driver = Driver(device)
        for name in ("a", "b", "left", "right"):
            other = machine.devices[name]
            other.memory.map(0, 1 << 20, fd=self.driver.memory.fd)
            other.config.write(4, b"\x06\x00")
        self.start()

    def start(self, features: int | None = None) -> None:
        self.requests, self.events = self.driver.start([0, 1], features)

    def ask(self, kind: int, *fields: int | bytes, form: str) -> RequestStatus:
        answer = self.requests.ask(struct.pack("<B3x" + form, kind, *fields))
        assert len(answer) == 4 and answer[1:] == bytes(3)
        return RequestStatus(answer[0])

    def attach(self, domain: int, endpoint: int, flags: int = 0, reserved: bytes = bytes(4)) -> RequestStatus:
        return self.ask(1, domain, endpoint, flags, reserved, form="III4s")

    def detach(self, domain: int, endpoint: int, reserved: bytes = bytes(8)) -> RequestStatus:
        return self.ask(2, domain, endpoint, reserved, form="II8s")

    def map(self, domain: int, first: int, last: int, gpa: int, flags: int = READ | WRITE) -> RequestStatus:
        return self.ask(3, domain, first, last, gpa, flags, form="IQQQI")

    def unmap(self, domain: int, first: int, last: int) -> RequestStatus:
        return self.ask(4, domain, first, last, bytes(4), form="IQQ4s")

    def reaches(self, name: str, iova: int) -> int | None:
        """The GPA that a device's write to iova has changed."""
        mark = os.urandom(8)
        try:
            self.machine.devices[name].dma.write(iova, mark)
        except DmaFault:
            return None
        return self.driver.memory.read(0, 1 << 20).find(mark)

    def settle(self) -> None:
        """Runs what was deferred to the IOMMU's thread."""
        self.iommu.backend.run_due(time.monotonic_ns())
