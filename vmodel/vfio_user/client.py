"""An independent vfio-user client, for tests and for anyone who wants to drive a device without QEMU.

It shares only `wire` with the server's side.  Errors of the server's are OSError with the errno of the reply.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmodel.span import PAGE, Span
from vmodel.vfio_user import wire
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

DEFAULT_CAPABILITIES: dict[str, Any] = {
    "max_msg_fds": 8,
    "max_data_xfer_size": 1 << 20,
    "max_dma_maps": 65535,
    "pgsizes": PAGE,
    "write_multiple": True,
}


class Closed(ConnectionError):
    """The server has closed the connection."""


@dataclass(frozen=True)
class Message:
    """One message as it came."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: tuple[int, ...] = ()


@dataclass(frozen=True)
class ClientRegion:
    """A region; `fd` is the client's to close, None when it cannot be mapped."""

    size: int
    flags: int
    areas: tuple[Span, ...]
    fd: int | None


class EventFd:
    """An eventfd that the server signals."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wait(self, timeout: float = 5.0) -> int:
        """How often it was signalled since; TimeoutError when not at all in time."""
        if not select.select([self.fd], [], [], timeout)[0]:
            raise TimeoutError("the eventfd was not signalled")
        return os.eventfd_read(self.fd)

    def quiet(self, seconds: float = 0.05) -> bool:
        """Whether it stays unsignalled for a while."""
        return not select.select([self.fd], [], [], seconds)[0]

    def close(self) -> None:
        os.close(self.fd)


class Ram:
    """Guest memory at `address`: `view` is its bytes.  `fd` None: the server reaches it by messages only."""

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
        self.view.release()
        if isinstance(self._map, mmap.mmap):
            self._map.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Stream:
    """Whole messages in and out of one socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = b""
        self._fds: list[int] = []

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """All of `data`; fds go with its first byte."""
        if fds:
            sent = socket.send_fds(self.sock, [data], list(fds))
            data = data[sent:]
        if data:
            self.sock.sendall(data)

    def receive(self, deadline: float) -> Message:
        """The next message.  TimeoutError, or Closed."""
        head = self._bytes(wire.HEADER_SIZE, deadline)
        header = wire.Header.parse(head)
        payload = self._bytes(max(header.size - wire.HEADER_SIZE, 0), deadline)
        fds, self._fds = tuple(self._fds), []
        return Message(header.id, header.command, header.flags, header.error, payload, fds)

    def _bytes(self, count: int, deadline: float) -> bytes:
        while len(self._data) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no message from the server")
            self.sock.settimeout(left)
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, max(count - len(self._data), 1), 16)
            except ConnectionResetError as error:
                raise Closed("connection reset") from error
            self._fds += fds
            if not data:
                raise Closed("end of stream")
            self._data += data
        data, self._data = self._data[:count], self._data[count:]
        return data

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self.sock.close()


class Client:
    """One connection.  `timeout` (seconds) bounds every wait."""

    def __init__(self, sock: socket.socket, *, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self.main = Stream(sock)
        self.twin: Stream | None = None
        self.capabilities: dict[str, Any] = {}
        self.ram: list[Ram] = []
        #: What the server asked for by DMA_READ and DMA_WRITE, as (command, address, count).
        self.dma_log: list[tuple[Command, int, int]] = []
        self._next_id = 1
        self._twin_thread: threading.Thread | None = None

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
        """Leaves; also frees the memory that `share` made."""
        self.main.close()
        if self.twin is not None:
            self.twin.sock.shutdown(socket.SHUT_RDWR)
            if self._twin_thread is not None:
                self._twin_thread.join(self.timeout)
            self.twin.close()
        for ram in self.ram:
            ram.close()
        self.ram.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- messages ---------------------------------------------------------------------------

    def message(self, command: int, payload: bytes = b"", *, flags: int = 0, id: int | None = None) -> bytes:
        """A whole message, not sent; `id` None takes the next one."""
        if id is None:
            id, self._next_id = self._next_id, self._next_id % 0xFFFF + 1
        size = wire.HEADER_SIZE + len(payload)
        return bytes(
            wire.Header.build({"id": id, "command": command, "size": size, "flags": flags, "error": 0}) + payload
        )

    def request(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Sends a command and waits for its reply, answering the server's own commands meanwhile."""
        data = self.message(command, payload)
        self.main.send(data, fds)
        return self.reply(wire.Header.parse(data).id)

    def post(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Sends a command with No_reply."""
        self.main.send(self.message(command, payload, flags=HeaderFlags.NO_REPLY), fds)

    def reply(self, id: int) -> Message:
        """The reply to command `id`; OSError with its errno when that is an error."""
        deadline = time.monotonic() + self.timeout
        while True:
            message = self.main.receive(deadline)
            if message.flags & HeaderFlags.TYPE == HeaderFlags.COMMAND:
                self._answer(self.main, message)
                continue
            if message.id != id:
                raise AssertionError(f"a reply to {message.id}, not to {id}")
            if message.flags & HeaderFlags.ERROR:
                for fd in message.fds:
                    os.close(fd)
                if message.payload:
                    raise AssertionError("an error reply with a payload")
                raise OSError(message.error, os.strerror(message.error))
            return message

    def serve(self, seconds: float) -> None:
        """Answers the server's commands for a while."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                message = self.main.receive(deadline)
            except TimeoutError:
                return
            self._answer(self.main, message)

    def _answer(self, stream: Stream, message: Message) -> None:
        """DMA_READ and DMA_WRITE, out of the memory that was mapped."""
        try:
            payload = self._dma(message)
            flags, code = HeaderFlags.REPLY, 0
        except OSError as error:
            payload, flags, code = b"", HeaderFlags.REPLY | HeaderFlags.ERROR, error.errno or errno.EIO
        head = {"id": message.id, "command": message.command, "flags": flags, "error": code}
        head["size"] = wire.HEADER_SIZE + len(payload)
        stream.send(wire.Header.build(head) + payload)

    def _dma(self, message: Message) -> bytes:
        access = wire.DmaAccess.parse(message.payload)
        self.dma_log.append((Command(message.command), access.address, access.count))
        for ram in self.ram:
            at = access.address - ram.address
            if at >= 0 and at + access.count <= ram.size:
                break
        else:
            raise OSError(errno.EFAULT, "no such memory")
        reply = {"address": access.address, "count": access.count, "data": b""}
        if message.command == Command.DMA_READ:
            reply["data"] = bytes(ram.view[at : at + access.count])
        elif message.command == Command.DMA_WRITE and len(access.data) == access.count:
            ram.view[at : at + access.count] = access.data
        else:
            raise OSError(errno.EINVAL, "no DMA command")
        return bytes(wire.DmaAccess.build(reply))

    # ---- the handshake ----------------------------------------------------------------------

    def negotiate(self, *, twin_socket: bool = False, **capabilities: Any) -> dict[str, Any]:
        """VERSION; the server's capabilities.  `capabilities` replace the defaults; None leaves one out."""
        offered = {**DEFAULT_CAPABILITIES, **capabilities}
        offered = {key: value for key, value in offered.items() if value is not None}
        if twin_socket:
            offered["twin_socket"] = {"supported": True}
        text = json.dumps({"capabilities": offered}).encode() + b"\0"
        reply = self.request(Command.VERSION, wire.Version.build({"major": 0, "minor": 0, "data": text}))
        data = wire.Version.parse(reply.payload).data
        self.capabilities = json.loads(data.rstrip(b"\0"))["capabilities"]
        twin = self.capabilities.get("twin_socket", {})
        if twin.get("supported"):
            self.twin = Stream(socket.socket(fileno=reply.fds[twin["fd_index"]]))
            self._twin_thread = threading.Thread(target=self._serve_twin, args=(self.twin,), daemon=True)
            self._twin_thread.start()
        return self.capabilities

    def _serve_twin(self, twin: Stream) -> None:
        try:
            while True:
                self._answer(twin, twin.receive(time.monotonic() + 3600))
        except (Closed, OSError):
            return  # the connection has ended

    # ---- the device -------------------------------------------------------------------------

    def info(self) -> Any:
        """DEVICE_GET_INFO: flags, num_regions, num_irqs."""
        request = {"argsz": 16, "flags": 0, "num_regions": 0, "num_irqs": 0}
        return wire.DeviceInfo.parse(self.request(Command.DEVICE_GET_INFO, wire.DeviceInfo.build(request)).payload)

    def region_info(self, index: int) -> ClientRegion:
        """DEVICE_GET_REGION_INFO, asked again with more room if need be."""
        head = wire.RegionInfoHead.sizeof()
        argsz = head
        while True:
            request = {"argsz": argsz, "flags": 0, "index": index, "cap_offset": 0, "size": 0, "offset": 0}
            reply = self.request(Command.DEVICE_GET_REGION_INFO, wire.RegionInfoHead.build(request))
            info = wire.RegionInfoHead.parse(reply.payload)
            if info.argsz <= argsz:
                break
            for fd in reply.fds:
                os.close(fd)
            argsz = info.argsz
        areas: tuple[Span, ...] = ()
        if info.flags & wire.RegionFlags.MMAP:
            areas = (Span.sized(0, info.size),)
        if info.flags & wire.RegionFlags.CAPS:
            sparse = wire.SparseMmap.parse(reply.payload[info.cap_offset + wire.CapHeader.sizeof() :])
            areas = tuple(Span.sized(area.offset, area.size) for area in sparse.areas)
        return ClientRegion(info.size, info.flags, areas, reply.fds[0] if reply.fds else None)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ."""
        request = {"offset": offset, "region": region, "count": count, "data": b""}
        reply = self.request(Command.REGION_READ, wire.RegionAccess.build(request))
        return bytes(wire.RegionAccess.parse(reply.payload).data)

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """REGION_WRITE; posted: with No_reply."""
        payload = wire.RegionAccess.build({"offset": offset, "region": region, "count": len(data), "data": data})
        if posted:
            self.post(Command.REGION_WRITE, payload)
        else:
            self.request(Command.REGION_WRITE, payload)

    def write_multi(self, writes: Iterable[tuple[int, int, bytes]], *, posted: bool = False) -> int | None:
        """REGION_WRITE_MULTI of (region, offset, data); how many were done."""
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
        return wire.IrqInfoWire.parse(reply.payload)

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
        """DEVICE_SET_IRQS."""
        request = {"argsz": 20 + len(data), "flags": flags, "index": index, "start": start, "count": count}
        self.request(Command.DEVICE_SET_IRQS, wire.IrqSet.build({**request, "data": data}), fds)

    def eventfds(self, index: int = Irq.INTX, count: int = 1) -> list[EventFd]:
        """Gives the first vectors of a type an eventfd each."""
        events = [EventFd() for _ in range(count)]
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.TRIGGER
        self.set_irqs(index, flags, 0, count, fds=[event.fd for event in events])
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
        """DMA_MAP."""
        request = {"argsz": 32, "flags": flags, "offset": offset, "address": address, "size": size}
        self.request(Command.DMA_MAP, wire.DmaMap.build(request), () if fd is None else (fd,))

    def unmap_dma(self, address: int, size: int, *, everything: bool = False) -> None:
        """DMA_UNMAP."""
        flags = DmaUnmapFlags.ALL if everything else 0
        request = {"argsz": 24, "flags": flags, "address": address, "size": size}
        self.request(Command.DMA_UNMAP, wire.DmaUnmap.build(request))

    def share(self, address: int, size: int, *, by_fd: bool = True) -> Ram:
        """Makes guest memory at `address` and maps it, by fd or for messages; freed by `close`."""
        ram = Ram(address, size, shared=by_fd)
        self.ram.append(ram)
        self.map_dma(address, size, fd=ram.fd)
        return ram

    # ---- features, migration ----------------------------------------------------------------

    def feature(self, feature: int, method: int, data: bytes = b"", *, room: int = 1 << 20) -> bytes:
        """DEVICE_FEATURE; the reply's data."""
        request = wire.DeviceFeature.build({"argsz": 8 + room, "flags": feature | method, "data": data})
        return bytes(wire.DeviceFeature.parse(self.request(Command.DEVICE_FEATURE, request).payload).data)

    def set_state(self, state: int) -> None:
        """Moves the device to a migration state."""
        data = wire.MigState.build({"device_state": state, "data_fd": 0})
        self.feature(Feature.MIG_DEVICE_STATE, FeatureFlags.SET, data)

    def state(self) -> int:
        """The device's migration state."""
        data = self.feature(Feature.MIG_DEVICE_STATE, FeatureFlags.GET)
        return int(wire.MigState.parse(data).device_state)

    def migration_read(self, size: int = 65536) -> bytes:
        """All of the saved state, in pieces of `size`."""
        parts = []
        while True:
            request = wire.MigData.build({"argsz": 8 + size, "size": size, "data": b""})
            data = wire.MigData.parse(self.request(Command.MIG_DATA_READ, request).payload).data
            parts.append(data)
            if len(data) < size:
                return b"".join(parts)

    def migration_write(self, data: bytes, size: int = 65536) -> None:
        """Feeds a state in, in pieces of `size`."""
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            request = wire.MigData.build({"argsz": 8 + len(piece), "size": len(piece), "data": piece})
            self.request(Command.MIG_DATA_WRITE, request)

    def dirty_start(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """DMA_LOGGING_START over (iova, length) ranges."""
        entries = [{"iova": iova, "length": length} for iova, length in ranges]
        start = {"page_size": PAGE, "num_ranges": len(entries), "reserved": 0, "ranges": entries}
        self.feature(Feature.DMA_LOGGING_START, FeatureFlags.SET, wire.DmaLoggingStart.build(start))

    def dirty_stop(self) -> None:
        """DMA_LOGGING_STOP."""
        self.feature(Feature.DMA_LOGGING_STOP, FeatureFlags.SET)

    def dirty_report(self, iova: int, length: int, page_size: int = PAGE) -> set[int]:
        """DMA_LOGGING_REPORT: numbers of the dirty pages, from `iova` on."""
        report = wire.DmaLoggingReport.build({"iova": iova, "length": length, "page_size": page_size})
        data = self.feature(Feature.DMA_LOGGING_REPORT, FeatureFlags.GET, report)
        bits = int.from_bytes(data[len(report) :], "little")
        return {n for n in range(bits.bit_length()) if bits >> n & 1}
