"""The client against a server that never comes to an end: each wait of the client's does."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.waiting import meanwhile
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.testing.nvme import FLUSH, NvmeDriver, Pair
from vmodel.vfio_user import client as module
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Command, HeaderFlags


@pytest.fixture
def ends() -> Iterator[tuple[Client, socket.socket]]:
    """A client with little patience, and the server's end of its connection."""
    ours, theirs = socket.socketpair()
    with Client(ours, timeout=0.2) as client, theirs:
        yield client, theirs


def test_commands_without_end(ends: tuple[Client, socket.socket]) -> None:
    """There is always one more to answer."""
    client, server = ends
    payload = wire.DmaAccess.build({"address": 1 << 40, "count": 4, "data": b""})
    head = {"id": 1, "command": Command.DMA_READ, "size": 16 + len(payload), "flags": 0, "error": 0}
    command = wire.Header.build(head) + payload

    def send() -> None:
        with contextlib.suppress(OSError):
            server.sendall(64 * command)

    def drop_answers() -> None:
        with contextlib.suppress(OSError):
            server.recv(1 << 16)

    with meanwhile(send, drop_answers):
        with pytest.raises(TimeoutError):
            client.reply(7)
        client.serve(0.1)
        client.close()


def test_a_state_without_end(ends: tuple[Client, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = ends
    monkeypatch.setattr(module, "MAX_STATE", 4096)

    def more() -> None:
        with contextlib.suppress(OSError, struct.error):
            request = server.recv(1 << 16)
            id, command = struct.unpack_from("<HH", request)
            payload = struct.pack("<II", 8 + 64, 64) + bytes(64)
            server.sendall(struct.pack("<HHIII", id, command, 16 + len(payload), HeaderFlags.REPLY, 0) + payload)

    with meanwhile(more):
        with pytest.raises(OSError) as caught:
            client.migration_read(64)
        client.close()
    assert caught.value.errno == errno.EFBIG


class Looping:
    """Stands in for a client: the list of capabilities of its device points to itself."""

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        config = bytearray(count)
        config[0x34] = 0x40
        config[0x40:0x42] = b"\x05\x40"
        return bytes(config)


def test_a_list_of_capabilities_that_is_a_loop() -> None:
    driver = object.__new__(NvmeDriver)
    driver.client = Looping()  # type: ignore[assignment]
    with pytest.raises(OSError, match="a loop"):
        driver._vectors()


class Interrupted(NvmeDriver):
    """A driver whose queue is interrupted as often as it waits, and gets no completion."""

    def __init__(self) -> None:
        self.client = SimpleNamespace(timeout=0.1)  # type: ignore[assignment]
        self.ram = SimpleNamespace(view=memoryview(bytearray(8192)))  # type: ignore[assignment]
        self._cid = 0

    def _write32(self, offset: int, value: int) -> None:
        pass

    def wait(self, pair: Pair, seconds: float) -> None:
        pass


def test_interrupts_without_a_completion() -> None:
    pair = Pair(1, 16, 0, 4096, None, None)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match="but no completion"):
        Interrupted().send(pair, NvmeCommand.make(FLUSH, nsid=1))
