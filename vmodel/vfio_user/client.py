"""An independent vfio-user client, for tests and for programs that drive a device without QEMU.

It shares only `wire` with the server's side.  An error reply is raised as OSError with its errno.

```python
with Client.connect(path) as client:
    client.negotiate()
    ram = client.share(0, 1 << 20)                # guest memory at address 0, passed by fd
    client.region_write(Region.CONFIG, 4, b"\\x06\\0")   # memory and bus mastering on
    value = client.region_read(Region.BAR0, 0, 4)
```
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from construct import ConstructError

from vmodel.closing import Closing
from vmodel.span import PAGE, Span
from vmodel.vfio_user import wire
from vmodel.vfio_user.migration import MAX_STATE
from vmodel.vfio_user.stream import Closed, Message, Stream
from vmodel.vfio_user.wire import (
    Command,
    DmaMapFlags,
    DmaUnmapFlags,
    Feature,
    FeatureFlags,
    HeaderFlags,
    Irq,
    IrqSetFlags,
)

#: For pytest: what fails here is shown at the line of the test that called.
__tracebackhide__ = True

__all__ = ["DEFAULT_CAPABILITIES", "Client", "ClientRegion", "Closed", "EventFd", "IoFd", "Message", "Ram", "Stream"]

_T = TypeVar("_T")

DEFAULT_CAPABILITIES: dict[str, Any] = {
    "max_msg_fds": 8,
    "max_data_xfer_size": 1 << 20,
    "max_dma_maps": 65535,
    "pgsizes": PAGE,
    "write_multiple": True,
}


@dataclass(frozen=True)
class ClientRegion:
    """A region.  `areas` may be mapped from `fd`, in which the region begins at `offset`.

    The client has to close `fd`; None: the region cannot be mapped.
    """

    size: int
    flags: int
    areas: tuple[Span, ...]
    fd: int | None
    offset: int

    def map(self, area: Span) -> mmap.mmap:
        """Maps an area of `areas` to read and write.  OSError(ENODEV): the region cannot be mapped."""
        if self.fd is None:
            raise OSError(errno.ENODEV, "the region cannot be mapped")
        return mmap.mmap(self.fd, area.size, offset=self.offset + area.start)

    def close(self) -> None:
        """Closes the fd."""
        if self.fd is not None:
            os.close(self.fd)


@dataclass(frozen=True)
class IoFd:
    """An entry of GET_REGION_IO_FDS.  The client has to close `fd`, which several entries may share."""

    offset: int
    size: int
    fd: int
    type: int
    flags: int
    datamatch: int


class EventFd:
    """An eventfd that the server signals."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wait(self, timeout: float = 5.0) -> int:
        """Waits for a signal; returns how many there were since the last call.  TimeoutError: none in `timeout` s."""
        if not select.select([self.fd], [], [], timeout)[0]:
            raise TimeoutError("the eventfd was not signalled")
        return os.eventfd_read(self.fd)

    def quiet(self, seconds: float = 0.05) -> bool:
        """Whether the eventfd is not signalled for `seconds`."""
        return not select.select([self.fd], [], [], seconds)[0]

    def close(self) -> None:
        """Closes the eventfd."""
        os.close(self.fd)


class Ram:
    """Guest memory of `size` bytes at `address`; `view` is its contents.

    `fd` None: the server accesses it by DMA_READ and DMA_WRITE.
    """

    def __init__(self, address: int, size: int, *, shared: bool) -> None:
        self.address = address
        self.size = size
        self.fd: int | None = None
        if shared:
            self.fd = os.memfd_create("vmodel-client-ram", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
            self._map: mmap.mmap | bytearray = mmap.mmap(self.fd, size)
        else:
            self._map = bytearray(size)
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Frees the memory and closes the fd."""
        self.view.release()
        if isinstance(self._map, mmap.mmap):
            self._map.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Client(Closing):
    """One connection.  `timeout` (seconds) bounds every wait.

    A thread that waits for a reply also answers the server's commands meanwhile.  Several threads may use one client.
    OSError(EPROTO): the server broke the protocol.
    """

    def __init__(self, sock: socket.socket, *, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self.main = Stream(sock, timeout)
        self.twin: Stream | None = None
        self.capabilities: dict[str, Any] = {}
        self.ram: list[Ram] = []
        #: The server's DMA_READs and DMA_WRITEs, as (command, address, count).
        self.dma_log: list[tuple[Command, int, int]] = []
        self._next_id = 1
        #: Guards `_replies` and `_reader`: of the threads that wait, one reads the socket.
        self._arrived = threading.Condition()
        self._replies: dict[int, deque[Message]] = {}
        self._reader = False
        self._closing = False
        self._threads: list[threading.Thread] = []

    @classmethod
    def connect(cls, path: Path | str, *, timeout: float = 5.0) -> Client:
        """Connects to a server's socket."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(str(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout)

    def close(self) -> None:
        """Disconnects, and frees the memory that `share` made."""
        self._closing = True
        streams = [self.main] if self.twin is None else [self.main, self.twin]
        for stream in streams:
            stream.shutdown()
        for thread in self._threads:
            thread.join(self.timeout)
        for stream in streams:
            stream.close()
        for arrived in self._replies.values():
            for message in arrived:
                message.close()
        self._replies.clear()
        for ram in self.ram:
            ram.close()
        self.ram.clear()

    # ---- messages ---------------------------------------------------------------------------

    def message(self, command: int, payload: bytes = b"", *, flags: int = 0, id: int | None = None) -> bytes:
        """Builds a message without sending it; `id` None: the next free one."""
        if id is None:
            id, self._next_id = self._next_id, self._next_id % 0xFFFF + 1
        size = wire.HEADER_SIZE + len(payload)
        return bytes(
            wire.Header.build({"id": id, "command": command, "size": size, "flags": flags, "error": 0}) + payload
        )

    def request(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Sends a command and returns its reply; answers the server's own commands meanwhile.  Errors as `reply`."""
        data = self.message(command, payload)
        self.main.send(data, fds)
        return self.reply(wire.Header.parse(data).id)

    def post(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Sends a command with the flag No_reply."""
        self.main.send(self.message(command, payload, flags=HeaderFlags.NO_REPLY), fds)

    def reply(self, id: int) -> Message:
        """Waits for the reply to command `id`.  OSError with the errno of an error reply; TimeoutError; Closed."""
        message = self._await(lambda: self._replies.get(id), time.monotonic() + self.timeout).popleft()
        if not message.flags & HeaderFlags.ERROR:
            return message
        message.close()
        if message.payload or message.fds:
            raise OSError(errno.EPROTO, "an error reply has a payload or fds")
        raise OSError(message.error, os.strerror(message.error))

    def serve(self, seconds: float) -> None:
        """Answers the server's commands for `seconds`."""
        with suppress(TimeoutError):
            self._await(lambda: None, time.monotonic() + seconds)

    def _await(self, find: Callable[[], _T | None], deadline: float) -> _T:
        """Reads messages, or waits while another thread reads, until `find` returns something true."""
        with self._arrived:
            while not (found := find()):
                left = deadline - time.monotonic()
                if self._reader:
                    if not self._arrived.wait(max(left, 0)) and left <= 0:
                        raise TimeoutError("no message from the server")
                    continue
                self._reader = True
                self._arrived.release()
                try:
                    message = self.main.receive(deadline)
                    is_command = self._is_command(message)
                    if is_command:
                        self._answer(self.main, message)
                finally:
                    self._arrived.acquire()
                    self._reader = False
                    self._arrived.notify_all()
                if not is_command:
                    self._replies.setdefault(message.id, deque()).append(message)
                elif time.monotonic() >= deadline:  # however many commands follow
                    raise TimeoutError("only commands from the server")
            return found

    @staticmethod
    def _is_command(message: Message) -> bool:
        kind = message.flags & HeaderFlags.TYPE
        if kind not in (HeaderFlags.COMMAND, HeaderFlags.REPLY):
            message.close()
            raise OSError(errno.EPROTO, f"a message of type {kind}")
        return kind == HeaderFlags.COMMAND

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="vmodel-client", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _answer(self, stream: Stream, message: Message) -> None:
        """Answers DMA_READ and DMA_WRITE from the memory that `share` made; an OSError becomes an error reply."""
        message.close()  # the server has no command that takes fds
        try:
            payload = self._dma(message)
            flags, code = HeaderFlags.REPLY, 0
        except OSError as error:
            payload, flags, code = b"", HeaderFlags.REPLY | HeaderFlags.ERROR, error.errno or errno.EIO
        if message.flags & HeaderFlags.NO_REPLY:
            return
        head = {"id": message.id, "command": message.command, "flags": flags, "error": code}
        head["size"] = wire.HEADER_SIZE + len(payload)
        stream.send(wire.Header.build(head) + payload)

    def _dma(self, message: Message) -> bytes:
        if message.command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise OSError(errno.ENOTSUP, "not a command for a client")
        access = _parse(wire.DmaAccess, message.payload)
        self.dma_log.append((Command(message.command), access.address, access.count))
        for ram in self.ram:
            at = access.address - ram.address
            if at >= 0 and at + access.count <= ram.size:
                break
        else:
            raise OSError(errno.EFAULT, "no such memory")
        reply = {"address": access.address, "count": access.count, "data": b""}
        if len(access.data) != (access.count if message.command == Command.DMA_WRITE else 0):
            raise OSError(errno.EINVAL, "count and length of the data differ")
        if message.command == Command.DMA_READ:
            reply["data"] = bytes(ram.view[at : at + access.count])
        else:
            ram.view[at : at + access.count] = access.data
        return bytes(wire.DmaAccess.build(reply))

    # ---- the handshake ----------------------------------------------------------------------

    def negotiate(self, *, twin_socket: bool = False, **capabilities: Any) -> dict[str, Any]:
        """Sends VERSION; returns the server's capabilities.

        `capabilities` override DEFAULT_CAPABILITIES; a value of None leaves one out.
        """
        offered = {**DEFAULT_CAPABILITIES, **capabilities}
        offered = {key: value for key, value in offered.items() if value is not None}
        if twin_socket:
            offered["twin_socket"] = {"supported": True}
        text = json.dumps({"capabilities": offered}).encode() + b"\0"
        reply = self.request(Command.VERSION, wire.Version.build({"major": 0, "minor": 0, "data": text}))
        try:
            data = _parse(wire.Version, reply.payload).data
            self.capabilities = json.loads(data.rstrip(b"\0").decode())["capabilities"]
            twin = self.capabilities.get("twin_socket", {})
            if twin.get("supported"):
                self.twin = Stream(socket.socket(fileno=os.dup(reply.fds[twin["fd_index"]])), self.timeout)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise OSError(errno.EPROTO, "the reply to VERSION is inconsistent") from error
        finally:
            reply.close()
        if self.twin is not None:
            self._start(self._serve_twin)
        return self.capabilities

    def _serve_twin(self) -> None:
        twin = self.twin
        assert twin is not None
        with suppress(OSError):  # the connection has ended
            while not self._closing:
                with suppress(TimeoutError):
                    self._answer(twin, twin.receive(time.monotonic() + self.timeout))

    # ---- the device -------------------------------------------------------------------------

    def info(self) -> Any:
        """DEVICE_GET_INFO: flags, num_regions, num_irqs."""
        request = {"argsz": 16, "flags": 0, "num_regions": 0, "num_irqs": 0}
        return _parse(wire.DeviceInfo, self.request(Command.DEVICE_GET_INFO, wire.DeviceInfo.build(request)).payload)

    def region_info(self, index: int) -> ClientRegion:
        """DEVICE_GET_REGION_INFO; sent again with a larger argsz if the capabilities need more room."""
        head = wire.RegionInfoHead.sizeof()
        argsz = head
        while True:  # at most twice
            request = {"argsz": argsz, "flags": 0, "index": index, "cap_offset": 0, "size": 0, "offset": 0}
            reply = self.request(Command.DEVICE_GET_REGION_INFO, wire.RegionInfoHead.build(request))
            info = _parse(wire.RegionInfoHead, reply.payload)
            if info.argsz <= argsz:
                break
            reply.close()
            if argsz > head:
                raise OSError(errno.EPROTO, "the second reply needs a larger argsz than the first one named")
            argsz = info.argsz
        areas: tuple[Span, ...] = ()
        if info.flags & wire.RegionFlags.MMAP:
            areas = (Span.sized(0, info.size),)
        if info.flags & wire.RegionFlags.CAPS:
            areas = _areas(reply.payload, info.cap_offset) or areas
        return ClientRegion(info.size, info.flags, areas, reply.fds[0] if reply.fds else None, info.offset)

    def region_io_fds(self, index: int, *, room: int = 4096) -> list[IoFd]:
        """DEVICE_GET_REGION_IO_FDS with argsz `room`.  OSError(ENOBUFS): the list needs more bytes."""
        request = {"argsz": room, "flags": 0, "index": index, "count": 0}
        reply = self.request(Command.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds.build(request))
        try:
            head = _parse(wire.RegionIoFds, reply.payload)
            if head.argsz > room:
                raise OSError(errno.ENOBUFS, f"the list needs {head.argsz} bytes")
            start, size = wire.RegionIoFds.sizeof(), wire.SubRegion.sizeof()
            entries = [_parse(wire.SubRegion, reply.payload[start + n * size :]) for n in range(head.count)]
            return [IoFd(e.offset, e.size, reply.fds[e.fd_index], e.type, e.flags, e.datamatch) for e in entries]
        except (OSError, IndexError) as error:
            reply.close()
            if isinstance(error, IndexError):
                raise OSError(errno.EPROTO, "an entry's fd is missing") from error
            raise

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ of `count` bytes."""
        request = {"offset": offset, "region": region, "count": count, "data": b""}
        reply = self.request(Command.REGION_READ, wire.RegionAccess.build(request))
        data = bytes(_parse(wire.RegionAccess, reply.payload).data)
        if len(data) != count:
            raise OSError(errno.EPROTO, f"{len(data)} bytes instead of {count}")
        return data

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """REGION_WRITE; `posted`: with the flag No_reply."""
        payload = wire.RegionAccess.build({"offset": offset, "region": region, "count": len(data), "data": data})
        if posted:
            self.post(Command.REGION_WRITE, payload)
        else:
            self.request(Command.REGION_WRITE, payload)

    def write_multi(self, writes: Iterable[tuple[int, int, bytes]], *, posted: bool = False) -> int | None:
        """REGION_WRITE_MULTI of (region, offset, data) each, data of at most 8 bytes.

        Returns how many writes were done; None if `posted`, which sets the flag No_reply.
        """
        entries = [
            {"region": region, "offset": offset, "count": len(data), "data": data.ljust(8, b"\0")}
            for region, offset, data in writes
        ]
        payload = wire.WriteMulti.build({"wr_cnt": len(entries), "wrs": entries})
        if posted:
            self.post(Command.REGION_WRITE_MULTI, payload)
            return None
        return int.from_bytes(self.request(Command.REGION_WRITE_MULTI, payload).payload, "little")

    def irq_info(self, index: int) -> Any:
        """DEVICE_GET_IRQ_INFO: flags, count."""
        request = {"argsz": 16, "flags": 0, "index": index, "count": 0}
        reply = self.request(Command.DEVICE_GET_IRQ_INFO, wire.IrqInfoWire.build(request))
        return _parse(wire.IrqInfoWire, reply.payload)

    def set_irqs(
        self,
        index: int,
        flags: int,
        start: int = 0,
        count: int = 1,
        *,
        data: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        """DEVICE_SET_IRQS for vectors `start`..`start + count - 1` of type `index`; `flags` are IrqSetFlags."""
        request = {"argsz": 20 + len(data), "flags": flags, "index": index, "start": start, "count": count}
        self.request(Command.DEVICE_SET_IRQS, wire.IrqSet.build({**request, "data": data}), fds)

    def eventfds(self, index: int = Irq.INTX, count: int = 1) -> list[EventFd]:
        """Sets an eventfd for each of the first `count` vectors of a type; returns them.

        In several requests, if they are more than the server takes in a message: the capability max_msg_fds, or 1.
        """
        events = [EventFd() for _ in range(count)]
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.TRIGGER
        limit = self.capabilities.get("max_msg_fds", 1)
        step = max(limit, 1) if isinstance(limit, int) else 1
        for start in range(0, count, step):
            fds = [event.fd for event in events[start : start + step]]
            self.set_irqs(index, flags, start, len(fds), fds=fds)
        return events

    def reset(self) -> None:
        """DEVICE_RESET."""
        self.request(Command.DEVICE_RESET)

    # ---- memory -----------------------------------------------------------------------------

    def map_dma(
        self,
        address: int,
        size: int,
        *,
        fd: int | None = None,
        offset: int = 0,
        flags: int = DmaMapFlags.READABLE | DmaMapFlags.WRITEABLE,
    ) -> None:
        """DMA_MAP of guest memory at `address`, from `offset` of the file `fd`; without a file if `fd` is None."""
        request = {"argsz": 32, "flags": flags, "offset": offset, "address": address, "size": size}
        self.request(Command.DMA_MAP, wire.DmaMap.build(request), () if fd is None else (fd,))

    def unmap_dma(self, address: int, size: int, *, everything: bool = False) -> None:
        """DMA_UNMAP; `everything`: all windows (the range must be 0, 0 then)."""
        flags = DmaUnmapFlags.ALL if everything else 0
        request = {"argsz": 24, "flags": flags, "address": address, "size": size}
        self.request(Command.DMA_UNMAP, wire.DmaUnmap.build(request))

    def share(self, address: int, size: int, *, by_fd: bool = True) -> Ram:
        """Makes guest memory and maps it at `address`: with its fd, or for access by messages.  `close` frees it."""
        ram = Ram(address, size, shared=by_fd)
        self.ram.append(ram)
        self.map_dma(address, size, fd=ram.fd)
        return ram

    # ---- features, migration ----------------------------------------------------------------

    def feature(self, feature: int, method: int, data: bytes = b"", *, room: int = 1 << 20) -> bytes:
        """DEVICE_FEATURE with `method` of FeatureFlags; returns the reply's data.  `room`: most bytes of that."""
        request = wire.DeviceFeature.build({"argsz": 8 + room, "flags": feature | method, "data": data})
        return bytes(_parse(wire.DeviceFeature, self.request(Command.DEVICE_FEATURE, request).payload).data)

    def set_state(self, state: int) -> None:
        """Moves the device to a migration state."""
        data = wire.MigState.build({"device_state": state, "data_fd": 0})
        self.feature(Feature.MIG_DEVICE_STATE, FeatureFlags.SET, data)

    def state(self) -> int:
        """The device's migration state."""
        data = self.feature(Feature.MIG_DEVICE_STATE, FeatureFlags.GET)
        return int(_parse(wire.MigState, data).device_state)

    def migration_read(self, size: int = 65536) -> bytes:
        """Reads the whole saved state by MIG_DATA_READs of `size` bytes.  OSError(EFBIG): it does not end."""
        parts = []
        for _ in range(MAX_STATE // size + 1):
            request = wire.MigData.build({"argsz": 8 + size, "size": size, "data": b""})
            data = _parse(wire.MigData, self.request(Command.MIG_DATA_READ, request).payload).data
            parts.append(data)
            if len(data) < size:
                return b"".join(parts)
        raise OSError(errno.EFBIG, f"a state of more than {MAX_STATE} bytes")

    def migration_write(self, data: bytes, size: int = 65536) -> None:
        """Writes a state to resume from by MIG_DATA_WRITEs of `size` bytes."""
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            request = wire.MigData.build({"argsz": 8 + len(piece), "size": len(piece), "data": piece})
            self.request(Command.MIG_DATA_WRITE, request)

    def dirty_start(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """DMA_LOGGING_START for (iova, length) ranges; none: all memory."""
        entries = [{"iova": iova, "length": length} for iova, length in ranges]
        start = {"page_size": PAGE, "num_ranges": len(entries), "reserved": 0, "ranges": entries}
        self.feature(Feature.DMA_LOGGING_START, FeatureFlags.SET, wire.DmaLoggingStart.build(start))

    def dirty_stop(self) -> None:
        """DMA_LOGGING_STOP."""
        self.feature(Feature.DMA_LOGGING_STOP, FeatureFlags.SET)

    def dirty_report(self, iova: int, length: int, page_size: int = PAGE) -> set[int]:
        """DMA_LOGGING_REPORT; returns the dirty pages by number, page 0 begins at `iova`."""
        report = wire.DmaLoggingReport.build({"iova": iova, "length": length, "page_size": page_size})
        data = self.feature(Feature.DMA_LOGGING_REPORT, FeatureFlags.GET, report)
        bits = int.from_bytes(data[len(report) :], "little")
        return {n for n in range(bits.bit_length()) if bits >> n & 1}


def _parse(structure: Any, payload: bytes) -> Any:
    try:
        return structure.parse(payload)
    except ConstructError as error:
        raise OSError(errno.EPROTO, f"a reply of {len(payload)} bytes is too short") from error


def _areas(payload: bytes, at: int) -> tuple[Span, ...]:
    """The areas of the sparse mmap capability in the list that begins at `at`; empty: there is no such capability."""
    seen = set()
    while at:
        if at in seen:
            raise OSError(errno.EPROTO, "the list of capabilities is a loop")
        seen.add(at)
        head = _parse(wire.CapHeader, payload[at:])
        if head.id == wire.CAP_SPARSE_MMAP:
            sparse = _parse(wire.SparseMmap, payload[at + wire.CapHeader.sizeof() :])
            try:
                return tuple(Span.sized(area.offset, area.size) for area in sparse.areas)
            except ValueError as error:
                raise OSError(errno.EPROTO, "an area is empty or wraps") from error
        at = head.next
    return ()
