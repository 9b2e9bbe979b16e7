"""A driver without a kernel, and memory without a guest: for tests of models, in milliseconds each.

No part of vmodel is replaced: the device is served on a socket, and the driver is a vfio-user client.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from vmodel.closing import Closing
from vmodel.device import PciDevice
from vmodel.device.outside import TIMEOUT, call
from vmodel.fields import fit, near
from vmodel.patience import patience, spoken
from vmodel.pci.caps import Msi, Msix
from vmodel.register_map import RegisterMap
from vmodel.regs import Register
from vmodel.server import Server
from vmodel.span import PAGE, MiB
from vmodel.vfio_user.client import Client, EventFd
from vmodel.vfio_user.wire import Irq, Region

#: For pytest: what fails here is shown at the line of the test that called.
__tracebackhide__ = True
#: Bits of the Command register: I/O space, memory space, bus mastering.
_IO, _MEMORY, _MASTER = 1, 2, 4
_ENABLE_MSI, _ENABLE_MSIX = 1 << 0, 1 << 15


class FakeMemory(Closing):
    """Guest memory with an allocator; a context manager.  Addresses are guest-physical (GPA), sizes in bytes."""

    def __init__(self, size: int = 16 * MiB, start: int = 0) -> None:
        """`size` zero bytes from address `start` on."""
        self.start = start
        self.size = size
        self.fd = os.memfd_create("vmodel-memory", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        # Address 0 is not allocated: a driver that does not set an address must not hit a buffer.
        self._next = max(start, PAGE)

    def alloc(self, content: int | bytes, align: int = PAGE) -> int:
        """Allocates a buffer of `content` zero bytes, or with these bytes; returns its address.

        `align`: what the address is a multiple of.  MemoryError: the memory is used up.
        """
        data = bytes(content) if isinstance(content, int) else content
        address = -(-self._next // align) * align
        if address + len(data) > self.start + self.size:
            left = max(self.start + self.size - address, 0)
            raise MemoryError(f"a buffer of {len(data):#x} bytes does not fit: {left:#x} bytes are left")
        self._next = address + max(len(data), 1)
        self.write(address, data)
        return address

    def read(self, address: int, size: int) -> bytes:
        """Reads `size` bytes at `address`.  ValueError: they are outside the memory."""
        at = self._at(address, size)
        return self._map[at : at + size]

    def write(self, address: int, data: bytes) -> None:
        """Writes `data` at `address`.  ValueError: it is outside the memory."""
        at = self._at(address, len(data))
        self._map[at : at + len(data)] = data

    def _at(self, address: int, size: int) -> int:
        at = address - self.start
        if at < 0 or at + size > self.size:
            raise ValueError(f"{size:#x} bytes at {address:#x} are outside the memory")
        return at

    def attach(self, device: PciDevice) -> None:
        """Maps the memory for a device that is not served, and turns on memory space and bus mastering.

        For tests that call a model's methods.
        """
        device.memory.map(self.start, self.size, fd=self.fd)
        device.config.write(4, (_IO | _MEMORY | _MASTER).to_bytes(2, "little"))

    def close(self) -> None:
        """Frees the memory."""
        self._map.close()
        os.close(self.fd)


class FakeDriver(Closing):
    """Serves a device and drives it by vfio-user, as a kernel's driver would; a context manager.

    A register is `EduRegs.STATUS`, as the model declares it, or a name ("STATUS", "regs.STATUS"), or (BAR, offset).
    Values are little-endian integers.  OSError and TimeoutError: see vfio_user.client.Client.
    """

    def __init__(self, device: PciDevice, memory: FakeMemory, *, enable: bool = True) -> None:
        """`enable`: calls `enable`; otherwise the device stays as after a reset.  TypeError: `device` is none."""
        if not isinstance(device, PciDevice):
            raise TypeError(f"a device is an instance of a PciDevice, as Edu('edu0'), not {device!r}")
        self.device = device
        self.memory = memory
        #: An eventfd for each enabled vector.
        self.interrupts: list[EventFd] = []
        self._names = RegisterMap(device)
        self._folder = tempfile.TemporaryDirectory(prefix="vmodel-")
        path = Path(self._folder.name) / "device.sock"
        self._server = Server()
        self._server.add(device, path)
        self._server.start()
        try:
            #: The vfio-user client, for requests that have no method here.
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
        elif not isinstance(where, str):
            raise TypeError(f"a register is EduRegs.STATUS, a name, or (BAR, offset), not {where!r}")
        else:
            found = self._names.find(where, config=False)
            if len(found) == 1:
                return found[0].region, found[0].span.start, size or found[0].span.size
            if found:
                raise LookupError(f"{where!r} is ambiguous: {', '.join(place.full_name for place in found)}")
            known = [place.name for place in self._names.places if place.region != Region.CONFIG]
            raise LookupError(near(self.device.name, "register", where, known))
        raise LookupError(f"{self.device.name} has no register {where}")

    def read(self, where: Register | str | tuple[int, int], size: int | None = None) -> int:
        """Reads a register, or `size` bytes (4 by default) at (BAR, offset).  LookupError: no such register."""
        region, offset, count = self._place(where, size)
        return int.from_bytes(self.client.region_read(region, offset, count), "little")

    def write(
        self, where: Register | str | tuple[int, int], value: int, size: int | None = None, *, posted: bool = False
    ) -> None:
        """Writes a register.  `posted`: does not wait for the reply, as writes of a guest do not.

        LookupError: no such register; ValueError, TypeError: `value` is no number of that size (see vmodel.fields.fit).
        """
        region, offset, count = self._place(where, size)
        what = where.name if isinstance(where, Register) else where if isinstance(where, str) else f"{count} bytes"
        data = fit(value, 8 * count, what).to_bytes(count, "little")
        self.client.region_write(region, offset, data, posted=posted)

    def config_read(self, offset: int, size: int) -> int:
        """Reads `size` bytes of config space."""
        return int.from_bytes(self.client.region_read(Region.CONFIG, offset, size), "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Writes `size` bytes of config space."""
        self.client.region_write(Region.CONFIG, offset, value.to_bytes(size, "little"))

    def wait(self, until: Callable[[], bool], timeout: float = 5.0) -> None:
        """Calls `until` until it returns True.  TimeoutError: it did not within `timeout` seconds."""
        deadline = time.monotonic() + patience(timeout)
        while not until():
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the condition was not true within {spoken(timeout)}")
            time.sleep(0.001)

    def call(self, method: str, *arguments: Any, timeout: float = TIMEOUT, **named: Any) -> Any:
        """Calls a method that the model marks with `@outside`, on the device's thread; returns its result.

        It raises what the method raises.  OutsideError: no such method, or wrong arguments.  CallTimeout: it has not
        returned within `timeout` seconds.
        """
        return call(self.device, method, arguments, named, seconds=patience(timeout))

    def settle(self) -> None:
        """Returns when the device has handled all posted writes and the work that models deferred."""
        self.client.info()
        self.client.info()

    # ---- life -------------------------------------------------------------------------------

    def enable(self) -> None:
        """Turns on memory and I/O space, bus mastering, and interrupts: MSI-X, else MSI, else INTx."""
        self.config_write(4, 2, _IO | _MEMORY | _MASTER)
        for kind, irq, bit in ((Msix, Irq.MSIX, _ENABLE_MSIX), (Msi, Irq.MSI, _ENABLE_MSI)):
            for name, capability in self.device.declaration.capabilities.items():
                if isinstance(capability, kind):
                    at = next(at for found, at, _ in self.device.config.places if found == name) + 2
                    count = self.device.backend.irq_info(irq).count
                    log2 = (count.bit_length() - 1) << 4 if irq == Irq.MSI else 0
                    self.config_write(at, 2, self.config_read(at, 2) & ~0x70 | log2 | bit)
                    self._set_eventfds(irq, count)
                    return
        if self.device.backend.irq_info(Irq.INTX).count:
            self._set_eventfds(Irq.INTX, 1)

    def _set_eventfds(self, irq: int, count: int) -> None:
        for event in self.interrupts:
            event.close()
        self.interrupts = self.client.eventfds(irq, count)

    def interrupt(self, vector: int = 0, timeout: float = 5.0) -> int:
        """Waits for an interrupt; returns their number since the last call.

        TimeoutError: none within `timeout` seconds; LookupError: no such vector is enabled.
        """
        if not 0 <= vector < len(self.interrupts):
            raise LookupError(f"{self.device.name} has {len(self.interrupts)} interrupts enabled: there is no {vector}")
        if self.interrupts[vector].quiet(patience(timeout)):
            raise TimeoutError(f"{self.device.name} has not sent interrupt {vector} within {spoken(timeout)}")
        return self.interrupts[vector].wait(0)

    def quiet(self, vectors: Collection[int] | None = None) -> bool:
        """Whether no interrupt of these vectors (by default all) is left after `settle`."""
        self.settle()
        return all(self.interrupts[n].quiet(0) for n in (range(len(self.interrupts)) if vectors is None else vectors))

    def reset(self) -> None:
        """Resets the device as a machine's reset does; afterwards it is not enabled."""
        self.client.reset()

    def close(self) -> None:
        """Disconnects, and stops the server.  The caller still has to close the device."""
        for event in self.interrupts:
            event.close()
        self.interrupts.clear()
        if hasattr(self, "client"):
            self.client.close()
        self._server.stop()
        self._folder.cleanup()
