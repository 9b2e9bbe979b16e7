"""Clients that come, go and misbehave; sockets that are there already."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
from pathlib import Path

import pytest

from tests.proto.conftest import Served, enable, fds_settle, open_fds
from tests.proto.toy import Toy
from vmodel.errors import ConfigError
from vmodel.patience import patience
from vmodel.server import Server
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import Client, Closed
from vmodel.vfio_user.wire import Command, HeaderFlags, Irq


def test_a_clean_session_for_the_next_client(served: Served, toy: Toy) -> None:
    before = open_fds()
    for n in range(5):
        with served.connect() as client:
            client.negotiate()
            enable(client)
            assert int.from_bytes(client.region_read(0, 0, 4), "little") == (n or 0x1111_1111)
            client.region_write(0, 0, (n + 1).to_bytes(4, "little"))
            client.share(0, 0x10000)
            events = client.eventfds(Irq.MSIX, 8)
            assert len(toy.memory) == 1
            for event in events:
                event.close()
    with served.connect() as client:
        client.negotiate()
        assert len(toy.memory) == 0
        assert all(vector.trigger < 0 for vector in toy.backend.irqs.types[Irq.MSIX].vectors)
    assert fds_settle(before)


def test_a_second_client_waits_for_its_turn(served: Served) -> None:
    first, second = served.connect(), served.connect()
    first.negotiate()
    second.timeout = 0.2
    with pytest.raises(TimeoutError):
        second.negotiate()
    first.close()
    second.timeout = 5
    assert second.reply(1).command == Command.VERSION
    second.close()


def test_no_reply_means_none_even_for_errors(client: Client) -> None:
    client.post(Command.DEVICE_GET_IRQ_INFO, b"bad")
    client.post(99, b"")
    client.post(Command.DMA_MAP, b"")
    client.post(Command.DEVICE_GET_INFO, bytes(16))
    assert client.info().num_irqs == 5


def test_ids_are_echoed(client: Client) -> None:
    for id in (0, 1, 0x7FFF, 0xFFFF):
        client.main.send(client.message(Command.DEVICE_RESET, id=id))
        assert client.reply(id).id == id


def test_everything_in_one_sendmsg(client: Client) -> None:
    messages = [client.message(Command.DEVICE_RESET, id=n) for n in range(500)]
    client.main.send(b"".join(messages))
    assert [client.reply(n).id for n in range(500)] == list(range(500))


def test_split_at_every_byte(served: Served) -> None:
    with served.connect() as client:
        client.negotiate()
        request = {"argsz": 16, "flags": 0, "num_regions": 0, "num_irqs": 0}
        whole = client.message(Command.DEVICE_GET_INFO, wire.DeviceInfo.build(request), id=5)
        for cut in range(1, len(whole)):
            client.main.send(whole[:cut])
            client.main.send(whole[cut:])
            assert client.reply(5).payload[12:] == b"\5\0\0\0"


def test_every_command_byte_by_byte(served: Served) -> None:
    bodies = {
        Command.DMA_MAP: wire.DmaMap.build({"argsz": 32, "flags": 3, "offset": 0, "address": 0, "size": 4096}),
        Command.DMA_UNMAP: wire.DmaUnmap.build({"argsz": 24, "flags": 0, "address": 0, "size": 4096}),
        Command.DEVICE_GET_INFO: b"\x10".ljust(16, b"\0"),
        Command.DEVICE_GET_REGION_INFO: b"\x20".ljust(32, b"\0"),
        Command.DEVICE_GET_REGION_IO_FDS: b"\x10".ljust(16, b"\0"),
        Command.DEVICE_GET_IRQ_INFO: b"\x10".ljust(16, b"\0"),
        Command.DEVICE_SET_IRQS: b"\x14\0\0\0\x21\0\0\0" + bytes(8) + b"\1\0\0\0",
        Command.REGION_READ: bytes(8) + b"\7\0\0\0\4\0\0\0",
        Command.REGION_WRITE: bytes(8) + b"\7\0\0\0\4\0\0\0" + b"abcd",
        Command.DEVICE_RESET: b"",
        Command.REGION_WRITE_MULTI: b"\1" + bytes(15) + b"\7\0\0\0\1\0\0\0" + bytes(8),
        Command.DEVICE_FEATURE: b"\x10\0\0\0\1\0\1\0" + bytes(8),
    }
    with served.connect() as client:
        client.negotiate()
        for command, body in bodies.items():
            for byte in client.message(command, body, id=9):
                client.main.send(bytes([byte]))
            for fd in client.reply(9).fds:
                os.close(fd)


def test_a_size_below_the_header(served: Served) -> None:
    with served.connect() as client:
        client.negotiate()
        client.main.send(wire.Header.build({"id": 3, "command": 4, "size": 15, "flags": 0, "error": 0}))
        with pytest.raises(OSError) as caught:
            client.reply(3)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(Closed):
            client.reply(3)


def test_an_oversized_message_is_drained(client: Client) -> None:
    size = 3 << 20
    head = wire.Header.build({"id": 3, "command": 10, "size": size, "flags": 0, "error": 0})
    sender = threading.Thread(target=client.main.send, args=(head + bytes(size - 16),))
    sender.start()
    with pytest.raises(OSError) as caught:
        client.reply(3)
    sender.join()
    assert caught.value.errno == errno.EINVAL
    assert client.info().num_irqs == 5


def test_fds_that_nobody_wants_are_closed(client: Client) -> None:
    fd = os.memfd_create("stray")
    before = open_fds()
    for command in range(20):
        for count in (1, 3, 16, 17, 40):
            try:
                for received in client.request(command, bytes(16), [fd] * count).fds:
                    os.close(received)
            except OSError:
                pass
    client.info()
    assert open_fds() == before
    os.close(fd)


@pytest.mark.parametrize("greet", [True, False])
def test_fds_of_a_reply_to_nothing_are_closed(served: Served, greet: bool) -> None:
    fd = os.eventfd(0)
    before = open_fds()
    with served.connect() as client:
        if greet:
            client.negotiate()
        for _ in range(20):
            client.main.send(client.message(Command.DEVICE_GET_INFO, flags=HeaderFlags.REPLY), [fd, fd])
        if not greet:
            client.negotiate()
        client.info()  # all of them have been looked at
    assert fds_settle(before)
    os.close(fd)


@pytest.mark.parametrize("seed", range(6))
def test_mutated_messages(served: Served, toy: Toy, seed: int) -> None:
    """An error reply, a good one, or a clean close; and the next client finds the server well."""
    rng = random.Random(seed)
    toy.backend.io_event_fds(0)  # made when first asked for, and then kept
    before = open_fds()
    with served.connect() as sample:
        valid = [
            (Command.DEVICE_GET_INFO, b"\x10".ljust(16, b"\0")),
            (Command.DEVICE_GET_REGION_INFO, b"\x40".ljust(32, b"\0")),
            (Command.DEVICE_GET_REGION_IO_FDS, b"\x80".ljust(16, b"\0")),
            (Command.DEVICE_GET_IRQ_INFO, b"\x10".ljust(16, b"\0")),
            (Command.DEVICE_SET_IRQS, b"\x14\0\0\0\x24\0\0\0\2\0\0\0" + bytes(4) + b"\1\0\0\0"),
            (Command.DEVICE_SET_IRQS, b"\x16\0\0\0\x22\0\0\0\2\0\0\0" + bytes(4) + b"\2\0\0\0\1\1"),
            (Command.DMA_MAP, wire.DmaMap.build({"argsz": 32, "flags": 3, "offset": 0, "address": 0, "size": 4096})),
            (Command.DMA_UNMAP, wire.DmaUnmap.build({"argsz": 24, "flags": 0, "address": 0, "size": 4096})),
            (Command.REGION_READ, bytes(8) + b"\7\0\0\0\4\0\0\0"),
            (Command.REGION_WRITE, b"\4" + bytes(7) + b"\7\0\0\0\2\0\0\0\7\0"),
            (Command.REGION_WRITE, b"\4" + bytes(7) + b"\0\0\0\0\4\0\0\0abcd"),
            (Command.REGION_WRITE_MULTI, b"\1" + bytes(15) + b"\7\0\0\0\1\0\0\0" + bytes(8)),
            (Command.DEVICE_FEATURE, b"\x10\0\0\0\2\0\2\0\3\0\0\0\0\0\0\0"),
            (Command.DEVICE_FEATURE, b"\x80\0\0\0\6\0\2\0" + b"\0\x10" + bytes(14)),
            (Command.MIG_DATA_READ, b"\x10\0\0\0\x08\0\0\0"),
            (Command.MIG_DATA_WRITE, b"\x10\0\0\0\x04\0\0\0abcd"),
            (Command.DEVICE_RESET, b""),
        ]
        whole = [sample.message(command, body) for command, body in valid]
    fd = os.eventfd(0)
    for _ in range(40):
        with served.connect() as client:
            client.negotiate(twin_socket=rng.random() < 0.2)
            client.main.sock.settimeout(5)
            try:
                for _ in range(15):
                    data = bytearray(rng.choice(whole))
                    for _ in range(rng.choice((0, 1, 1, 2, 5))):
                        # Sizes stay plausible most of the time, so that bodies get mutated and not only drained.
                        at = rng.randrange(len(data)) if rng.random() < 0.05 else rng.randrange(8, max(len(data), 9))
                        if at < len(data):
                            data[at] = rng.choice((0, 1, 2, 4, 0x7F, 0x80, 0xFF, rng.randrange(256)))
                    client.main.send(bytes(data), [fd] * rng.choice((0, 0, 0, 1, 2)))
                    if rng.random() < 0.2:
                        client.main.send(client.message(Command.DEVICE_RESET)[: rng.randrange(16)])
                        break
            except (BrokenPipeError, ConnectionResetError):
                pass
    os.close(fd)
    with served.connect() as client:
        client.negotiate()
        enable(client)
        client.reset()
        assert client.state() == wire.DeviceState.RUNNING
        assert client.info().num_regions == 9
    assert fds_settle(before)
    assert toy.errors == 0


def test_a_client_that_stops_reading_does_not_hold_up_stop(tmp_path: Path) -> None:
    toy, server = Toy(), Server()
    server.add(toy, tmp_path / "toy.sock")
    with server, Client.connect(tmp_path / "toy.sock") as client:
        client.negotiate()
        client.main.sock.setblocking(False)
        data = b"".join(client.message(Command.REGION_READ, bytes(8) + b"\7\0\0\0\0\x10\0\0") for _ in range(100))
        with pytest.raises(BlockingIOError):
            for _ in range(10_000):  # 200 MiB of requests are more than any socket's buffer holds
                client.main.sock.send(data)
        server.stop()  # would hang forever if the send could not be interrupted
    toy.close()


# ---- sockets ---------------------------------------------------------------------------------------


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "toy.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    toy, server = Toy(), Server()
    server.add(toy, path)
    with server, Client.connect(path) as client:
        client.negotiate()
    toy.close()


def test_a_live_socket_is_refused_by_name(served: Served) -> None:
    with pytest.raises(ConfigError, match=r"'toy' is being served already"):
        Server().add(served.toy, served.path)
    with served.connect() as client:
        client.negotiate()


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "toy.sock"
    path.write_text("precious")
    toy = Toy()
    with pytest.raises(ConfigError, match="not a socket"):
        Server().add(toy, path)
    assert path.read_text() == "precious"
    for bad in (tmp_path / "nowhere" / "x.sock", tmp_path / ("x" * 120)):
        with pytest.raises(ConfigError):
            Server().add(toy, bad)
    toy.close()


def test_error_replies_are_header_only(client: Client) -> None:
    client.main.send(client.message(Command.DEVICE_GET_INFO, b"bad", id=77))
    import time

    message = client.main.receive(time.monotonic() + patience(5))
    assert (message.id, message.command, message.payload) == (77, Command.DEVICE_GET_INFO, b"")
    assert message.flags == HeaderFlags.REPLY | HeaderFlags.ERROR
    assert message.error == errno.EINVAL
