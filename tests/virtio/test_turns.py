"""However much the driver asks for, the device keeps answering its client, and stops on request."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.virtio.driver import INDIRECT, NEEDS_RESET, NEXT, SIZE, WRITE, Driver, Queue
from tests.virtio.world import MACHINE, A
from vmodel.device import Msix, ResetKind
from vmodel.machine import parse
from vmodel.server import Server
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Region
from vmodel.virtio.pci import INDIRECT_DESC, VENDOR, VirtioDevice
from vmodel.virtio.queue import TURN, Virtqueue


class Echo(VirtioDevice):
    """Gives back what it is sent, by a queue as long as virtio-iommu's."""

    vendor_id, device_id, class_code = VENDOR, 0x107F, 0xFF0000
    queue_sizes = (256, 8)
    msix = Msix(vectors=2, own_bar=2)

    def on_queue(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            queue.answer(chain, queue.read(chain, 4096))


@pytest.fixture
def driver() -> Iterator[Driver]:
    device = Echo("echo")
    made = Driver(device)
    yield made
    made.close()
    device.close()


def long_table(queue: Queue, at: int, parts: int) -> None:
    """An indirect table of `parts` descriptors that read a byte, and one that writes, behind descriptor 0."""
    entries = [struct.pack("<QIHH", queue.data, 1, NEXT, n + 1) for n in range(parts)]
    queue.memory.write(at, b"".join(entries) + struct.pack("<QIHH", queue.data + 0x100, 4, WRITE, 0))
    queue.describe(0, at, 16 * (parts + 1), INDIRECT)


def test_a_doorbell_s_work_is_bounded(driver: Driver) -> None:
    """What is left comes later, in order, between other accesses; all of it comes."""
    (queue,) = driver.start([0], INDIRECT_DESC)
    long_table(queue, queue.data + 0x2000, 199)
    for _ in range(256):
        queue.offer(0)
    queue.notify()
    counts = [len(queue.used_now())]
    queue.notify()  # a turn is due anyway
    assert queue.used_now() == []
    while driver.device.backend.has_work():
        assert len(counts) <= 256, "more turns than requests"
        driver.device.backend.run_due(0)
        counts.append(len(queue.used_now()))
        assert driver.device.isr.STATUS == 1  # after each turn
        driver.device.isr.STATUS = 0
    assert sum(counts) == 256
    assert max(counts) <= TURN // 200 + 1 and len(counts) >= 256 // max(counts)
    queue.offer(0)
    queue.notify()
    assert len(queue.used_now()) == 1  # a doorbell works as before


@pytest.mark.parametrize("reset", [lambda d: d.put(0x14, 1, 0), lambda d: d.device.reset(ResetKind.DEVICE)])
def test_a_reset_ends_what_was_left(driver: Driver, reset: Callable[[Driver], None]) -> None:
    """2.4.1: no queue is touched after a reset, until the driver has set it up again."""
    (queue,) = driver.start([0], INDIRECT_DESC)
    long_table(queue, queue.data + 0x2000, 199)
    for _ in range(256):
        queue.offer(0)
    queue.notify()
    reset(driver)
    before = driver.memory.read(0, SIZE)
    driver.device.backend.run_due(0)
    assert driver.memory.read(0, SIZE) == before and not driver.device.backend.has_work()
    driver.device.config.write(4, b"\x06\x00")
    (queue,) = driver.start([0])
    queue.memory.write(queue.available, bytes(4))
    queue.memory.write(queue.used, bytes(4))
    assert queue.ask(b"again") == b"agai"


class Meddling:
    """DMA by messages: while one of them is under way, the client asks for something else."""

    def __init__(self, dma: Any, at: int, call: Callable[[], None]) -> None:
        self._dma, self._left, self._call = dma, at, call

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._dma, name)

        def access(*args: Any) -> Any:
            result = real(*args)
            self._left -= 1
            if self._left == 0:
                self._call()
            return result

        return access


@pytest.mark.parametrize("at", range(1, 16))
def test_a_reset_in_the_middle(driver: Driver, at: int) -> None:
    (queue,) = driver.start([0])
    before = b""

    def reset() -> None:
        nonlocal before
        driver.put(0x14, 1, 0)
        before = driver.memory.read(0, SIZE)

    mine = driver.device.queues[0]
    mine._dma = Meddling(mine._dma, at, reset)
    queue.send(b"one", 4)
    queue.offer(0)
    queue.notify()
    driver.device.backend.run_due(0)
    assert driver.device.errors == 0
    if before:
        assert driver.memory.read(0, SIZE) == before
        assert mine.progress == (0, 0) and not mine.due


@pytest.mark.parametrize("at", range(1, 16))
def test_a_doorbell_in_the_middle(driver: Driver, at: int) -> None:
    """It is not lost, and no request is answered twice."""
    (queue,) = driver.start([0])

    def ring() -> None:
        queue.offer(0)
        queue.notify()

    mine = driver.device.queues[0]
    mine._dma = Meddling(mine._dma, at, ring)
    queue.send(b"one", 4)
    queue.offer(0)
    queue.notify()
    driver.device.backend.run_due(0)
    assert driver.device.errors == 0 and not driver.status & NEEDS_RESET
    assert len(queue.used_now()) == driver.memory.u16(queue.available + 2)


# ---- over a socket, with a second CPU ---------------------------------------------------------------


class Far:
    """What tests.virtio.driver asks of a device, of one behind a socket."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.backend = self
        self.ram = client.share(0, SIZE)
        client.region_write(Region.CONFIG, 4, b"\x06\x00")

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.ram.view[at : at + size])

    def write(self, at: int, data: bytes) -> None:
        self.ram.view[at : at + len(data)] = data

    def u16(self, at: int) -> int:
        return int.from_bytes(self.read(at, 2), "little")

    def region_write(self, region: int, offset: int, size: int, value: int) -> None:
        self.client.region_write(region, offset, value.to_bytes(size, "little"))


class FarDriver(Driver):
    """A driver at the other end."""

    def __init__(self, client: Client) -> None:
        self.device = self.memory = Far(client)  # type: ignore[assignment]

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.memory.client.region_read(0, offset, size), "little")  # type: ignore[attr-defined]


class SecondCpu:
    """Makes requests available without end, as fast as they are answered."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        queue = self.queue
        while not self._ending.is_set():
            index = (queue.memory.u16(queue.used + 2) + 200) % 65536
            queue.memory.write(queue.available + 2, struct.pack("<H", index))

    def __enter__(self) -> SecondCpu:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()


def echo_requests(queue: Queue) -> None:
    long_table(queue, queue.data + 0x2000, 199)


def mapping_requests(queue: Queue) -> None:
    """Each is refused, as the domain has the mapping."""
    queue.ask(struct.pack("<B3xIII4x", 1, 1, A, 0))
    queue.memory.write(queue.data, struct.pack("<B3xIQQQI", 3, 1, 0x8000, 0x8FFF, 0, 3))
    queue.describe(0, queue.data, 36, NEXT, 1)


def unmapping_requests(queue: Queue) -> None:
    """Each is plain: it unmaps nothing."""
    mapping_requests(queue)
    queue.memory.write(queue.data, struct.pack("<B3xIQQ4x", 4, 1, 0x8000, 0x8FFF))


@pytest.mark.parametrize("requests", [echo_requests, mapping_requests, unmapping_requests])
def test_a_driver_that_never_stops_asking(tmp_path: Path, requests: Callable[[Queue], None]) -> None:
    machine = parse(MACHINE, Path("m.toml"))
    device = Echo("echo") if requests is echo_requests else machine.devices["viommu0"]
    server = Server()
    server.add(device, tmp_path / "x.sock")
    with server, Client.connect(tmp_path / "x.sock") as client:
        client.negotiate()
        driver = FarDriver(client)
        for again in (driver.put, lambda *_: client.reset()):
            (queue,) = driver.start([0], driver.offered() if requests is not echo_requests else INDIRECT_DESC)
            queue.memory.write(queue.available, bytes(0x210))
            queue.memory.write(queue.used, bytes(4))
            requests(queue)
            with SecondCpu(queue):
                seen = queue.memory.u16(queue.used + 2)
                queue.notify()
                for _ in range(20):
                    assert driver.status & 15 == 15  # it answers
                queue.notify()
                assert queue.memory.u16(queue.used + 2) != seen  # and it does its work
                again(0x14, 1, 0)
                client.region_write(Region.CONFIG, 4, b"\x06\x00")
                assert driver.status == 0
                seen = queue.memory.u16(queue.used + 2)
                assert driver.get(0x12, 2) == len(device.queue_sizes)  # type: ignore[attr-defined]
                assert queue.memory.u16(queue.used + 2) == seen  # a reset ends it
        # The server ends while it is at work.
        (queue,) = driver.start([0], driver.offered() if requests is not echo_requests else INDIRECT_DESC)
        queue.memory.write(queue.available, bytes(0x210))
        queue.memory.write(queue.used, bytes(4))
        requests(queue)
        with SecondCpu(queue):
            queue.notify()
            ending = threading.Thread(target=server.stop, daemon=True)
            ending.start()
            ending.join(20)
            assert not ending.is_alive()
    assert device.errors == 0
    device.close()
    machine.close()
