"""What a running server's control socket makes of its clients."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmodel import control
from vmodel.control import Control, ask
from vmodel.errors import ConfigError
from vmodel.patience import patience


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """The socket of one with two commands."""

    def fails(_: object) -> None:
        raise RuntimeError("no luck")

    with Control(tmp_path, "m", {"echo": lambda request: request.get("what"), "fails": fails}) as running:
        yield running.path
    assert not (tmp_path / "m.control").exists()


def raw(path: Path, data: bytes, end: bool = True) -> bytes:
    """The answer to some bytes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        answer = b""
        # It may hang up on what it has not read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                answer += piece
        return answer


def test_ask(server: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(server, "echo", what={"é": [1]}) == {"é": [1]}
    for command, said in (("nix", "unknown request: known are echo, fails"), ("fails", "RuntimeError: no luck")):
        with pytest.raises(ConfigError, match=f"^the server in {server.parent}: {said}$"):
            ask(server, command)
    assert "control: fails failed" in caplog.text  # with its traceback: it is a bug
    assert oct(server.stat().st_mode & 0o777) == "0o600"


NO_SUCH = {"error": "unknown request: known are echo, fails"}


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\n",
        b"\0\xff\xfe\n",
        b"{\n",
        b"[]\n",
        b'"echo"\n',
        b"1\n",
        b"null\n",
        b"{}\n",
        b'{"command": ["echo"]}\n',
        b'{"command": {}}\n',
        b'{"command": null}\n',
        b'{"command": "' + b"x" * 60000 + b'"}\n',
        b"[" * 60000 + b"\n",
        b"9" * 6000 + b"\n",
        b'{"command": "echo"',
    ],
)
def test_garbage(server: Path, request_: bytes) -> None:
    assert json.loads(raw(server, request_)) == NO_SUCH
    assert ask(server, "echo", what=1) == 1


def test_requests_without_end(server: Path) -> None:
    """64 KiB without the end of a line are refused; what follows is not read."""
    answer = raw(server, b" " * (4 << 20), end=False)
    assert not answer or json.loads(answer) == NO_SUCH
    assert ask(server, "echo", what=1) == 1


def test_two_requests_in_one_go(server: Path) -> None:
    assert raw(server, b'{"command": "echo", "what": 1}\n{"command": "echo", "what": 2}\n') == b'{"result": 1}\n'


def test_silent_clients_block_nobody(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(control._MAX_CLIENTS - 1):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(server))
            sock.sendall(b"{" * (n % 2))
        start = time.monotonic()
        assert ask(server, "echo", what=1) == 1
        assert time.monotonic() - start < patience(2)


def test_a_crowd_of_silent_clients_is_sent_away(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that send a byte now and then."""
    monkeypatch.setattr(control, "_TIMEOUT", 0.5)
    stop = threading.Event()

    def dribble(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                sock.sendall(b" ")

    with contextlib.ExitStack() as stack:
        for n in range(control._MAX_CLIENTS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(server))
            if n % 2:
                thread = threading.Thread(target=dribble, args=(sock,))
                thread.start()
                stack.callback(thread.join)
        stack.callback(stop.set)
        answer = raw(server, b'{"command": "echo", "what": 1}\n')
    assert answer == b'{"result": 1}\n'


def test_silent_clients_give_way(server: Path) -> None:
    """However many they are, the next request is served at once: before, sixteen of them held all places for 5 s."""
    with contextlib.ExitStack() as stack:
        for _ in range(6 * control._MAX_CLIENTS):
            control._connect(stack.enter_context(socket.socket(socket.AF_UNIX)), server)
        assert ask(server, "echo", what=1) == 1


def test_an_answer_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that arrives byte by byte takes no longer than a silent one; one that is too long takes no memory."""
    monkeypatch.setattr(control, "_TIMEOUT", 0.5)
    monkeypatch.setattr(control, "_MAX_ANSWER", 1000)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "m.control"))
        listener.listen()
        for pause, expected in ((0.1, "timed out"), (0.0, "more than 1000 bytes")):
            stop = threading.Event()

            def server(stop: threading.Event = stop, pause: float = pause) -> None:
                with contextlib.suppress(OSError), listener.accept()[0] as sock:
                    while not stop.wait(pause):
                        sock.sendall(b" ")

            thread = threading.Thread(target=server)
            thread.start()
            with pytest.raises(ConfigError, match=expected):
                ask(tmp_path / "m.control", "echo")
            stop.set()
            thread.join()


def test_it_ends_while_clients_are_there(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with Control(tmp_path, "m", {}) as running:
            for _ in range(control._MAX_CLIENTS + 2):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(str(running.path))
            start = time.monotonic()
        assert time.monotonic() - start < patience(2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vmodel-control")]


@pytest.mark.parametrize(
    "answer", [b"", b"\xff\n", b"[]\n", b"1\n", b"{}\n", b'"error"\n', b"null\n", b"[" * 100_000, None]
)
def test_servers_that_are_none(tmp_path: Path, answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: it says nothing at all."""
    monkeypatch.setattr(control, "_TIMEOUT", 0.5)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "m.control"))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                if answer is None:
                    time.sleep(1)
                else:
                    sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConfigError, match=f"^the server in {tmp_path} does not answer: [^\n]+$"):
            ask(tmp_path / "m.control", "iommu")
        thread.join()


def test_control_survives_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 3
    plain = threading.Thread.start

    def start(self: threading.Thread) -> None:
        nonlocal left
        if self.name == "vmodel-control-client" and left:
            left -= 1
            raise RuntimeError("can't start new thread")
        plain(self)

    with Control(tmp_path, "m", {"yes": lambda _: 1}):
        monkeypatch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect(str(tmp_path / "m.control"))
                assert sock.recv(1) == b""  # dropped, nothing else
        assert ask(tmp_path / "m.control", "yes") == 1
    assert left == 0


def test_a_command_that_does_not_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()
    with socket.socket(socket.AF_UNIX) as sock:
        with Control(tmp_path, "m", {"stuck": lambda _: over.wait()}):
            sock.connect(str(tmp_path / "m.control"))
            sock.sendall(json.dumps({"command": "stuck"}).encode() + b"\n")
            time.sleep(0.2)
            began = time.monotonic()
        assert time.monotonic() - began < 10
    assert "control: abandoned" in caplog.text
    over.set()
