"""Serves devices over vfio-user: one socket and one thread for each PCI function.

All hooks, timers and commands of a function run on its thread, one after the other.  The loop is: block in the shim
until it needs Python (an *exit*), handle the exit, run timers and deferred work that are due.

**Memory without a file.**  QEMU answers DMA_READ and DMA_WRITE from its main loop, which needs the lock that a vCPU
holds while it waits for a region reply.  So a region reply must never wait for such a message.  If a hook accesses that
memory while a *write* is unanswered, the write is answered first, like a posted write.  A *read* cannot be answered
before its hook returns, so there the access fails with WOULD_DEADLOCK.  While the thread waits for the message's reply
it serves the client's requests, so hooks may be re-entered.  QEMU has such memory only without a shared memory backend.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
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
from vmodel.device.backend import VfioBackend
from vmodel.device.watchdog import Watchdog
from vmodel.dma import Buffer
from vmodel.errors import Access, ConfigError, DmaFault, PeerError, Reason
from vmodel.logs import limited, report_held
from vmodel.threads import place
from vmodel.vfio_user.commands import FdList, HandshakeError, Limits, Session
from vmodel.vfio_user.wire import Command

log = limited(__name__)

#: Most nested DMA_READs, DMA_WRITEs and waits for page requests of one function.
MAX_NESTED = 8
#: Seconds that the threads of all functions have to end in a stop.
STOP_TIMEOUT = 1.0
#: Seconds that a thread pauses after an internal or system error.
BACKOFF = 0.1
#: Fds that the server reserves for itself; the devices' clients share the others.
OWN_FDS = 256
#: Eventfds that a client may always have.
_LEAST_EVENTFDS = 16
#: Longest path of a unix socket, in bytes (sun_path without its NUL).
MAX_SOCKET_PATH = 107

_EXIT_READ = _shim.EXIT_READ  # a global is faster than an attribute, and this is needed for each access
_DMA_HEAD = struct.Struct("<QQ")  # DMA_READ, DMA_WRITE: address, count


_T = TypeVar("_T")


class _Gone(Exception):
    """The client has disconnected, or its stream is broken."""


class _Dropped(_Gone):
    """The client is dropped, as it has kept the server waiting."""


class Connection:
    """One client of one function, served on the function's thread.  It is the device's `Courier`."""

    def __init__(self, device: VfioBackend, sock: socket.socket, limits: Limits) -> None:
        self.device = device
        self.limits = limits
        self._log = device.log
        self.session = Session(device, limits)
        self.channel = _shim.Channel(
            device.function,
            device.memory.shim,
            sock.fileno(),
            limits.max_data_xfer_size,
            limits.max_msg_fds,
            int(limits.message_timeout * 1000),
        )
        sock.detach()  # the channel owns the fd from now on
        self._run = self.channel.run
        self._thread = threading.get_ident()
        self._peer_xfer = limits.max_data_xfer_size
        #: The exit that has not been answered yet: EXIT_READ, EXIT_WRITE, EXIT_COMMAND; 0: none.
        self._unanswered = 0
        self._posted: deque[tuple[int, int, int, int, int]] = deque()
        self._next_id = 0
        self._depth = 0
        self._replies: dict[int, tuple[int, bytes] | None] = {}

    # ---- serving --------------------------------------------------------------------------

    def serve(self, stopping: threading.Event) -> None:
        """Serves until the client disconnects, or `stopping` is set and the channel shut down."""
        with contextlib.ExitStack() as after:
            after.callback(self.device.client_gone)
            after.callback(self.session.close)
            after.callback(self.device.memory.unmap_all)
            after.callback(self._no_courier)
            self.device.dma.courier = self
            self.device.client_came(self.channel.shutdown)
            self.device.run_due(time.monotonic_ns())
            try:
                self._shake_hands(stopping)
                step, agenda = self._step, self.device.agenda
                while not stopping.is_set():
                    step(self._due() if agenda.waiting else _shim.FOREVER)
            except _Dropped as dropped:
                self._log.warning("%s: client dropped: %s", self.device.name, dropped)
            except _Gone as gone:
                self._log.debug("%s: client has disconnected: %s", self.device.name, gone)

    def _shake_hands(self, stopping: threading.Event) -> None:
        limit = time.monotonic_ns() + int(self.limits.handshake_timeout * 1e9)
        while self.session.negotiated is None and not stopping.is_set():
            if time.monotonic_ns() >= limit:
                raise _Dropped(f"no VERSION within {self.limits.handshake_timeout:g} s")
            self._step(min(limit, self._due()))

    def _no_courier(self) -> None:
        self.device.dma.courier = None

    def close(self) -> None:
        """Closes the socket: after `serve`, once no other thread can call `channel.shutdown` any more."""
        self.channel.close()

    def _due(self) -> int:
        """Runs the device's work that is due; returns the next deadline."""
        self.channel.complete()  # the reply must not wait for deferred work
        self._unanswered = 0
        deadline = self.device.run_due(time.monotonic_ns())
        return _shim.FOREVER if deadline is None else deadline

    def _step(self, deadline: int) -> None:
        """Blocks until the shim needs Python or the deadline passes, and handles the exit."""
        self._unanswered = 0
        reason = self.channel.enter(deadline)
        run = self._run
        # Posted writes come first, even if this is a nested call of a hook that waits for a message.
        while self._posted:
            self.device.regions.write(*self._posted.popleft())
        if reason == _EXIT_READ:
            self._unanswered = reason
            value = self.device.regions.read(run.key, run.region, run.offset, run.count)
            # Reads never nest, as a read hook cannot wait for a message: `run` is still this read's.
            if value.__class__ is int:
                run.value = value
            else:
                self.channel.fill(value)  # type: ignore[arg-type]
        elif reason == _shim.EXIT_POSTED:
            entries = self.channel.accesses()
            posted, write = self._posted, self.device.regions.write
            posted.extend((k, r, o, n, v) for o, v, k, r, n in _shim.ACCESS.iter_unpack(entries))
            while posted:
                write(*posted.popleft())
        elif reason == _shim.EXIT_WRITE:
            self._unanswered = reason
            data = run.value if run.count <= 8 else self.channel.payload()
            self.device.regions.write(run.key, run.region, run.offset, run.count, data)
        elif reason == _shim.EXIT_COMMAND:
            self._command()
        elif reason == _shim.EXIT_REPLY:
            if run.id in self._replies:  # else the wait for it has timed out
                self._replies[run.id] = (run.error, self.channel.payload())
        elif reason == _shim.EXIT_WAKE:
            self.device.run_due(time.monotonic_ns())
        elif reason == _shim.EXIT_EVENT:
            self.device.event(run.id)
        elif reason == _shim.EXIT_CLOSED:
            if run.error == errno.ETIMEDOUT:
                raise _Dropped(f"it has not taken a message within {self.limits.message_timeout:g} s")
            raise _Gone(os.strerror(run.error) if run.error else "end of stream")

    def _command(self) -> None:
        run, channel, session = self._run, self.channel, self.session
        id, command, posted = run.id, run.command, run.posted
        payload = channel.payload()
        self._unanswered = _shim.EXIT_COMMAND
        opened = session.negotiated is not None
        if run.error:
            self._log.warning(
                "%s: command %d refused, as its fds cannot be received: %s",
                self.device.name,
                command,
                os.strerror(run.error),
            )
            if not posted:
                channel.reply_error(id, command, run.error)
            return
        with contextlib.closing(FdList(channel.fds())) as fds:
            try:
                reply = session.handle(command, payload, fds)
            except PeerError as error:
                self._log.debug("%s: command %d refused: %s", self.device.name, command, error)
                if not posted or isinstance(error, HandshakeError):
                    channel.reply_error(id, command, error.errno)
                if isinstance(error, HandshakeError):
                    channel.complete()
                    raise _Gone(str(error)) from error
                return
            except Exception:
                # A bug in vmodel or in the model: the client gets an error, other devices are not affected.
                self._log.exception("%s: command %d failed", self.device.name, command)
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
        """Reads guest memory by DMA_READ, in pieces of at most the client's max_data_xfer_size."""
        if threading.get_ident() != self._thread:
            return self._call_on_thread(lambda: self.read(gpa, size), gpa, Access.READ)
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
        """Writes guest memory by DMA_WRITE, in pieces of at most the client's max_data_xfer_size."""
        if threading.get_ident() != self._thread:
            copy = bytes(data)
            return self._call_on_thread(lambda: self.write(gpa, copy), gpa, Access.WRITE)
        for at in range(0, len(data), self._peer_xfer):
            piece = bytes(data[at : at + self._peer_xfer])
            head = _DMA_HEAD.pack(gpa + at, len(piece))
            body = self._request(Command.DMA_WRITE, head, piece, gpa + at, Access.WRITE)
            # The specification's tables give the count 4 bytes in the reply, but 8 in the request.
            if body[:12] != head[:12] or len(body) not in (12, 16):
                raise DmaFault(Reason.CLIENT, gpa + at, Access.WRITE)
        return None

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Serves the client until `event` is set and the device's thread woken; returns whether it was set in time.

        In the hook of a read it returns False at once, as the reply must not wait.
        """
        if threading.get_ident() != self._thread:
            return event.wait(seconds)
        if self._unanswered in (_shim.EXIT_READ, _shim.EXIT_COMMAND):
            return False
        if self._depth >= MAX_NESTED:
            return False
        self._depth += 1
        try:
            self.channel.complete()
            deadline = time.monotonic_ns() + int(seconds * 1e9)
            while not event.is_set() and time.monotonic_ns() < deadline:
                self._step(deadline)
        except (_Gone, OSError) as error:  # the outer loop will find the end of the stream, too
            self._log.debug("%s: client has disconnected: %s", self.device.name, error)
        finally:
            self._depth -= 1
            self._unanswered = 0
        return event.is_set()

    def _call_on_thread(self, call: Callable[[], _T], gpa: int, access: Access) -> _T:
        """Runs `call` on the function's thread and returns its result.

        DmaFault(CLIENT): not in time, which is that of a message, and a second to begin.  What has not begun then is
        revoked.
        """
        done: Future[_T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        self.device.defer(run, None)
        try:
            return done.result(self.limits.message_timeout + 1)
        except TimeoutError:
            done.cancel()
            raise DmaFault(Reason.CLIENT, gpa, access) from None

    def _request(self, command: Command, head: bytes, data: bytes, gpa: int, access: Access) -> bytes:
        """Sends a command and serves the client until it is answered; returns the reply's payload.  DmaFault."""
        if self._unanswered in (_shim.EXIT_READ, _shim.EXIT_COMMAND):
            raise DmaFault(Reason.WOULD_DEADLOCK, gpa, access)
        if self._depth >= MAX_NESTED:  # instead of answering, the client has written registers whose hooks do DMA
            self._log.warning("%s: %d messages wait for the client already", self.device.name, MAX_NESTED)
            raise DmaFault(Reason.CLIENT, gpa, access)
        self.channel.complete()
        id = self._next_id
        while id in self._replies:
            id = (id + 1) & 0xFFFF
        self._next_id = (id + 1) & 0xFFFF
        self._replies[id] = None
        self._depth += 1
        try:
            self.channel.command(id, command, head, data, len(data))
            deadline = time.monotonic_ns() + int(self.limits.message_timeout * 1e9)
            while (answer := self._replies[id]) is None:
                if time.monotonic_ns() >= deadline:
                    self._log.warning("%s: no answer to %s", self.device.name, command.name)
                    raise DmaFault(Reason.CLIENT, gpa, access)
                self._step(deadline)
        except (_Gone, OSError) as error:
            # The outer loop will find the end of the stream, too.
            raise DmaFault(Reason.CLIENT, gpa, access) from error
        finally:
            del self._replies[id]
            self._depth -= 1
            self._unanswered = 0
        code, body = answer
        if code:
            self._log.debug("%s: %s at gpa %#x: %s", self.device.name, command.name, gpa, os.strerror(code))
            raise DmaFault(Reason.CLIENT, gpa, access)
        return body


class ServedDevice:
    """A device, its socket and its thread."""

    def __init__(self, device: VfioBackend, path: Path, limits: Limits) -> None:
        self.device = device
        self.path = path
        self._limits = limits
        self._listener = listen(path, f"device {device.name!r}")
        self._inode = path.lstat().st_ino
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._main, name=f"vmodel-{device.name}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.device.pause.resume()
        self._thread.start()

    def end(self) -> None:
        """Ends the connection and requests the thread to end, without waiting for it."""
        self._stopping.set()
        self.device.pause.stop()
        with self._lock:
            if self._connection is not None:
                self._connection.channel.shutdown()
        self.device.function.wake()

    def join(self, deadline: float) -> None:
        """After `end`: waits for the thread until `deadline` (time.monotonic()), and removes the socket.

        If the thread does not end in time, because its model does not return, the device is marked `abandoned`.
        """
        if self._thread.ident is not None:
            self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self.device.abandoned = True
            log.error(
                "%s: abandoned: its thread does not end, it is in %s", self.device.name, place(self._thread.ident)
            )
        else:
            self.device.owner.leave()
        self._listener.close()
        # Keep a socket that another server has bound there meanwhile.
        with contextlib.suppress(OSError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()

    def _main(self) -> None:
        self.device.owner.take()
        while not self._stopping.is_set():
            try:
                self._turn()
            except BaseException:  # even SystemExit, raised by a model, must not end the thread of this device
                log.exception("%s: internal or system error", self.device.name)
                self._stopping.wait(BACKOFF)

    def _turn(self) -> None:
        function, device = self.device.function, self.device
        deadline = device.run_due(time.monotonic_ns())
        reason, cookie = function.idle(self._listener.fileno(), _shim.FOREVER if deadline is None else deadline)
        if reason == _shim.EXIT_EVENT:
            device.event(cookie)
        elif reason == _shim.EXIT_COMMAND:
            self._accept()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # the client has disconnected again, or fds or memory are used up
            log.warning("%s: accept: %s", self.device.name, error)
            self._stopping.wait(BACKOFF)
            return
        with sock:
            connection = Connection(self.device, sock, self._limits)
        try:
            with self._lock:
                self._connection = connection
            connection.serve(self._stopping)
        finally:
            with self._lock:
                self._connection = None
            connection.close()


def _raise_fd_limit() -> int:
    """Raises the process's limit of fds to the hard limit; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def listen(path: Path, what: str) -> socket.socket:
    """A listening socket at `path`; replaces the socket of a dead server.  ConfigError, whose text names `what`."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(f"socket path {path} is longer than {MAX_SOCKET_PATH} bytes: choose a shorter one")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The lock prevents two servers that start at once from removing each other's new socket as stale.
            fcntl.flock(directory, fcntl.LOCK_EX)
            _clear_stale(path, what)
            # bind() creates the file with the mode of the socket's inode.  A chmod of the path could follow a link
            # that another user has put there meanwhile.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(str(path))
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
            pass  # its backlog is full, so the server is alive
    raise ConfigError(f"{what} is being served already on {path}: stop that server first, or choose another --run-dir")


class Server:
    """Serves several devices; a context manager that starts and stops."""

    def __init__(self, limits: Limits | None = None, *, watch: bool = True) -> None:
        """`watch`: names hooks and callbacks of models that do not return; not for a debugger in a hook."""
        self._limits = limits or Limits()
        self._watch = watch
        self._watchdog: Watchdog | None = None
        self._endpoints: list[ServedDevice] = []
        self._devices: list[PciDevice] = []
        self._stopped = threading.Event()

    def add(self, device: PciDevice, path: Path | str) -> None:
        """Binds a socket at `path` for `device`, and opens the device.

        ConfigError: another server uses the path, it is not a socket or too long, or the device cannot be opened.
        """
        endpoint = ServedDevice(device.backend, Path(path), self._limits)
        self._endpoints.append(endpoint)
        self._devices.append(device)
        device.open()

    @property
    def devices(self) -> list[PciDevice]:
        """The devices served, in the order they were added."""
        return list(self._devices)

    def start(self) -> None:
        """Starts to serve clients.  Raises the process's limit of fds, of which each device gets an equal share."""
        share = (_raise_fd_limit() - OWN_FDS) // max(len(self._endpoints), 1)
        for endpoint in self._endpoints:
            endpoint.device.irqs.max_eventfds = max(share, _LEAST_EVENTFDS)
        for endpoint in self._endpoints:
            endpoint.start()
        if self._watch:
            self._watchdog = Watchdog([endpoint.device for endpoint in self._endpoints])
            self._watchdog.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until another thread calls stop(), or for `timeout` seconds; returns whether stop() was called."""
        return self._stopped.wait(timeout)

    def stop(self) -> None:
        """Ends all connections and threads and removes the sockets; devices keep their state.

        If a thread does not end within STOP_TIMEOUT, because its model does not return, the log says where it is, and
        its device is marked `abandoned`.
        """
        for endpoint in self._endpoints:
            endpoint.end()
        deadline = time.monotonic() + STOP_TIMEOUT
        for endpoint in self._endpoints:
            endpoint.join(deadline)
        if self._watchdog is not None:
            self._watchdog.stop()
        report_held()
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
            function, dma = device.backend.function.stats(), device.dma.stats
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
                "interrupts": device.backend.irqs.raised,
            }
        return found
