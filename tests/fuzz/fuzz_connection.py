"""Feeds the framing and the command parser whatever Atheris (libFuzzer) comes up with.

An input is a byte of choices, then messages: raw bytes, or a plausible header with a raw payload.  What must never
happen is a crash, an exception, a reply that is malformed, or an fd that stays open.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmodel"]):
    from tests.proto.toy import Toy
    from vmodel.server import Connection
    from vmodel.vfio_user import wire
    from vmodel.vfio_user.commands import Limits

from tests.fuzz.harness import fuzz

COMMANDS = [int(command) for command in wire.Command]
VERSION = wire.Header.build({"id": 1, "command": 1, "size": 20, "flags": 0, "error": 0}) + bytes(4)

toy = Toy()
toy.backend.io_event_fds(0)
memfd = os.memfd_create("fuzz")
os.ftruncate(memfd, 8192)
eventfd = os.eventfd(0)


def open_fds() -> int:
    """How many fds this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def messages(provider: atheris.FuzzedDataProvider) -> list[tuple[bytes, list[int]]]:
    """What to send, with which fds."""
    found = []
    while provider.remaining_bytes() and len(found) < 16:
        fds = [memfd, eventfd][: provider.ConsumeIntInRange(0, 2)]
        payload = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 80))
        if provider.ConsumeBool():
            command = provider.PickValueInList(COMMANDS)
            head = {"id": 1, "command": command, "size": 16 + len(payload), "error": 0}
            head["flags"] = provider.PickValueInList([0, 0, 0, 0x10, 1])
            payload = wire.Header.build(head) + payload
        if payload:
            found.append((payload, fds))
    return found


def drain(sock: socket.socket) -> None:
    """Reads all that the server says; every message of it must be whole, error replies a header only."""
    stream = b""
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 16)
        except ConnectionResetError:
            return  # closed with messages of ours unread: what came before may be cut off, too
        for fd in fds:
            os.close(fd)
        if not data:
            break
        stream += data
    while stream:
        header = wire.Header.parse(stream)
        assert 16 <= header.size <= len(stream), "a reply that is cut off"
        if header.flags & 15 == 1 and header.flags & 0x20:
            assert header.size == 16, "an error reply with a payload"
        stream = stream[header.size :]


def one_input(data: bytes) -> None:
    """One connection."""
    provider = atheris.FuzzedDataProvider(data)
    before = open_fds()
    client, server = socket.socketpair()
    handshake = provider.ConsumeIntInRange(0, 7)
    with client:
        if handshake:
            client.sendall(VERSION)
        with contextlib.suppress(BrokenPipeError):
            for payload, fds in messages(provider):
                socket.send_fds(client, [payload], fds)
        client.shutdown(socket.SHUT_WR)
        reader = threading.Thread(target=drain, args=(client,))
        reader.start()
        connection = Connection(toy.backend, server, Limits())
        connection.serve(threading.Event())
        connection.close()
        server.close()
        reader.join(20)
        assert not reader.is_alive(), "the connection did not end"
    assert open_fds() == before, "an fd was left open"


if __name__ == "__main__":
    fuzz(one_input)
