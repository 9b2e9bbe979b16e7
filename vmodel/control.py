"""The control socket of a running server: each connection is one request and one answer, each a line of JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmodel.errors import ConfigError
from vmodel.logs import limited
from vmodel.patience import patience
from vmodel.server import BACKOFF, STOP_TIMEOUT, listen
from vmodel.threads import place

log = limited(__name__)

#: Largest request.
_MAX_REQUEST = 1024 * 1024
#: Seconds that a client has to send its request, and then to read the answer.
_TIMEOUT = 5.0
#: Largest answer that `ask` reads.
_MAX_ANSWER = 64 * 1024 * 1024
#: Clients that are served at a time.  One more takes the place of one that has not sent its request, or waits.
_MAX_CLIENTS = 16

#: Carries out a request: gets the whole request, returns data for JSON.
Command = Callable[[Mapping[str, Any]], Any]


def socket_of(run_dir: Path, machine: str) -> Path:
    """The path of the control socket of a machine's server."""
    return run_dir / f"{machine}.control"


class NoServer(ConfigError):
    """No server listens on a control socket, or it has ended."""


class Control:
    """Answers requests while entered as a context manager.

    Each client has a thread of its own; commands run one at a time, but for slow ones.
    """

    def __init__(
        self,
        run_dir: Path,
        machine: str,
        commands: Mapping[str, Command],
        slow: Mapping[str, Command] | None = None,
    ) -> None:
        """Binds the socket.  ConfigError: it cannot be bound, or another server has it.

        `slow`: commands that may wait, and so run while others do.
        """
        self.path = path = socket_of(run_dir, machine)
        self._commands = {**commands, **(slow or {})}
        self._slow = frozenset(slow or ())
        self._listener = listen(path, f"machine {machine!r}")
        self._listener.settimeout(None)
        self._listener.listen(64)  # a connect() with a timeout fails at once if the backlog is full
        self._inode = path.lstat().st_ino
        self._free = threading.BoundedSemaphore(_MAX_CLIENTS)
        self._stopping = threading.Event()
        self._one = threading.Lock()
        self._clients: dict[threading.Thread, socket.socket] = {}
        #: Those that have not sent their request yet; the oldest is first.
        self._silent: dict[socket.socket, None] = {}
        self._thread = threading.Thread(target=self._main, name="vmodel-control", daemon=True)

    def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                self._accept()
            except Exception as error:  # out of fds, threads or memory
                if not self._stopping.is_set():
                    log.warning("control: %s", error)
                    self._stopping.wait(BACKOFF)

    def _accept(self) -> None:
        """Waits for a client and starts its thread."""
        with contextlib.ExitStack() as failed:
            sock = failed.enter_context(self._listener.accept()[0])
            if not self._free.acquire(blocking=False):
                self._drop_silent()
                self._free.acquire()
            failed.callback(self._free.release)
            self._silent[sock] = None
            failed.callback(self._silent.pop, sock, None)
            client = threading.Thread(target=self._client, args=(sock,), name="vmodel-control-client", daemon=True)
            self._clients = {thread: other for thread, other in self._clients.items() if thread.is_alive()}
            client.start()
            self._clients[client] = sock
            failed.pop_all()

    def _drop_silent(self) -> None:
        """Disconnects the client that has kept a place for the longest time without a request."""
        for sock in list(self._silent)[:1]:
            with contextlib.suppress(OSError):  # closed already
                sock.shutdown(socket.SHUT_RDWR)

    def _client(self, sock: socket.socket) -> None:
        try:
            with sock:
                try:
                    request = _receive(sock, _MAX_REQUEST, b"\n")
                finally:
                    self._silent.pop(sock, None)
                answer = json.dumps(self._reply(request)) + "\n"
                sock.settimeout(patience(_TIMEOUT))
                sock.sendall(answer.encode())
        except Exception as error:
            log.info("control: %s", error)
        finally:
            self._free.release()

    def _reply(self, text: bytes) -> dict[str, Any]:
        try:
            request = json.loads(text)
            command = self._commands[request["command"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": f"unknown request: known are {', '.join(self._commands)}"}
        try:
            with contextlib.nullcontext() if request["command"] in self._slow else self._one:
                return {"result": command(request)}
        except ConfigError as error:
            return {"error": str(error)}
        except Exception as error:
            log.exception("control: %s failed", request["command"])
            return {"error": f"{type(error).__name__}: {error}"}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        # shutdown() wakes accept(); close() alone does not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        # Waits for all clients' threads to end: the objects that their commands read may be closed next.
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._disconnect_all()
            self._thread.join(0.05)
        self._disconnect_all()
        for thread in [self._thread, *self._clients]:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                log.error("control: abandoned: a command does not return, it is in %s", place(thread.ident))
        with contextlib.suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()

    def _disconnect_all(self) -> None:
        for sock in list(self._clients.values()):
            with contextlib.suppress(OSError):  # closed already
                sock.shutdown(socket.SHUT_RDWR)


def _receive(sock: socket.socket, most: int, end: bytes | None = None, seconds: float = _TIMEOUT) -> bytes:
    """Reads up to `end`, or to the end of the stream.  OSError: it does not arrive in time, or is over `most` bytes."""
    data, deadline = bytearray(), time.monotonic() + patience(seconds)
    while end is None or end not in data:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = sock.recv(min(64 * 1024, most + 1 - len(data)))
        if not piece:
            break
        data += piece
        if len(data) > most:
            raise OSError(errno.EMSGSIZE, f"a message of more than {most} bytes")
    return bytes(data if end is None else data.partition(end)[0])


def _connect(sock: socket.socket, path: Path) -> None:
    """Connects, within the time that `sock` has afterwards.  OSError."""
    deadline = time.monotonic() + patience(_TIMEOUT)
    sock.settimeout(patience(_TIMEOUT))
    while True:
        try:
            return sock.connect(str(path))
        except BlockingIOError:  # so many connect at once that the server's backlog is full
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


def ask(path: Path, command: str, *, within: float = _TIMEOUT, **arguments: Any) -> Any:
    """Sends a request to the server at `path`; returns its result, which has to come `within` so many seconds.

    ConfigError: there is no server, it refuses, or the request is too long.
    """
    request = json.dumps({"command": command, **arguments}).encode() + b"\n"
    if len(request) > _MAX_REQUEST:
        raise ConfigError(f"{len(request):,} bytes for the server in {path.parent}: at most {_MAX_REQUEST:,}")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            _connect(sock, path)
            sock.sendall(request)
            reply = json.loads(_receive(sock, _MAX_ANSWER, seconds=within))
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoServer(
            f"no server runs in {path.parent}: start `vmodel serve`, `run` or `guest`, or name its --run-dir"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        if not path.exists():
            raise NoServer(f"the server in {path.parent} has ended") from error
        raise ConfigError(f"the server in {path.parent} does not answer: {error}") from error
    if not isinstance(reply, dict) or not {"error", "result"} & set(reply):
        raise ConfigError(f"the server in {path.parent} does not answer: it is not vmodel")
    if "error" in reply:
        raise ConfigError(f"the server in {path.parent}: {reply['error']}")
    return reply["result"]
