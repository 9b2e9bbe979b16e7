"""VERSION, and what comes before it."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from tests.proto.conftest import Served
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import DEFAULT_CAPABILITIES, Client, Closed
from vmodel.vfio_user.wire import Command


def test_capabilities(raw: Client) -> None:
    assert raw.negotiate() == {
        "max_msg_fds": 8,
        "max_data_xfer_size": 1 << 20,
        "max_dma_maps": 65535,
        "pgsizes": 4096,
        "write_multiple": True,
    }


def test_the_answer_is_a_subset_of_what_was_offered(raw: Client) -> None:
    nothing = dict.fromkeys(DEFAULT_CAPABILITIES)
    assert raw.negotiate(**{**nothing, "max_msg_fds": 1}) == {"max_msg_fds": 1}
    assert raw.info().num_regions == 9


@pytest.mark.parametrize(
    ("offered", "answered"),
    [
        ({"max_msg_fds": 1000}, {"max_msg_fds": 16}),
        ({"max_data_xfer_size": 4096}, {"max_data_xfer_size": 4096}),
        ({"max_data_xfer_size": 2**32 - 1}, {"max_data_xfer_size": 1 << 20}),
        ({"max_dma_maps": 7}, {"max_dma_maps": 7}),
        ({"max_dma_maps": 2**64 - 1}, {"max_dma_maps": 65535}),
        ({"pgsizes": 0x201000}, {"pgsizes": 0x1000}),
        ({"pgsizes": 0x200000}, {"pgsizes": 0x200000}),
        ({"write_multiple": False}, {}),
    ],
)
def test_no_value_is_above_the_clients_own(raw: Client, offered: dict[str, Any], answered: dict[str, Any]) -> None:
    nothing = dict.fromkeys(DEFAULT_CAPABILITIES)
    assert raw.negotiate(**{**nothing, **offered}) == answered


def test_no_data_at_all(raw: Client) -> None:
    reply = raw.request(Command.VERSION, b"\0\0\0\0")
    assert wire.Version.parse(reply.payload).major == 0
    assert raw.info().num_irqs == 5


def test_a_newer_minor_version(raw: Client) -> None:
    assert raw.request(Command.VERSION, b"\0\0\x09\0").payload[:4] == b"\0\0\0\0"


def test_the_reply_is_no_longer_than_qemus_request(raw: Client) -> None:
    text = json.dumps({"capabilities": DEFAULT_CAPABILITIES}).encode() + b"\0"
    reply = raw.request(Command.VERSION, b"\0\0\0\0" + text)
    assert len(reply.payload) <= 4 + len(text)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        b"\x01\0\0\0",
        b"\0\0\0\0{}",
        b"\0\0\0\0{\0",
        b"\0\0\0\0[]\0",
        b"\0\0\0\0\xff\xfe\0",
        b'\0\0\0\0{"capabilities":3}\0',
        b"\0\0\0\0" + b"[" * 50000 + b"\0",
        *(
            b"\0\0\0\0" + json.dumps({"capabilities": bad}).encode() + b"\0"
            for bad in (
                {"max_msg_fds": -1},
                {"max_msg_fds": True},
                {"max_msg_fds": "8"},
                {"max_data_xfer_size": 0},
                {"max_data_xfer_size": 1 << 32},
                {"pgsizes": 0},
                {"pgsizes": 0x200},
                {"write_multiple": 1},
                {"twin_socket": True},
                {"twin_socket": {"supported": "yes"}},
            )
        ),
    ],
)
def test_a_broken_handshake_is_an_error_reply_and_a_close(served: Served, payload: bytes) -> None:
    with served.connect() as client:
        with pytest.raises(OSError) as caught:
            client.request(Command.VERSION, payload)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(Closed):
            client.reply(0)
    with served.connect() as client:
        client.negotiate()


@pytest.mark.parametrize("command", [c for c in Command if c != Command.VERSION])
def test_nothing_goes_before_version(served: Served, command: int) -> None:
    with served.connect() as client:
        with pytest.raises(OSError) as caught:
            client.request(command, bytes(32))
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(Closed):
            client.reply(0)


def test_version_twice(client: Client) -> None:
    with pytest.raises(OSError) as caught:
        client.negotiate()
    assert caught.value.errno == errno.EINVAL
    assert client.info().num_regions == 9


def test_twin_socket(raw: Client) -> None:
    capabilities: dict[str, Any] = raw.negotiate(twin_socket=True)
    assert capabilities["twin_socket"] == {"supported": True, "fd_index": 0}
    assert raw.twin is not None
