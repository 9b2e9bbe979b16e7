"""Serves devices over vfio-user: one socket and one thread for each PCI function.

All hooks, timers and commands of a function run on its thread, one after the other.  A loop is: sleep in the
shim until it needs Python (an *exit*), handle the exit, run what has become due.

**Memory without a file.**  QEMU answers DMA_READ and DMA_WRITE from its main loop, which needs the lock that a
vCPU holds while it waits for a region reply.  So a reply must never wait for such a message.  When a hook
asks for that memory while a *write* is unanswered, the write is answered first, as a posted write would have
been.  A *read* cannot be answered before its hook is through, so there the access fails with
WOULD_DEADLOCK.  While the message's reply is awaited the client's requests are served, so hooks may be
entered anew: the price of such memory, which QEMU uses only without a shared memory backend.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from vmodel import _shim
from vmodel.device import PciDevice
from vmodel.dma import Buffer
from vmodel.errors import Access, ConfigError, DmaFault, PeerError, Reason
from vmodel.vfio_user.commands import FdList, HandshakeError, Limits, Session
from vmodel.vfio_user.wire import Command

log = logging.getLogger(__name__)

#: Longest that the client may take to answer a DMA_READ or DMA_WRITE, in seconds.
MESSAGE_TIMEOUT = 5.0
#: Longest path of a unix socket, in bytes (sun_path without its NUL).
MAX_SOCKET_PATH = 107

_ACCESS = struct.Struct("<QQII")  # vms_access
_EXIT_READ = _shim.EXIT_READ  # looked up once for each access otherwise
_DMA_HEAD = struct.Struct("<QQ")  # DMA_READ, DMA_WRITE: address, count


_T = TypeVar("_T")


class _Gone(Exception):
    """The client has left, or its stream is broken."""


class Connection:
    """One client of one function; lives on the function's thread.  It is the device's `Courier`."""

    def __init__(self, device: PciDevice, sock: socket.socket, limits: Limits) -> None:
        self.device = device
        self.limits = limits
        self.session = Session(device, limits)
        self.channel = _shim.Channel(
            device.function, device.memory.shim, sock.detach(), limits.max_data_xfer_size, limits.max_msg_fds
        )
        self._run = self.channel.run
        self._thread = threading.get_ident()
        self._peer_xfer = limits.max_data_xfer_size
        #: Which exit is unanswered: EXIT_READ, EXIT_WRITE, EXIT_COMMAND or 0.
        self._unanswered = 0
        self._posted: deque[tuple[int, int, int, int]] = deque()
        self._next_id = 0
        self._replies: dict[int, tuple[int, bytes] | None] = {}

    # ---- serving --------------------------------------------------------------------------

    def serve(self, stopping: threading.Event) -> None:
        """Serves until the client leaves or `stopping` is set (and the channel shut down)."""
        self.device.dma.courier = self
        self.device.client_came(self.channel.shutdown)
        self.device.run_due(time.monotonic_ns())
        try:
            step, has_work = self._step, self.device.has_work
            while not stopping.is_set():
                step(self._due() if has_work() else _shim.FOREVER)
        except _Gone as gone:
            log.debug("%s: client has left: %s", self.device.name, gone)
        finally:
            self.device.dma.courier = None
            self.device.memory.unmap_all()
            self.session.close()
            self.device.client_gone()

    def close(self) -> None:
        """Closes the socket.  After `serve`, and when no other thread can call `channel.shutdown` any more."""
        self.channel.close()

    def _due(self) -> int:
        """Runs what is due on the device; the next deadline."""
        self.channel.complete()  # nobody waits for deferred work
        self._unanswered = 0
        deadline = self.device.run_due(time.monotonic_ns())
        return _shim.FOREVER if deadline is None else deadline

    def _step(self, deadline: int) -> None:
        """Sleeps until the shim needs Python, and handles that."""
        self._unanswered = 0
        reason = self.channel.enter(deadline)
        run = self._run
        # What was posted comes first, also when a hook that waits for a message got us here.
        while self._posted:
            self.device.region_write(*self._posted.popleft())
        if reason == _EXIT_READ:
            self._unanswered = reason
            value = self.device.register_read(run.key, run.region, run.offset, run.count)
            # Reads are never nested in one another: a hook cannot wait inside a read.
            if value.__class__ is int:
                run.value = value
            else:
                self.channel.fill(value)  # type: ignore[arg-type]
        elif reason == _shim.EXIT_POSTED:
            entries = self.channel.accesses()
            posted, write = self._posted, self.device.region_write
            posted.extend((r, o, n, v) for o, v, r, n in _ACCESS.iter_unpack(entries))
            while posted:
                write(*posted.popleft())
        elif reason == _shim.EXIT_WRITE:
            self._unanswered = reason
            data = run.value if run.count <= 8 else self.channel.payload()
            self.device.region_write(run.region, run.offset, run.count, data)
        elif reason == _shim.EXIT_COMMAND:
            self._command()
        elif reason == _shim.EXIT_REPLY:
            if run.id in self._replies:  # else: nobody waits for it any more
                self._replies[run.id] = (run.error, self.channel.payload())
        elif reason == _shim.EXIT_WAKE:
            self.device.run_due(time.monotonic_ns())
        elif reason == _shim.EXIT_EVENT:
            self.device.event(run.id)
        elif reason == _shim.EXIT_CLOSED:
            raise _Gone(os.strerror(run.error) if run.error else "end of stream")

    def _command(self) -> None:
        run, channel, session = self._run, self.channel, self.session
        id, command, posted = run.id, run.command, run.posted
        payload = channel.payload()
        self._unanswered = _shim.EXIT_COMMAND
        opened = session.negotiated is not None
        with contextlib.closing(FdList(channel.fds())) as fds:
            try:
                reply = session.handle(command, payload, fds)
            except PeerError as error:
                log.debug("%s: command %d refused: %s", self.device.name, command, error)
                if not posted or isinstance(error, HandshakeError):
                    channel.reply_error(id, command, error.errno)
                if isinstance(error, HandshakeError):
                    channel.complete()
                    raise _Gone(str(error)) from error
                return
            except Exception:
                # A bug, ours or the model's: the client learns that it failed, the others go on.
                log.exception("%s: command %d failed", self.device.name, command)
                if not posted:
                    channel.reply_error(id, command, errno.EIO)
                return
        try:
            if not posted:
                channel.reply(id, command, reply.payload, reply.fds)
        finally:
            for fd in reply.temporary:
                os.close(fd)
        if not opened and session.negotiated is not None:
            negotiated = session.negotiated
            self._peer_xfer = min(negotiated.max_data_xfer_size, self.limits.max_data_xfer_size)
            channel.open(negotiated.max_data_xfer_size, session.take_twin())

    # ---- Courier: memory without a file ---------------------------------------------------

    def read(self, gpa: int, size: int) -> bytes:
        """DMA_READ, in pieces of at most the client's max_data_xfer_size."""
        if threading.get_ident() != self._thread:
            return self._elsewhere(lambda: self.read(gpa, size), gpa, Access.READ)
        parts = []
        for at in range(0, size, self._peer_xfer):
            count = min(self._peer_xfer, size - at)
            head = _DMA_HEAD.pack(gpa + at, count)
            body = self._request(Command.DMA_READ, head, b"", gpa + at, Access.READ)
            if len(body) != len(head) + count or body[: len(head)] != head:
                raise DmaFault(Reason.CLIENT, gpa + at, Access.READ)
            parts.append(body[len(head) :])
        return b"".join(parts)

    def write(self, gpa: int, data: Buffer) -> None:
        """DMA_WRITE, in pieces likewise."""
        if threading.get_ident() != self._thread:
            copy = bytes(data)
            return self._elsewhere(lambda: self.write(gpa, copy), gpa, Access.WRITE)
        for at in range(0, len(data), self._peer_xfer):
            piece = bytes(data[at : at + self._peer_xfer])
            head = _DMA_HEAD.pack(gpa + at, len(piece))
            body = self._request(Command.DMA_WRITE, head, piece, gpa + at, Access.WRITE)
            # The reply's count is 4 bytes in the specification's table and 8 in the request's.
            if body[:12] != head[:12] or len(body) not in (12, 16):
                raise DmaFault(Reason.CLIENT, gpa + at, Access.WRITE)
        return None

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Serves the client until `event` is set and the device woken; False as well in the hook of a read."""
        if threading.get_ident() != self._thread:
            return event.wait(seconds)
        if self._unanswered in (_shim.EXIT_READ, _shim.EXIT_COMMAND):
            return False
        self.channel.complete()
        deadline = time.monotonic_ns() + int(seconds * 1e9)
        try:
            while not event.is_set() and time.monotonic_ns() < deadline:
                self._step(deadline)
        except (_Gone, OSError) as error:  # the stream stays at its end, so the outer loop sees it too
            log.debug("%s: client has left: %s", self.device.name, error)
        finally:
            self._unanswered = 0
        return event.is_set()

    def _elsewhere(self, call: Callable[[], _T], gpa: int, access: Access) -> _T:
        """Runs `call` on the function's thread."""
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        self.device.post(run)
        try:
            return done.result(MESSAGE_TIMEOUT + 1)
        except TimeoutError:
            raise DmaFault(Reason.CLIENT, gpa, access) from None

    def _request(self, command: Command, head: bytes, data: bytes, gpa: int, access: Access) -> bytes:
        """Sends a command and serves the client until it is answered; the reply's payload."""
        if self._unanswered in (_shim.EXIT_READ, _shim.EXIT_COMMAND):
            raise DmaFault(Reason.WOULD_DEADLOCK, gpa, access)
        self.channel.complete()
        id = self._next_id
        while id in self._replies:
            id = (id + 1) & 0xFFFF
        self._next_id = (id + 1) & 0xFFFF
        self._replies[id] = None
        try:
            self.channel.command(id, command, head, data, len(data))
            deadline = time.monotonic_ns() + int(MESSAGE_TIMEOUT * 1e9)
            while (answer := self._replies[id]) is None:
                if time.monotonic_ns() >= deadline:
                    log.warning("%s: no answer to %s", self.device.name, command.name)
                    raise DmaFault(Reason.CLIENT, gpa, access)
                self._step(deadline)
        except (_Gone, OSError) as error:
            # The stream stays at its end, so the outer loop sees it too.
            raise DmaFault(Reason.CLIENT, gpa, access) from error
        finally:
            del self._replies[id]
            self._unanswered = 0
        code, body = answer
        if code:
            log.debug("%s: %s at gpa %#x: %s", self.device.name, command.name, gpa, os.strerror(code))
            raise DmaFault(Reason.CLIENT, gpa, access)
        return body


class Endpoint:
    """A device, its socket and its thread."""

    def __init__(self, device: PciDevice, path: Path, limits: Limits) -> None:
        self.device = device
        self.path = path
        self._limits = limits
        self._listener = listen(path, f"device {device.name!r}")
        self._inode = path.stat().st_ino
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._main, name=f"vmodel-{device.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the connection and the thread, removes the socket."""
        self._stopping.set()
        with self._lock:
            if self._connection is not None:
                self._connection.channel.shutdown()
        self.device.function.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._listener.close()
        # Not a socket that another server has put there meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _main(self) -> None:
        function, device = self.device.function, self.device
        while not self._stopping.is_set():
            deadline = device.run_due(time.monotonic_ns())
            reason, cookie = function.idle(self._listener.fileno(), _shim.FOREVER if deadline is None else deadline)
            if reason == _shim.EXIT_EVENT:
                device.event(cookie)
            elif reason == _shim.EXIT_COMMAND:
                self._accept()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # it left again, or we are out of fds: then the others go on
            log.warning("%s: accept: %s", self.device.name, error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)
            return
        connection = Connection(self.device, sock, self._limits)
        with self._lock:
            self._connection = connection
        try:
            connection.serve(self._stopping)
        except Exception:
            log.exception("%s: connection ended by an error of ours", self.device.name)
        finally:
            with self._lock:
                self._connection = None
            connection.close()


def listen(path: Path, what: str) -> socket.socket:
    """A listening socket at `path` for `what`; one that a dead server left behind is replaced.  ConfigError."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(f"socket path {path} is longer than {MAX_SOCKET_PATH} bytes: choose a shorter one")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Two servers that start at once must not both take the other's socket for a dead one.
            fcntl.flock(directory, fcntl.LOCK_EX)
            _clear_stale(path, what)
            sock.bind(str(path))
            path.chmod(0o600)
            sock.listen(8)
        finally:
            os.close(directory)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _clear_stale(path: Path, what: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is not a socket: move it away or choose another run directory")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except (BlockingIOError, TimeoutError):
            pass  # its backlog is full: very much alive
    raise ConfigError(f"{what} is being served already on {path}: stop that server first, or choose another --run-dir")


class Server:
    """Serves several devices; a context manager that starts and stops."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._endpoints: list[Endpoint] = []
        self._stopped = threading.Event()

    def add(self, device: PciDevice, path: Path | str) -> None:
        """Binds `path` for `device` and opens it.

        ConfigError: a live server has the path, it is no socket, or too long; or the device cannot be opened.
        """
        endpoint = Endpoint(device, Path(path), self._limits)
        self._endpoints.append(endpoint)
        device.open()

    @property
    def devices(self) -> list[PciDevice]:
        """The devices served, in the order they were added."""
        return [endpoint.device for endpoint in self._endpoints]

    def start(self) -> None:
        """Clients are served from now on."""
        for endpoint in self._endpoints:
            endpoint.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleeps until stop() is called from elsewhere; whether it was."""
        return self._stopped.wait(timeout)

    def stop(self) -> None:
        """Ends all connections and threads and removes the sockets; devices keep their state."""
        for endpoint in self._endpoints:
            endpoint.stop()
        self._stopped.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stats(self) -> dict[str, dict[str, int]]:
        """Counters of each device by name: region accesses, exits to Python, DMA, interrupts."""
        found = {}
        for device in self.devices:
            function, dma = device.function.stats(), device.dma.stats
            found[device.name] = {
                "messages": function.messages,
                "reads": function.reads,
                "writes": function.writes,
                "served": function.served,
                "exits": function.exits,
                "rejected": function.rejected,
                "dma_read_ops": dma.read_ops,
                "dma_read_bytes": dma.read_bytes,
                "dma_write_ops": dma.write_ops,
                "dma_write_bytes": dma.write_bytes,
                "dma_faults": dma.faults,
                "iotlb_hits": dma.iotlb_hits,
                "iotlb_misses": dma.iotlb_misses,
                "stale": dma.stale,
                "interrupts": device.irqs.raised,
            }
        return found
