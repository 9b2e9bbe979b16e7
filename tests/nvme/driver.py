"""The driver's side of NVMe, for tests: memory that a controller reaches, its registers, and queues."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from vmodel.devices.nvme import Nvme
from vmodel.devices.nvme.command import Completion, NvmeCommand
from vmodel.devices.nvme.regs import Aqa, Cc, ControllerRegs, Csts, NvmeCap
from vmodel.devices.nvme.status import NvmeStatus
from vmodel.patience import patience
from vmodel.regs import Register
from vmodel.vfio_user.commands import IrqAction, SetIrqs
from vmodel.vfio_user.wire import Irq

SIZE = 64 << 20
PAGE = 4096
#: CC as drivers set it: entries of 64 and 16 bytes, pages of 4 KiB, round robin.
CONFIGURATION = 6 << 16 | 4 << 20
#: Longest that a test waits for a completion, in seconds.
PATIENCE = 10


class Memory:
    """64 MiB that a device reaches, handed out page by page."""

    def __init__(self, device: Nvme) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, SIZE)
        device.memory.map(0, SIZE, fd=self.fd)
        device.config.write(4, b"\x06\x00")  # Command: memory space, bus mastering
        self._next = PAGE
        #: What addresses are multiples of.
        self.page = PAGE

    def take(self, size: int) -> int:
        """The address of whole pages of zeros that nobody else has."""
        at = -(-self._next // self.page) * self.page
        self._next = at + -(-size // PAGE) * PAGE
        assert self._next <= SIZE
        self.write(at, bytes(self._next - at))  # a test may have written anywhere
        return at

    def read(self, at: int, size: int) -> bytes:
        return os.pread(self.fd, size, at)

    def write(self, at: int, data: bytes) -> None:
        os.pwrite(self.fd, data, at)


class Pair:
    """A submission queue and its completion queue."""

    def __init__(self, driver: Driver, qid: int, entries: int, completions: int | None = None) -> None:
        self.driver, self.qid, self.entries = driver, qid, entries
        self.completions = completions or entries
        self.sq = driver.memory.take(entries * 64)
        self.cq = driver.memory.take(self.completions * 16)
        self.tail = self.head = 0
        self.phase = 1
        self._cid = 0

    def write(self, command: NvmeCommand) -> int:
        """Puts a command into the queue, under an identifier of its own if it has none; rings no doorbell."""
        raw = bytearray(command.build())
        if not command.cid:
            self._cid = self._cid % 0xFFFE + 1
            raw[2:4] = struct.pack("<H", self._cid)
        self.driver.memory.write(self.sq + 64 * self.tail, bytes(raw))
        self.tail = (self.tail + 1) % self.entries
        return int.from_bytes(raw[2:4], "little")

    def ring(self) -> None:
        self.driver.doorbell(self.qid, self.tail)
        self.driver.run()

    def reap(self) -> list[Completion]:
        """What has been completed since it was last asked."""
        found = []
        while True:
            entry = Completion.parse(self.driver.memory.read(self.cq + 16 * self.head, 16))
            if entry.phase != self.phase:
                break
            found.append(entry)
            self.head += 1
            if self.head == self.completions:
                self.head, self.phase = 0, self.phase ^ 1
        if found:
            self.driver.doorbell(self.qid, self.head, completion=True)
            self.driver.run()
        return found

    def wait(self, count: int = 1) -> list[Completion]:
        """The next `count` completions, or more."""
        found: list[Completion] = []
        deadline = time.monotonic() + patience(PATIENCE)
        while len(found) < count:
            self.driver.run()
            found += self.reap()
            assert len(found) >= count or time.monotonic() < deadline, f"{len(found)} of {count} completions have come"
        return found

    def send(self, opcode: int, **fields: Any) -> Completion:
        """One command, and its completion."""
        cid = self.write(NvmeCommand.make(opcode, **fields))
        self.ring()
        (completion,) = self.wait()
        assert completion.cid == cid and completion.sqid == self.qid
        return completion


class Driver:
    """A controller and its driver."""

    def __init__(self, device: Nvme) -> None:
        self.device = device
        self.memory = Memory(device)
        self.stride = 4
        device.open()
        self.admin = Pair(self, 0, 32)
        #: A page for what commands transfer.
        self.page = self.memory.take(PAGE)

    # ---- registers -------------------------------------------------------------------------

    def get(self, register: Register) -> int:
        value = self.device.backend.region_read(0, register.offset, register.size)
        assert isinstance(value, int)
        return value

    def put(self, register: Register, value: int) -> None:
        self.device.backend.region_write(0, register.offset, register.size, value)

    def doorbell(self, qid: int, value: int, *, completion: bool = False) -> None:
        self.device.backend.region_write(0, 0x1000 + (2 * qid + completion) * self.stride, 4, value)

    @property
    def status(self) -> Csts:
        return Csts(self.get(ControllerRegs.CSTS))

    def run(self) -> None:
        """Lets the device do all that is due."""
        while True:
            now = time.monotonic_ns()
            deadline = self.device.backend.run_due(now)
            if deadline is None or deadline > now:
                return

    def until(self, condition: Callable[[], bool]) -> None:
        """Lets it run until something is so."""
        deadline = time.monotonic() + patience(PATIENCE)
        while not condition():
            assert time.monotonic() < deadline, "that takes too long"
            self.run()

    def set_up(self) -> None:
        """Admin queues, before enabling."""
        self.stride = 4 << NvmeCap(self.get(ControllerRegs.CAP)).DSTRD
        self.put(ControllerRegs.AQA, Aqa.ACQS.put(self.admin.completions - 1, self.admin.completions - 1))
        self.put(ControllerRegs.ASQ, self.admin.sq)
        self.put(ControllerRegs.ACQ, self.admin.cq)

    def enable(self, configuration: int = CONFIGURATION) -> None:
        """Brings it up with a new admin queue."""
        self.admin = Pair(self, 0, 32)
        self.set_up()
        self.put(ControllerRegs.CC, configuration | 1)
        assert self.status.RDY and not self.status.CFS

    def disable(self) -> None:
        self.put(ControllerRegs.CC, Cc.EN.put(self.get(ControllerRegs.CC), 0))
        assert not self.status.RDY

    # ---- commands --------------------------------------------------------------------------

    def ask(self, opcode: int, size: int = PAGE, **fields: Any) -> bytes:
        """An admin command that succeeds; what it has transferred to a page."""
        self.memory.write(self.page, b"\xee" * PAGE)
        completion = self.admin.send(opcode, dptr=prps(self.page), **fields)
        assert completion.status == 0, name(completion)
        return self.memory.read(self.page, size)

    def create(self, qid: int, entries: int = 64, *, vector: int = 0, priority: int = 0) -> Pair:
        """An I/O queue pair."""
        pair = Pair(self, qid, entries)
        flags = 3 if vector else 1
        done = self.admin.send(0x05, dptr=prps(pair.cq), cdw10=(entries - 1) << 16 | qid, cdw11=vector << 16 | flags)
        assert done.status == 0, name(done)
        done = self.admin.send(
            0x01, dptr=prps(pair.sq), cdw10=(entries - 1) << 16 | qid, cdw11=qid << 16 | priority << 1 | 1
        )
        assert done.status == 0, name(done)
        return pair

    def identify(self, cns: int, nsid: int = 0, **fields: Any) -> bytes:
        return self.ask(0x06, nsid=nsid, cdw10=cns, **fields)

    def log(self, page: int, size: int, *, nsid: int = 0xFFFF_FFFF, retain: bool = False) -> bytes:
        return self.ask(0x02, size, nsid=nsid, cdw10=(size // 4 - 1) << 16 | retain << 15 | page)

    # ---- interrupts ------------------------------------------------------------------------

    def vectors(self, kind: Irq, count: int) -> list[int]:
        """Eventfds of the first vectors, which are enabled."""
        capability = self.device.msix if kind is Irq.MSIX else self.device.msi
        assert capability is not None
        at = next(n for n in range(0x40, 0x100, 4) if bytes(self.device.config.view[n : n + 1])[0] == capability.id)
        several = (count - 1).bit_length() << 4  # Multiple Message Enable
        self.device.config.write(at + 2, b"\x00\x80" if kind is Irq.MSIX else bytes([1 | several, 0]))
        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.device.backend.set_irqs(SetIrqs(kind, IrqAction.TRIGGER, 0, count, tuple(os.dup(fd) for fd in fds)))
        return fds

    def close(self) -> None:
        os.close(self.memory.fd)


def raised(fd: int) -> int:
    """How often a vector was raised since it was last asked."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def prps(first: int, second: int = 0) -> bytes:
    """A data pointer of two PRPs."""
    return struct.pack("<QQ", first, second)


def name(completion: Completion) -> str:
    """The status of a completion."""
    return NvmeStatus(completion.status & 0x7FF).name


def start(params: Mapping[str, Any] | None = None) -> Driver:
    """A driver of a controller that is enabled; without parameters it has 1 MiB of 512 byte blocks in memory."""
    driver = Driver(Nvme("nvme0", {"namespaces": [{"memory": "1M"}]} if params is None else params))
    driver.enable()
    return driver
