"""A driver without a kernel, and memory without a guest: for tests of models that take milliseconds.

Nothing of vmodel is replaced: the device is served on a socket, and the driver is a client of the protocol.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

from vmodel.closing import Closing
from vmodel.device import PciDevice
from vmodel.patience import patience, spoken
from vmodel.pci.caps import Msi, Msix
from vmodel.register_map import RegisterMap
from vmodel.regs import Register
from vmodel.server import Server
from vmodel.span import PAGE, MiB
from vmodel.vfio_user.client import Client, EventFd
from vmodel.vfio_user.wire import Irq, Region

#: Of Command: I/O space, memory space, bus mastering.
_IO, _MEMORY, _MASTER = 1, 2, 4
_ENABLE_MSI, _ENABLE_MSIX = 1 << 0, 1 << 15


class FakeMemory(Closing):
    """A guest's memory from address `start` on, and who gives out pieces of it; a context manager."""

    def __init__(self, size: int = 16 * MiB, start: int = 0) -> None:
        self.start = start
        self.size = size
        self.fd = os.memfd_create("vmodel-memory", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        # Address 0 is nobody's: a driver that forgets to set an address must not hit a buffer.
        self._next = max(start, PAGE)

    def alloc(self, content: int | bytes, align: int = PAGE) -> int:
        """A buffer for so many zero bytes, or with this content; its address.  MemoryError: there is no room."""
        data = bytes(content) if isinstance(content, int) else content
        address = -(-self._next // align) * align
        if address + len(data) > self.start + self.size:
            raise MemoryError(f"{len(data):#x} bytes do not fit: {self.start + self.size - address:#x} are left")
        self._next = address + max(len(data), 1)
        self.write(address, data)
        return address

    def read(self, address: int, size: int) -> bytes:
        """What is there.  ValueError: it is outside."""
        at = self._at(address, size)
        return self._map[at : at + size]

    def write(self, address: int, data: bytes) -> None:
        """Puts it there.  ValueError: it is outside."""
        at = self._at(address, len(data))
        self._map[at : at + len(data)] = data

    def _at(self, address: int, size: int) -> int:
        at = address - self.start
        if at < 0 or at + size > self.size:
            raise ValueError(f"{size:#x} bytes at {address:#x} are outside of memory")
        return at

    def attach(self, device: PciDevice) -> None:
        """Opens it to a device that is not served, and lets that do DMA: for tests that call a model's methods."""
        device.memory.map(self.start, self.size, fd=self.fd)
        device.config.write(4, (_IO | _MEMORY | _MASTER).to_bytes(2, "little"))

    def close(self) -> None:
        """Gives it back."""
        self._map.close()
        os.close(self.fd)


class FakeDriver(Closing):
    """What a kernel's driver does to a device, by vfio-user: registers, memory, interrupts; a context manager.

    Registers are named as the model declares them (`EduRegs.STATUS`), by text ("STATUS", "regs.STATUS"), or as
    (BAR, offset).  At the start memory space and bus mastering are on, and interrupts as the device has them: MSI-X,
    else MSI, else INTx.
    """

    def __init__(self, device: PciDevice, memory: FakeMemory, *, enable: bool = True) -> None:
        """`enable`: whether to do so; without, the device is as after a reset."""
        self.device = device
        self.memory = memory
        #: One for each vector that is enabled.
        self.interrupts: list[EventFd] = []
        self._names = RegisterMap(device)
        self._folder = tempfile.TemporaryDirectory(prefix="vmodel-")
        path = Path(self._folder.name) / "device.sock"
        self._server = Server()
        self._server.add(device, path)
        self._server.start()
        try:
            #: The protocol itself, for what has no method here.
            self.client = Client.connect(path)
            self.client.negotiate()
            self.client.map_dma(memory.start, memory.size, fd=memory.fd)
            if enable:
                self.enable()
        except BaseException:
            self.close()
            raise

    # ---- registers --------------------------------------------------------------------------

    def _place(self, where: Register | str | tuple[int, int], size: int | None) -> tuple[int, int, int]:
        if isinstance(where, tuple):
            return where[0], where[1], size or 4
        if isinstance(where, Register):
            for region, at, bank in self.device.backend.banks.values():
                if type(bank) is where.bank:
                    return region, at + where.offset, size or where.size
        else:
            found = self._names.find(where, config=False)
            if len(found) == 1:
                return found[0].region, found[0].span.start, size or found[0].span.size
            if found:
                raise LookupError(f"{where!r} may be {', '.join(place.full_name for place in found)}")
        raise LookupError(f"{self.device.name} has no register {where}")

    def read(self, where: Register | str | tuple[int, int], size: int | None = None) -> int:
        """Reads a register, or `size` bytes (else 4) at (BAR, offset).  LookupError: there is none of that name."""
        region, offset, count = self._place(where, size)
        return int.from_bytes(self.client.region_read(region, offset, count), "little")

    def write(
        self, where: Register | str | tuple[int, int], value: int, size: int | None = None, *, posted: bool = False
    ) -> None:
        """Writes one; `posted`: without waiting, as a driver's writes are."""
        region, offset, count = self._place(where, size)
        self.client.region_write(region, offset, value.to_bytes(count, "little"), posted=posted)

    def config_read(self, offset: int, size: int) -> int:
        """Reads config space."""
        return int.from_bytes(self.client.region_read(Region.CONFIG, offset, size), "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Writes config space."""
        self.client.region_write(Region.CONFIG, offset, value.to_bytes(size, "little"))

    def wait(self, until: Callable[[], bool], timeout: float = 5.0) -> None:
        """Looks again and again.  TimeoutError: it has not become true."""
        deadline = time.monotonic() + patience(timeout)
        while not until():
            if time.monotonic() >= deadline:
                raise TimeoutError(f"not in {spoken(timeout)}")
            time.sleep(0.001)

    def settle(self) -> None:
        """Returns when the device has done what was asked of it: posted writes, and what models deferred."""
        self.client.info()
        self.client.info()

    # ---- life -------------------------------------------------------------------------------

    def enable(self) -> None:
        """Switches memory and I/O space, bus mastering and interrupts on."""
        self.config_write(4, 2, _IO | _MEMORY | _MASTER)
        for kind, irq, bit in ((Msix, Irq.MSIX, _ENABLE_MSIX), (Msi, Irq.MSI, _ENABLE_MSI)):
            for name, capability in self.device.declaration.capabilities.items():
                if isinstance(capability, kind):
                    at = next(at for found, at, _ in self.device.config.places if found == name) + 2
                    count = self.device.backend.irq_info(irq).count
                    log2 = (count.bit_length() - 1) << 4 if irq == Irq.MSI else 0
                    self.config_write(at, 2, self.config_read(at, 2) & ~0x70 | log2 | bit)
                    self._listen(irq, count)
                    return
        if self.device.backend.irq_info(Irq.INTX).count:
            self._listen(Irq.INTX, 1)

    def _listen(self, irq: int, count: int) -> None:
        for event in self.interrupts:
            event.close()
        self.interrupts = self.client.eventfds(irq, count)

    def interrupt(self, vector: int = 0, timeout: float = 5.0) -> int:
        """Waits for an interrupt; how many there were since the last time.  TimeoutError."""
        return self.interrupts[vector].wait(timeout)

    def quiet(self, vectors: Collection[int] | None = None) -> bool:
        """Whether, once the device is done, no interrupt is left of these vectors, else of all."""
        self.settle()
        return all(self.interrupts[n].quiet(0) for n in (range(len(self.interrupts)) if vectors is None else vectors))

    def reset(self) -> None:
        """Resets the device, as a machine's reset does; it is not enabled afterwards."""
        self.client.reset()

    def close(self) -> None:
        """Leaves, and stops serving; the device is still the caller's."""
        for event in self.interrupts:
            event.close()
        self.interrupts.clear()
        if hasattr(self, "client"):
            self.client.close()
        self._server.stop()
        self._folder.cleanup()
