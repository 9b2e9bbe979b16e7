"""Mutated messages, thousands of them.

Whatever is sent: a reply that is one, or a clean close.  And then the server serves the next client, no thread
has died (`served` looks), and the process has as many fds as before.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.proto.conftest import Served, fds_settle, open_fds
from tests.proto.messages import REQUESTS, Request
from tests.proto.toy import Toy
from vmodel.patience import patience
from vmodel.server import Server
from vmodel.vfio_user.client import Client, Closed, Message
from vmodel.vfio_user.wire import Command, DeviceState, HeaderFlags

INTERESTING = (0, 1, 2, 3, 4, 7, 8, 0x0F, 0x10, 0x20, 0x7F, 0x80, 0xFE, 0xFF)


def judge(message: Message) -> None:
    """Whether a message from the server is one that the specification allows."""
    message.close()
    kind = message.flags & HeaderFlags.TYPE
    if kind == HeaderFlags.COMMAND:
        assert message.command in (Command.DMA_READ, Command.DMA_WRITE), message
        return
    assert kind == HeaderFlags.REPLY, message
    assert not message.flags & ~int(HeaderFlags.TYPE | HeaderFlags.ERROR), message
    if message.flags & HeaderFlags.ERROR:
        assert (message.payload, message.fds) == (b"", ()), message
        assert message.error in range(1, 134), message
    else:
        assert message.error == 0, message


def converse(client: Client, pieces: Sequence[bytes], fds: Sequence[int]) -> int:
    """Sends all that, then nothing more; reads until the server closes.  How many messages came."""
    try:
        for n, piece in enumerate(pieces):
            client.main.send(piece, fds if n == 0 else ())
        client.main.sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        assert not isinstance(error, TimeoutError), "the server has stopped reading"
    received, end = 0, time.monotonic() + patience(60)
    with suppress(Closed):
        while True:
            judge(client.main.receive(time.monotonic() + patience(5)))
            received += 1
            assert time.monotonic() < end, "the server does not stop sending"
    return received


def well(served: Served) -> None:
    """The next client finds everything in order."""
    with served.connect() as client:
        client.negotiate()
        client.reset()
        assert client.state() == DeviceState.RUNNING
        assert client.info().num_regions == 9
        assert len(served.toy.memory) == 0
        for kind in served.toy.backend.irqs.types.values():
            assert all(vector.trigger < 0 for vector in kind.vectors)


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error of ours or the model's: a guest's faults are not, nor is the toy's own bug."""
    found = [record for record in caplog.records if record.levelno >= logging.ERROR]
    return [r.getMessage() for r in found if not (r.exc_info and "a bug of the model's" in str(r.exc_info[1]))]


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all examples of Hypothesis."""
    path = tmp_path_factory.mktemp("toy") / "toy.sock"
    toy, server = Toy(), Server()
    server.add(toy, path)
    with server:
        yield Served(toy, path)
    toy.close()


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed; a piece cut off or put on."""
    changed = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
        # Sizes stay right most of the time: otherwise bodies would only ever be drained.
        at = rng.randrange(len(changed)) if rng.random() < 0.1 else rng.randrange(8, max(len(changed), 9))
        if at < len(changed):
            changed[at] = rng.choice((*INTERESTING, rng.randrange(256)))
    if rng.random() < 0.15 and len(changed) > 16:
        cut = rng.randrange(16, len(changed) + 1)
        extra = bytes(rng.choice(INTERESTING) for _ in range(rng.choice((0, 1, 4, 24))))
        changed = changed[:cut] + extra
        struct.pack_into("<I", changed, 4, len(changed))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(10))
def test_random_conversations(served: Served, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """1,500 messages a seed; each reply is read and judged."""
    rng = random.Random(seed)
    served.toy.backend.io_event_fds(0)  # made when first asked for, and then kept
    memory, event = os.memfd_create("ram"), os.eventfd(0)
    os.ftruncate(memory, 0x100000)
    before, received = open_fds(), 0
    for _ in range(60):
        with served.connect() as client:
            client.negotiate(max_msg_fds=rng.choice((0, 1, 8)))
            chosen = rng.choices(REQUESTS, k=25)
            pieces = [mutate(rng, client.message(r.command, r.payload)) for r in chosen]
            if rng.random() < 0.3:
                pieces = [b"".join(pieces)]
            fds = [rng.choice((memory, event)) for _ in range(rng.choice((0, 0, 1, 2, 9, 17)))]
            received += converse(client, pieces, fds)
    assert received > 800  # else the mutations were so wild that little was tested
    well(served)
    assert fds_settle(before)
    assert bugs(caplog) == []
    os.close(memory)
    os.close(event)


@pytest.mark.parametrize("seed", range(4))
def test_random_handshakes(served: Served, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    text = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536,"twin_socket":{"supported":true}}}\0'
    before = open_fds()
    for _ in range(100):
        with served.connect() as client:
            hello = mutate(rng, client.message(Command.VERSION, bytes(4) + text))
            converse(client, [hello, client.message(Command.DEVICE_RESET)], ())
    well(served)
    assert fds_settle(before)
    assert bugs(caplog) == []


CHANGES = st.lists(st.tuples(st.integers(0, 400), st.sampled_from(INTERESTING)), max_size=4)
FLAGS = st.sampled_from((0, int(HeaderFlags.NO_REPLY), int(HeaderFlags.REPLY)))


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.tuples(st.sampled_from(REQUESTS), CHANGES, FLAGS), min_size=1, max_size=10))
def test_each_command_has_one_reply(lasting: Served, data: list[tuple[Request, list[tuple[int, int]], int]]) -> None:
    """Bodies mutated, headers right: each command that is not posted has exactly one reply, in order."""
    with lasting.connect() as client:
        client.negotiate()
        pieces, expected = [], []
        for n, (request, changes, flags) in enumerate(data):
            body = bytearray(request.payload)
            for at, value in changes:
                if body:
                    body[at % len(body)] = value
            pieces.append(client.message(request.command, bytes(body), id=n, flags=flags))
            if not flags:
                expected.append((n, request.command))
        client.main.send(b"".join(pieces) + client.message(Command.DEVICE_GET_IRQ_INFO, b"", id=0xFFFF))
        got, end = [], time.monotonic() + patience(60)
        while True:
            assert time.monotonic() < end, "the server does not stop sending"
            message = client.main.receive(time.monotonic() + patience(5))
            judge(message)
            if message.id == 0xFFFF and message.command == Command.DEVICE_GET_IRQ_INFO:
                break
            if message.flags & HeaderFlags.TYPE == HeaderFlags.REPLY:
                got.append((message.id, message.command))
        assert got == expected
        client.reset()
