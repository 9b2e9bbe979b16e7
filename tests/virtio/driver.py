"""The driver's side of virtio, for tests: memory that a device reaches, its registers, and split queues."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from vmodel.virtio.pci import EVENT_IDX, INDIRECT_DESC, VERSION_1, VirtioDevice

SIZE = 1 << 20
NEXT, WRITE, INDIRECT = 1, 2, 4
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128


class Memory:
    """A mebibyte that a device reaches."""

    def __init__(self, device: VirtioDevice) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, SIZE)
        device.memory.map(0, SIZE, fd=self.fd)
        device.config.write(4, b"\x06\x00")  # Command: memory space, bus mastering

    def read(self, at: int, size: int) -> bytes:
        return os.pread(self.fd, size, at)

    def write(self, at: int, data: bytes) -> None:
        os.pwrite(self.fd, data, at)

    def u16(self, at: int) -> int:
        return int(struct.unpack("<H", self.read(at, 2))[0])


class Queue:
    """A queue at a place in memory: descriptors, available ring and used ring in a page each, then room for data."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        self.driver, self.index, self.size = driver, index, size
        self.memory = driver.memory
        base = 0x10000 * (index + 1)
        self.descriptors, self.available, self.used, self.data = base, base + 0x4000, base + 0x6000, base + 0x8000
        self._next = self._seen = 0

    def describe(self, n: int, address: int, size: int, flags: int, following: int = 0) -> None:
        self.memory.write(self.descriptors + 16 * n, struct.pack("<QIHH", address, size, flags, following))

    def offer(self, head: int) -> None:
        """Puts a chain into the available ring."""
        self.memory.write(self.available + 4 + 2 * (self._next % self.size), struct.pack("<H", head))
        self._next = (self._next + 1) % 65536
        self.memory.write(self.available + 2, struct.pack("<H", self._next))

    def send(self, data: bytes, room: int = 0) -> None:
        """A request of one part to read and one to write, at descriptors 0 and 1."""
        self.memory.write(self.data, data)
        self.memory.write(self.data + 0x1000, bytes(room))
        self.describe(0, self.data, len(data), NEXT if room else 0, 1)
        self.describe(1, self.data + 0x1000, room, WRITE)
        self.offer(0)

    def notify(self) -> None:
        self.driver.device.backend.region_write(0, 0x3000 + 4 * self.index, 2, self.index)

    def used_now(self) -> list[tuple[int, int]]:
        """(head, bytes written) of what was answered since it was last asked."""
        found = []
        index = self.memory.u16(self.used + 2)
        while self._seen != index:
            found.append(struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self._seen % self.size), 8)))
            self._seen = (self._seen + 1) % 65536
        return found  # type: ignore[return-value]

    def ask(self, data: bytes, room: int = 4) -> bytes:
        """Sends a request and gives the answer."""
        self.send(data, room)
        self.notify()
        ((_, written),) = self.used_now()
        return self.memory.read(self.data + 0x1000, written)


class Driver:
    """Brings a device up, step by step or at once."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.memory = Memory(device)

    def get(self, offset: int, size: int) -> int:
        """A register of the BAR, by way of the shim's policy as a guest's access goes."""
        if self.device.backend.function.plain_read(0, offset, size) and offset != 0x1000:
            return int.from_bytes(self.device.backend.function.plain_read(0, offset, size), "little")
        value = self.device.backend.region_read(0, offset, size)
        assert isinstance(value, int)
        return value

    def put(self, offset: int, size: int, value: int) -> None:
        self.device.backend.region_write(0, offset, size, value)

    @property
    def status(self) -> int:
        return self.get(0x14, 1)

    def offered(self) -> int:
        words = []
        for word in (0, 1):
            self.put(0x00, 4, word)
            words.append(self.get(0x04, 4))
        return words[0] | words[1] << 32

    def accept(self, features: int) -> None:
        for word in (0, 1):
            self.put(0x08, 4, word)
            self.put(0x0C, 4, features >> 32 * word & 0xFFFF_FFFF)

    def set_up(self, index: int, size: int | None = None) -> Queue:
        self.put(0x16, 2, index)
        if size is not None:
            self.put(0x18, 2, size)
        queue = Queue(self, index, self.get(0x18, 2))
        for offset, address in ((0x20, queue.descriptors), (0x28, queue.available), (0x30, queue.used)):
            self.put(offset, 4, address)
            self.put(offset + 4, 4, 0)
        self.put(0x1C, 2, 1)
        return queue

    def start(self, queues: Sequence[int], features: int | None = None) -> list[Queue]:
        """All of 3.1.1."""
        self.put(0x14, 1, 0)
        self.put(0x14, 1, ACKNOWLEDGE)
        self.put(0x14, 1, ACKNOWLEDGE | DRIVER)
        wanted = self.offered() & ~(EVENT_IDX | INDIRECT_DESC) if features is None else features
        self.accept(wanted | VERSION_1)
        self.put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.status & FEATURES_OK
        found = [self.set_up(index) for index in queues]
        self.put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return found

    def close(self) -> None:
        os.close(self.memory.fd)
