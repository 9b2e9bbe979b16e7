"""Messages whole, cut anywhere, and many in one piece: what the server does must not depend on it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.proto.conftest import Served, enable, fds_settle, open_fds
from tests.proto.messages import REQUESTS, Request
from vmodel.patience import patience
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import Client, Message
from vmodel.vfio_user.wire import Command, HeaderFlags


@pytest.fixture
def files() -> Iterator[dict[Command, int]]:
    """What to send where an fd is wanted."""
    memory = os.memfd_create("ram")
    os.ftruncate(memory, 0x10000)
    event = os.eventfd(0)
    yield {Command.DMA_MAP: memory, Command.DEVICE_SET_IRQS: event}
    os.close(memory)
    os.close(event)


def fds_of(request: Request, files: dict[Command, int]) -> list[int]:
    return [files[request.command]] * request.fds if request.fds else []


def undo(client: Client, request: Request) -> None:
    """So that the same request succeeds again."""
    if request.command == Command.DMA_MAP:
        client.unmap_dma(0, 0, everything=True)
    elif request.name == "log":
        client.dirty_stop()
    elif request.name == "log no more":
        client.dirty_start()


def prepare(client: Client, request: Request) -> None:
    """Whatever has to be so for a request to succeed."""
    if request.name in ("report", "log no more"):
        client.dirty_start()
    elif request.name == "read state":
        client.set_state(wire.DeviceState.STOP_COPY)
    elif request.name == "write state":
        client.set_state(wire.DeviceState.RESUMING)


def replied(client: Client, id: int, request: Request) -> Message:
    message = client.reply(id)
    assert (message.id, message.command, message.flags, message.error) == (id, request.command, HeaderFlags.REPLY, 0)
    message.close()
    return message


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.name)
def test_split_at_every_byte(served: Served, files: dict[Command, int], request_: Request) -> None:
    """Two pieces, the fds with the first byte; the reply is that to the whole."""
    with served.connect() as client:
        client.negotiate()
        prepare(client, request_)
        data = client.message(request_.command, request_.payload, id=0xABCD)
        cuts = range(1, len(data)) if len(data) < 100 else [*range(1, 40), len(data) // 2, len(data) - 1]
        expected: Message | None = None
        for cut in [len(data), *cuts]:
            client.main.send(data[:cut], fds_of(request_, files))
            if data[cut:]:
                client.main.send(data[cut:])
            message = replied(client, 0xABCD, request_)
            if request_.command not in (Command.REGION_READ, Command.MIG_DATA_READ):  # what these give may change
                expected = expected or message
                assert message.payload == expected.payload
            undo(client, request_)


def test_a_message_in_pieces_is_not_answered_early(client: Client) -> None:
    data = client.message(Command.DEVICE_RESET, id=5)
    client.main.send(data[:-1])
    with pytest.raises(TimeoutError):
        client.main.receive(time.monotonic() + 0.1)
    client.main.send(data[-1:])
    assert client.reply(5).command == Command.DEVICE_RESET


def send_at_once(client: Client, messages: Sequence[bytes], fds: list[int]) -> None:
    if fds:
        socket.send_fds(client.main.sock, [b"".join(messages)], fds)
    else:
        client.main.send(b"".join(messages))


def test_all_commands_in_one_sendmsg(served: Served) -> None:
    """Answered in order; ids are the sender's, so they may repeat."""
    before = open_fds()
    with served.connect() as client:
        client.negotiate()
        plain = [request for request in REQUESTS if not request.fds]
        for _ in range(5):
            send_at_once(client, [client.message(r.command, r.payload, id=n // 2) for n, r in enumerate(plain)], [])
            for n, request in enumerate(plain):
                message = client.main.receive(time.monotonic() + patience(5))
                message.close()
                assert (message.id, message.command) == (n // 2, request.command)
                assert message.flags == HeaderFlags.REPLY, request.name
            client.unmap_dma(0, 0, everything=True)
    assert fds_settle(before + 1)  # the doorbell's eventfd is made when first asked for, and then kept


@pytest.mark.parametrize("request_", [r for r in REQUESTS if r.fds], ids=lambda r: r.name)
@pytest.mark.parametrize("at", [0, 1, 5])
def test_fds_in_the_midst_of_others(client: Client, files: dict[Command, int], request_: Request, at: int) -> None:
    """One sendmsg with one message that takes fds among five that do not."""
    messages = [client.message(Command.DEVICE_RESET, id=n) for n in range(5)]
    messages.insert(at, client.message(request_.command, request_.payload, id=99))
    send_at_once(client, messages, fds_of(request_, files))
    for n in range(5):
        client.reply(n)
    replied(client, 99, request_)


def test_posted_commands_are_done_before_the_next_reply(served: Served, files: dict[Command, int]) -> None:
    """Section "Command Concurrency"; and No_reply is honoured by every command."""
    with served.connect() as client:
        client.negotiate()
        for request in REQUESTS:
            client.post(request.command, request.payload, fds_of(request, files))
        enable(client)
        client.region_write(0, 0, b"\x44\x33\x22\x11", posted=True)
        assert client.region_read(0, 0, 4) == b"\x44\x33\x22\x11"
        assert client.state() == wire.DeviceState.RUNNING
        with pytest.raises(TimeoutError):
            client.main.receive(time.monotonic() + 0.1)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.name)
def test_errors_are_header_only_and_the_stream_lives_on(client: Client, request_: Request) -> None:
    """Each request, cut short but well framed: an error, its body gone; posted: nothing at all."""
    payload = request_.payload[:7] if request_.command == Command.DEVICE_FEATURE else request_.payload[:-1]
    if not request_.payload:
        payload = b"x"
    client.post(request_.command, payload)
    client.main.send(client.message(request_.command, payload, id=7))
    message = client.main.receive(time.monotonic() + patience(5))
    assert (message.id, message.command, message.payload, message.fds) == (7, request_.command, b"", ())
    assert message.flags == HeaderFlags.REPLY | HeaderFlags.ERROR
    assert message.error == 22
    assert client.info().num_regions == 9
