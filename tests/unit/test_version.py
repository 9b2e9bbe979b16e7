"""VERSION: section by section of the specification, wrong sizes first."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.unit.backend import Device, call, greeting, hello, open_fds
from vmodel.errors import PeerError
from vmodel.vfio_user.commands import HandshakeError, Limits, Session
from vmodel.vfio_user.wire import Command


@pytest.fixture
def device() -> Iterator[Device]:
    with closing(Device()) as device:
        yield device


@pytest.fixture
def session(device: Device) -> Iterator[Session]:
    """A session whose handshake is done."""
    with closing(Session(device)) as session:
        hello(session, {"max_msg_fds": 8})
        yield session


# ---- VERSION -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", bytes(1), bytes(3)])
def test_version_too_short(device: Device, payload: bytes) -> None:
    with pytest.raises(HandshakeError) as caught:
        call(Session(device), Command.VERSION, payload)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("major", [1, 0xFFFF])
def test_another_major_version(device: Device, major: int) -> None:
    with pytest.raises(HandshakeError):
        call(Session(device), Command.VERSION, greeting({}, major))


@pytest.mark.parametrize("minor", [0, 1, 0xFFFF])
def test_the_minor_version_is_ours_at_most(device: Device, minor: int) -> None:
    assert call(Session(device), Command.VERSION, greeting({}, 0, minor)).payload[:4] == bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        b"{}",  # no NUL
        b"\0",
        b"{\0",
        b"{}\0{}\0",
        b"[]\0",
        b"3\0",
        b"null\0",
        b"\xff\0",
        b'{"capabilities":null}\0',
        b'{"capabilities":[]}\0',
        b'{"capabilities":{"max_msg_fds":' + b"9" * 5000 + b"}}\0",
        b"[" * 60000 + b"\0",
    ],
)
def test_broken_version_data(device: Device, data: bytes) -> None:
    session = Session(device)
    with pytest.raises(HandshakeError) as caught:
        call(session, Command.VERSION, bytes(4) + data)
    assert caught.value.errno == errno.EINVAL
    assert session.negotiated is None


@pytest.mark.parametrize("key", ["max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes"])
@pytest.mark.parametrize("value", [-1, 2**64, 1.0, 1.5, "1", True, None, [], {}])
def test_numbers_of_a_wrong_kind(device: Device, key: str, value: object) -> None:
    with pytest.raises(HandshakeError) as caught:
        call(Session(device), Command.VERSION, greeting({key: value}))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("bad", [{"write_multiple": 1}, {"twin_socket": True}, {"twin_socket": {"supported": 1}}])
def test_objects_of_a_wrong_kind(device: Device, bad: dict[str, Any]) -> None:
    with pytest.raises(HandshakeError) as caught:
        call(Session(device), Command.VERSION, greeting(bad))
    assert caught.value.errno == errno.EINVAL


def test_defaults_of_the_specification(device: Device) -> None:
    for payload in (bytes(4), bytes(4) + b"{}\0", greeting({})):
        session = Session(device)
        assert call(session, Command.VERSION, payload).payload == bytes(4) + b'{"capabilities":{}}\0'
        said = session.negotiated
        assert said is not None
        assert (said.max_msg_fds, said.max_data_xfer_size, said.max_dma_maps) == (1, 1 << 20, 65535)
        assert (said.pgsizes, said.write_multiple, said.twin) == (4096, False, False)


def test_unknown_capabilities_are_passed_over(device: Device) -> None:
    assert hello(Session(device), {"migration": {"pgsize": 4096}, "colour": "blue"}) == {}


@pytest.mark.parametrize("limit", ["max_msg_fds", "max_data_xfer_size", "max_dma_maps"])
def test_no_answer_is_above_the_clients_value_or_ours(device: Device, limit: str) -> None:
    ours = getattr(Limits(), limit)
    for theirs in (1, ours - 1, ours, ours + 1, 2**31 - 1):
        assert hello(Session(device), {limit: theirs}) == {limit: min(ours, theirs)}
    assert hello(Session(device, Limits(**{limit: 5})), {limit: 2**31 - 1}) == {limit: 5}


def test_sixteen_fds_at_most_whatever_our_limit(device: Device) -> None:
    assert hello(Session(device, Limits(max_msg_fds=100)), {"max_msg_fds": 100}) == {"max_msg_fds": 16}


@pytest.mark.parametrize(("offer", "answer"), [(True, {"write_multiple": True}), (False, {})])
def test_write_multiple(device: Device, offer: bool, answer: dict[str, bool]) -> None:
    session = Session(device)
    assert hello(session, {"write_multiple": offer}) == answer
    assert session.negotiated is not None
    assert session.negotiated.write_multiple is offer


def test_page_sizes(device: Device) -> None:
    assert hello(Session(device), {"pgsizes": 0x40201000}) == {"pgsizes": 0x1000}
    assert hello(Session(device), {"pgsizes": 0x40200200}) == {"pgsizes": 0x40200000}
    with pytest.raises(HandshakeError):
        call(Session(device), Command.VERSION, greeting({"pgsizes": 0x200}))


def test_qemus_request_gets_no_longer_answer(device: Device) -> None:
    # 214 bytes, as measured of QEMU 11.1.3; ours must fit into them with a twin socket, too.
    capabilities = {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20, "max_dma_maps": 65535, "pgsizes": 4096}
    request = greeting({**capabilities, "write_multiple": True, "twin_socket": {"supported": True}})
    with closing(Session(device)) as session:
        reply = call(session, Command.VERSION, request)
        for fd in reply.temporary:
            os.close(fd)
    assert b"twin_socket" in reply.payload
    assert len(reply.payload) <= 214


def test_a_twin_socket(device: Device) -> None:
    before = open_fds()
    with closing(Session(device)) as session:
        reply = call(session, Command.VERSION, greeting({"twin_socket": {"supported": True}}))
        assert json.loads(reply.payload[4:-1])["capabilities"]["twin_socket"] == {"supported": True, "fd_index": 0}
        assert len(reply.fds) == 1
        assert reply.temporary == reply.fds
        with socket.socket(fileno=session.take_twin()) as ours, socket.socket(fileno=reply.fds[0]) as theirs:
            ours.send(b"x")
            assert theirs.recv(1) == b"x"
        assert session.take_twin() == -1
    assert open_fds() == before


@pytest.mark.parametrize(
    ("limits", "offer"),
    [
        (Limits(twin_socket=False), {"twin_socket": {"supported": True}}),
        (Limits(), {"twin_socket": {"supported": False}}),
        (Limits(), {"twin_socket": {}}),
        (Limits(), {}),
        (Limits(), {"twin_socket": {"supported": True}, "max_msg_fds": 0}),
    ],
)
def test_no_twin_socket(device: Device, limits: Limits, offer: dict[str, Any]) -> None:
    session = Session(device, limits)
    assert "twin_socket" not in hello(session, offer)
    assert session.take_twin() == -1
    assert session.negotiated is not None
    assert not session.negotiated.twin


def test_out_of_fds_means_no_twin_socket(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    session = Session(device)
    monkeypatch.setattr(socket, "socketpair", fail)
    assert hello(session, {"twin_socket": {"supported": True}}) == {}
    assert session.negotiated is not None
    assert not session.negotiated.twin


def test_a_handshake_that_fails_late_leaves_no_fds(device: Device) -> None:
    before = open_fds()
    with closing(Session(device)) as session, pytest.raises(HandshakeError):
        call(session, Command.VERSION, greeting({"twin_socket": {"supported": True}, "pgsizes": 0x200}))
    assert open_fds() == before
    assert session.negotiated is None


@pytest.mark.parametrize("command", [0, *[c for c in Command if c != Command.VERSION], 0xFFFF])
def test_version_comes_first(device: Device, command: int) -> None:
    with pytest.raises(HandshakeError) as caught:
        call(Session(device), command, bytes(64))
    assert caught.value.errno == errno.EINVAL


def test_version_comes_once(session: Session) -> None:
    with pytest.raises(PeerError) as caught:
        call(session, Command.VERSION, greeting({}))
    assert caught.value.errno == errno.EINVAL
    assert not isinstance(caught.value, HandshakeError)  # the connection goes on
