"""One vfio-user connection; see vms_chan_*, vms_enter and vms_reply."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from vmodel._shim.function import FunctionRegions
from vmodel._shim.handle import check, create
from vmodel._shim.memory import Memory
from vmodel._vmshim import ffi, lib

BATCH: int = lib.VMS_BATCH
#: Deadline that never comes.
FOREVER = 2**64 - 1

EXIT_READ: int = lib.VMS_EXIT_READ
EXIT_WRITE: int = lib.VMS_EXIT_WRITE
EXIT_POSTED: int = lib.VMS_EXIT_POSTED
EXIT_COMMAND: int = lib.VMS_EXIT_COMMAND
EXIT_REPLY: int = lib.VMS_EXIT_REPLY
EXIT_TIMEOUT: int = lib.VMS_EXIT_TIMEOUT
EXIT_WAKE: int = lib.VMS_EXIT_WAKE
EXIT_EVENT: int = lib.VMS_EXIT_EVENT
EXIT_CLOSED: int = lib.VMS_EXIT_CLOSED

_enter = lib.vms_enter
#: vms_access: offset, value, key, region, count.
ACCESS = struct.Struct("<QQQII")
if ffi.sizeof("vms_access") != ACCESS.size:
    raise ImportError("struct vms_access of vmshim.h has another size than vmodel._shim.ACCESS")


def key(region: int, offset: int, count: int) -> int:
    """An access as one number; see vms_key."""
    return int(lib.vms_key(region, offset, count))


class Channel:
    """One vfio-user connection; belongs to one thread, but for `shutdown`."""

    def __init__(
        self, function: FunctionRegions, memory: Memory, socket: int, max_xfer: int, max_fds: int, send_ms: int
    ) -> None:
        self.function = function
        self.memory = memory
        self.handle = create(
            lib.vms_chan_create,
            lib.vms_chan_destroy,
            "vms_chan",
            function.handle,
            memory.handle,
            socket,
            max_xfer,
            max_fds,
            send_ms,
        )
        #: The C struct that `enter` fills; see vms_run.
        self.run = lib.vms_chan_run(self.handle)

    def open(self, peer_xfer: int, twin: int) -> None:
        check(lib.vms_chan_open(self.handle, peer_xfer, twin))

    def enter(self, deadline_ns: int) -> int:
        """Serves the client until Python is needed; the EXIT_* reason."""
        reason: int = _enter(self.handle, deadline_ns)
        return reason if reason > 0 else check(reason)

    def complete(self) -> None:
        """Completes the access at hand and sends what is still unsent."""
        check(lib.vms_complete(self.handle))

    def payload(self) -> bytes:
        """The payload of the COMMAND, REPLY or WRITE at hand."""
        run = self.run
        return bytes(ffi.buffer(run.data, run.len)) if run.len else b""

    def accesses(self) -> bytes:
        """The vms_access structs of the POSTED exit at hand, packed."""
        run = self.run
        return bytes(ffi.buffer(run.accesses, run.n_accesses * ACCESS.size))

    def fds(self) -> list[int]:
        """The fds of the COMMAND at hand, now the caller's to close."""
        run = self.run
        return [run.fds[i] for i in range(run.n_fds)]

    def fill(self, data: bytes) -> None:
        """The answer to a READ of more than 8 bytes."""
        ffi.memmove(self.run.data, data, len(data))

    def reply(self, id: int, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        check(lib.vms_reply(self.handle, id, command, 0, payload, len(payload), list(fds), len(fds)))

    def reply_error(self, id: int, command: int, code: int) -> None:
        check(lib.vms_reply(self.handle, id, command, code, ffi.NULL, 0, ffi.NULL, 0))

    def command(self, id: int, command: int, head: bytes, data: Any = b"", size: int = 0) -> None:
        check(lib.vms_command(self.handle, id, command, head, len(head), data, size))

    def shutdown(self) -> None:
        """Any thread: ends the connection."""
        lib.vms_chan_shutdown(self.handle)  # ENOTCONN: it is gone already, which is what was asked for

    def close(self) -> None:
        ffi.release(self.handle)
