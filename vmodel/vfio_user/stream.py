"""Sends and receives whole messages with their fds on a socket: the client's side of section "Header".

The server is not trusted: OSError(EPROTO) if it sends anything but messages, and every wait is bounded.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from vmodel.vfio_user import wire

#: For pytest: what fails here is shown at the line of the test that called.
__tracebackhide__ = True

#: Longest message that is accepted, in bytes: QEMU's largest transfer, and room for the structures.
MOST_BYTES = (64 << 20) + 4096
#: Most fds that the kernel passes in one message (SCM_MAX_FD).
MOST_FDS = 253


class Closed(ConnectionError):
    """The server has closed the connection."""


@dataclass(frozen=True)
class Message:
    """A received message.  The receiver has to close its fds."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: tuple[int, ...] = ()

    def close(self) -> None:
        """Closes the message's fds."""
        for fd in self.fds:
            os.close(fd)


class Stream:
    """One socket.  One thread may receive while others send."""

    def __init__(self, sock: socket.socket, timeout: float = 5.0) -> None:
        """`timeout` (seconds) bounds a send."""
        self.sock = sock
        self.timeout = timeout
        self._data = bytearray()
        self._fds: list[int] = []
        self._whole: deque[Message] = deque()
        self._reading = threading.Lock()
        self._sending = threading.Lock()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends all of `data`, and the fds with its first byte.  TimeoutError; OSError: the server has disconnected.

        While the socket is full, incoming messages are read and kept.  Otherwise two ends that both send and do not
        read would deadlock.
        """
        deadline = time.monotonic() + self.timeout
        rest = memoryview(data)
        with self._sending:
            while rest:
                try:
                    if fds:
                        sent = socket.send_fds(self.sock, [rest], list(fds), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                    else:
                        sent = self.sock.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    self._make_room(deadline)
                    continue
                rest, fds = rest[sent:], ()

    def _make_room(self, deadline: float) -> None:
        mine = self._reading.acquire(blocking=False)  # else another thread is reading, with the same effect
        try:
            readable, writable = self._wait(deadline, read=mine, write=True)
            if readable and not writable and not self._fill():
                raise Closed("end of stream")
        finally:
            if mine:
                self._reading.release()

    def receive(self, deadline: float) -> Message:
        """Waits for the next message until `deadline` (time.monotonic()).

        TimeoutError: a part of a message that was received stays for the next call.  Closed; OSError(EPROTO).
        """
        with self._reading:
            while not self._whole:
                self._wait(deadline, read=True, write=False)
                if not self._fill():
                    raise Closed("end of stream")
            return self._whole.popleft()

    def _wait(self, deadline: float, *, read: bool, write: bool) -> tuple[bool, bool]:
        interest = (select.POLLIN if read else 0) | (select.POLLOUT if write else 0)
        poll = select.poll()
        poll.register(self.sock, interest)
        events = poll.poll(max(deadline - time.monotonic(), 0) * 1000)
        if not events:
            raise TimeoutError("the server does not read" if write else "no message from the server")
        seen = events[0][1]
        return bool(seen & ~select.POLLOUT) and read, bool(seen & ~select.POLLIN) and write

    def _fill(self) -> bool:
        """Receives once; returns False at the end of the stream.

        Never reads past the current message, so fds that arrive belong to it.
        """
        try:
            data, fds, flags, _ = socket.recv_fds(self.sock, self._missing(), MOST_FDS, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        self._fds += fds
        self._data += data
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, "fds of a message were lost, as this process has no room for them")
        if len(self._data) >= wire.HEADER_SIZE and not self._missing():
            header = wire.Header.parse(bytes(self._data[: wire.HEADER_SIZE]))
            payload, fds = bytes(self._data[wire.HEADER_SIZE :]), self._fds
            self._data, self._fds = bytearray(), []
            self._whole.append(
                Message(header.id, header.command, header.flags, header.error, payload, tuple(fds)),
            )
        return bool(data)

    def _missing(self) -> int:
        if len(self._data) < wire.HEADER_SIZE:
            return wire.HEADER_SIZE - len(self._data)
        size = int(wire.Header.parse(bytes(self._data[: wire.HEADER_SIZE])).size)
        if not wire.HEADER_SIZE <= size <= MOST_BYTES:
            raise OSError(errno.EPROTO, f"the server sent a message of {size} bytes")
        return size - len(self._data)

    def shutdown(self) -> None:
        """Ends the connection; a receive() under way in another thread raises Closed."""
        with suppress(OSError):  # the server has disconnected already
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket, and the fds of messages that were not fetched."""
        for message in self._whole:
            message.close()
        self._whole.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self.sock.close()
