"""A client that keeps what it was given, takes nothing, says nothing, or asks for too much: docs/robustness.md."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fds import room_for_fds
from tests.proto.conftest import Served, enable, fds_settle, open_fds
from tests.proto.toy import Toy, ToyRegs
from vmodel import server as servers
from vmodel.device import on_write
from vmodel.server import Server
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.commands import Limits
from vmodel.vfio_user.wire import Command, DeviceState, Irq, IrqSetFlags

TRIGGER = IrqSetFlags.TRIGGER | IrqSetFlags.DATA_NONE


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Toy, Toy, Path]]:
    """Two devices of one server: a's client is hostile, b's is not."""
    a, b = Toy("a"), Toy("b")
    server = Server(Limits(handshake_timeout=0.3, message_timeout=0.5))
    for toy in (a, b):
        server.add(toy, tmp_path / f"{toy.name}.sock")
    with server:
        yield a, b, tmp_path
    assert not a.backend.abandoned and not b.backend.abandoned
    a.close()
    b.close()


def connected(folder: Path, name: str) -> Client:
    client = Client.connect(folder / f"{name}.sock")
    client.negotiate()
    return client


def blocking(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)


def test_an_eventfd_that_is_full_and_blocks(driver: Client) -> None:
    """eventfd(2): a write that would pass 2**64 - 2 blocks; O_NONBLOCK is the shared description's."""
    (event,) = driver.eventfds(Irq.MSIX, 1)
    blocking(event.fd)
    os.eventfd_write(event.fd, 2**64 - 2)
    for _ in range(300):  # more than the ring of completions has room for
        driver.request(Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, TRIGGER, Irq.MSIX, 0, 1))
    assert driver.info().num_irqs == 5
    assert os.eventfd_read(event.fd) >= 2**64 - 2
    event.close()


def test_each_signal_counts(driver: Client, toy: Toy) -> None:
    (event,) = driver.eventfds(Irq.MSIX, 1)
    for _ in range(1000):
        toy.backend.function.signal(event.fd)
    assert os.eventfd_read(event.fd) == 1000
    event.close()


def test_a_doorbell_that_the_client_empties(driver: Client, toy: Toy) -> None:
    """What poll() has seen is gone when the server reads it, and the description blocks."""
    (doorbell,) = driver.region_io_fds(0)
    blocking(doorbell.fd)
    over = threading.Event()

    def play() -> None:
        while not over.is_set():
            os.eventfd_write(doorbell.fd, 1)
            os.set_blocking(doorbell.fd, False)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(doorbell.fd)
            blocking(doorbell.fd)

    player = threading.Thread(target=play)
    player.start()
    try:
        for _ in range(2000):
            driver.region_read(0, 0, 4)
    finally:
        over.set()
        player.join()
        os.close(doorbell.fd)
    assert toy.errors == 0


def test_a_client_that_says_nothing(pair: tuple[Toy, Toy, Path]) -> None:
    silent = Client.connect(pair[2] / "a.sock")
    with connected(pair[2], "a") as following, connected(pair[2], "b") as other:
        assert following.info().num_irqs == other.info().num_irqs == 5
    with pytest.raises(OSError):
        silent.negotiate()
    silent.close()


def test_a_client_that_has_shaken_hands_may_be_silent(pair: tuple[Toy, Toy, Path]) -> None:
    with connected(pair[2], "a") as client:
        time.sleep(0.5)
        assert client.info().num_irqs == 5


def test_a_client_that_takes_nothing(pair: tuple[Toy, Toy, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Replies that nobody reads end the connection after message_timeout; the next client finds the device free.

    The log says why, once.
    """
    greedy = connected(pair[2], "a")
    enable(greedy)
    request = greedy.message(Command.REGION_READ, struct.pack("<QII", 0x2000, 0, 0x1000))
    greedy.main.sock.settimeout(0.2)
    with pytest.raises(OSError):  # no room any more, then the end
        for _ in range(1_000_000):
            greedy.main.sock.sendall(request)
    with connected(pair[2], "a") as following:
        assert following.info().num_irqs == 5
    assert caplog.messages == ["a: client dropped: it has not taken a message within 0.5 s"]
    greedy.close()


def test_fds_of_one_message_are_bounded(pair: tuple[Toy, Toy, Path]) -> None:
    """SCM_RIGHTS: what finds no room in the control buffer is closed by the kernel."""
    before = open_fds()
    hostile = Client.connect(pair[2] / "a.sock")
    hostile.negotiate(twin_socket=True, max_msg_fds=16)
    event = os.eventfd(0)
    mine = open_fds()
    header = hostile.message(Command.DEVICE_GET_INFO, bytes(16))
    for stream in (hostile.main, hostile.twin):
        assert stream is not None
        for n in range(6):
            socket.send_fds(stream.sock, [header[n : n + 1]], [event] * 250)
    with connected(pair[2], "b") as other:
        events = other.eventfds(Irq.MSIX, 8)
        assert open_fds() - mine <= 17 + 1 + 2 * 8 + 2
        for one in events:
            one.close()
    hostile.close()
    os.close(event)
    assert fds_settle(before)


def test_eventfds_are_shared_out(pair: tuple[Toy, Toy, Path]) -> None:
    """A client at its share gets ENOSPC, keeps what it has, and may replace it; others have theirs."""
    pair[0].backend.irqs.max_eventfds = 4
    with connected(pair[2], "a") as a, connected(pair[2], "b") as b:
        enable(a)
        events = a.eventfds(Irq.MSIX, 4)
        fds = [event.fd for event in events]
        assert refused(a, 4, fds[:1]) == errno.ENOSPC
        assert refused(a, 0, fds) == 0
        events += b.eventfds(Irq.MSIX, 5)
        for vector in range(4):
            a.request(Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, TRIGGER, Irq.MSIX, vector, 1))
            assert events[vector].wait() == 1
        a.request(Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, TRIGGER, Irq.MSIX, 0, 0))
        assert refused(a, 4, fds) == 0
        for event in events:
            event.close()


def test_fds_beyond_the_limit_of_the_process(driver: Client, toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    """SET_IRQS and DMA_MAP succeed with all of their fds or fail: none vanishes behind a success.  The log says so."""
    flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.TRIGGER
    old = driver.eventfds(Irq.MSIX, 2)
    new = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    ram = os.memfd_create("ram")
    os.ftruncate(ram, 4096)
    before = open_fds()
    with room_for_fds(1), caplog.at_level(logging.WARNING):
        with pytest.raises(OSError) as caught:
            driver.set_irqs(Irq.MSIX, flags, count=2, fds=new)
        assert caught.value.errno == errno.EMFILE
        driver.set_irqs(Irq.MSIX, IrqSetFlags.DATA_NONE | IrqSetFlags.TRIGGER)  # the vector has its eventfd still
    with room_for_fds(0), caplog.at_level(logging.WARNING), pytest.raises(OSError) as caught:
        driver.map_dma(0x10000, 4096, fd=ram)
    assert caught.value.errno == errno.EMFILE
    assert old[0].wait() == 1
    assert toy.backend.memory.windows() == []
    assert open_fds() == before
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].endswith("command 8 refused, as its fds cannot be received: Too many open files")
    driver.map_dma(0x10000, 4096, fd=ram)
    driver.set_irqs(Irq.MSIX, flags, count=2, fds=new)
    driver.set_irqs(Irq.MSIX, IrqSetFlags.DATA_NONE | IrqSetFlags.TRIGGER)
    assert os.eventfd_read(new[0]) == 1
    for event in old:
        event.close()
    for fd in (*new, ram):
        os.close(fd)


def refused(client: Client, start: int, fds: list[int]) -> int:
    flags = IrqSetFlags.TRIGGER | IrqSetFlags.DATA_EVENTFD
    try:
        client.request(Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, flags, Irq.MSIX, start, len(fds)), fds)
    except OSError as error:
        return error.errno or -1
    return 0


def test_no_more_state_than_the_device_has(pair: tuple[Toy, Toy, Path]) -> None:
    with connected(pair[2], "a") as a, connected(pair[2], "b") as b:
        a.set_state(DeviceState.RESUMING)
        with pytest.raises(OSError) as caught:
            a.migration_write(b"[[]," * (1 << 20))
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as caught:
            a.set_state(DeviceState.STOP)
        assert caught.value.errno == errno.EINVAL
        assert b.info().num_irqs == 5


def test_logs_are_limited_for_each_device(pair: tuple[Toy, Toy, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), connected(pair[2], "a") as a, connected(pair[2], "b") as b:
        enable(a)
        enable(b)
        for _ in range(200):
            a.region_read(0, 0x30, 4)
        b.region_read(0, 0x30, 4)
        by_name = [record.name for record in caplog.records]
        assert by_name.count("vmodel.device.a") <= 20
        assert by_name.count("vmodel.device.b") == 1
    assert pair[0].errors == 200


class Writer(Client):
    """Answers no DMA_READ, but writes the register that makes the device ask for the next one."""

    asked = 0

    def _dma(self, message: object) -> bytes:
        self.asked += 1
        if self.asked < 200:
            self.region_write(0, 0x18, (8).to_bytes(4, "little"), posted=True)
        time.sleep(0.02)
        raise OSError(errno.EIO, "no answer")


def test_messages_do_not_nest_without_end(pair: tuple[Toy, Toy, Path]) -> None:
    """Each hook that waits for a message serves the client meanwhile, and so may be re-entered."""
    folder = pair[2]
    client = Writer.connect(folder / "a.sock")
    client.negotiate()
    enable(client)
    client.map_dma(0x10000, 0x1000)
    client.region_write(0, 0x08, (0x10000).to_bytes(8, "little"))
    deepest = 0
    plain = servers.Connection._request

    def counted(self: servers.Connection, *args: object) -> bytes:
        nonlocal deepest
        deepest = max(deepest, self._depth)
        return plain(self, *args)  # type: ignore[arg-type]

    servers.Connection._request = counted  # type: ignore[method-assign,assignment]
    try:
        client.region_write(0, 0x18, (8).to_bytes(4, "little"), posted=True)
        client.serve(2)
    finally:
        servers.Connection._request = plain  # type: ignore[method-assign]
    assert 1 <= deepest <= servers.MAX_NESTED
    client.close()


def test_the_thread_survives_what_the_system_refuses(served: Served, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, left = toy.backend.function.idle, 3

    def idle(listener: int, deadline: int) -> tuple[int, int]:
        nonlocal left
        if left:
            left -= 1
            raise OSError(errno.ENOMEM, "no memory")
        return plain(listener, deadline)

    monkeypatch.setattr(toy.backend.function, "idle", idle)
    toy.backend.function.wake()
    for _ in range(3):
        with served.connect() as client:
            client.negotiate()
            assert client.info().num_irqs == 5
    assert left == 0


def test_a_model_that_does_not_return_is_abandoned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entered, over = threading.Event(), threading.Event()

    class Stuck(Toy):
        @on_write(ToyRegs.DOORBELL)
        def _ring(self, new: int) -> None:
            entered.set()
            over.wait()

    stuck, other = Stuck("stuck"), Toy("other")
    server = Server()
    server.add(stuck, tmp_path / "stuck.sock")
    server.add(other, tmp_path / "other.sock")
    server.start()
    with connected(tmp_path, "stuck") as client:
        enable(client)
        client.region_write(0, 0x1C, bytes(4), posted=True)
        assert entered.wait(5)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 10
    assert stuck.backend.abandoned and not other.backend.abandoned
    assert "stuck: abandoned" in caplog.text and "wait" in caplog.text
    assert not (tmp_path / "stuck.sock").exists()
    over.set()
    other.close()


def test_a_silent_twin(tmp_path: Path) -> None:
    """DMA_WRITEs into a twin socket that nobody reads end by message_timeout, and by stop()."""
    toy = Toy()
    server = Server(Limits(message_timeout=60))
    server.add(toy, tmp_path / "toy.sock")
    server.start()
    client = Client.connect(tmp_path / "toy.sock")
    request = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"twin_socket":{"supported":true}}}\0'
    reply = client.request(Command.VERSION, struct.pack("<HH", 0, 0) + request)
    assert len(reply.fds) == 1  # the twin, which nobody will read
    enable(client)
    client.map_dma(0x10000, 0x200000)
    sending = threading.Event()

    def send() -> None:
        sending.set()
        toy.dma.write(0x10000, bytes(0x100000))

    toy.defer(send)
    assert sending.wait(5)
    time.sleep(0.2)
    server.stop()
    assert not toy.backend.abandoned
    reply.close()
    client.close()
    toy.close()
