"""A device for the tests of the protocol's server side, and how to send it commands without a socket."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest

from vmodel.errors import PeerError
from vmodel.span import Span
from vmodel.vfio_user.commands import FdList, IoEventFd, IrqInfo, RegionInfo, Reply, Session, SetIrqs
from vmodel.vfio_user.wire import Command, IrqFlags


class Log:
    """Guest memory's dirty log: remembers what it was asked."""

    def __init__(self) -> None:
        self.spans: list[Span] | None = None

    def dirty_start(self, spans: Sequence[Span]) -> None:
        if self.spans is not None:
            raise OSError(errno.EBUSY, "on already")
        self.spans = list(spans)

    def dirty_stop(self) -> None:
        if self.spans is None:
            raise OSError(errno.EINVAL, "off")
        self.spans = None

    def dirty_report(self, span: Span, page_size: int) -> bytes:
        if self.spans is None:
            raise OSError(errno.EINVAL, "off")
        return b"\x05".ljust((span.size // page_size + 63) // 64 * 8, b"\0")


class Device:
    """A backend that remembers what it was asked."""

    def __init__(self) -> None:
        self.memory = Log()
        self.calls: list[str] = []
        self.irqs: list[SetIrqs] = []
        self.state = b"state of the device"
        self.fail: BaseException | None = None
        self.doorbell, self.mappable = os.eventfd(0), os.memfd_create("region")
        self.events = [IoEventFd(0x10, 4, self.doorbell), IoEventFd(0x20, 2, self.doorbell, datamatch=7)]
        whole = (Span.sized(0, 0x2000),)
        sparse = (Span.sized(0x1000, 0x1000), Span.sized(0x3000, 0x2000))
        self.region_infos = [
            RegionInfo(0x8000, mmap_fd=self.mappable, mmap_areas=sparse),
            RegionInfo(0x2000, mmap_fd=self.mappable, mmap_areas=whole),
            RegionInfo(0x800, writable=False),
            *[RegionInfo(0)] * 4,
            RegionInfo(4096),
            RegionInfo(0),
        ]

    def irq_info(self, index: int) -> IrqInfo:
        maskable = IrqFlags.EVENTFD | IrqFlags.MASKABLE
        return [IrqInfo(1, maskable), IrqInfo(0, maskable), IrqInfo(8, maskable), IrqInfo(1), IrqInfo(1)][index]

    def set_irqs(self, request: SetIrqs) -> None:
        if self.fail:
            raise self.fail
        self.irqs.append(request)

    def reset_device(self) -> None:
        self.calls.append("reset")

    def io_event_fds(self, region: int) -> Sequence[IoEventFd]:
        return self.events if region == 0 else []

    @property
    def max_state(self) -> int:
        return 1 << 20

    def save(self) -> bytes:
        if self.fail:
            raise self.fail
        self.calls.append("save")
        return self.state

    def restore(self, data: bytes) -> None:
        if data != self.state:
            raise PeerError(errno.EINVAL, "not a state")
        self.calls.append("restore")

    def quiesce(self, stopped: bool) -> None:
        self.calls.append("stop" if stopped else "run")

    def close(self) -> None:
        os.close(self.doorbell)
        os.close(self.mappable)


def call(session: Session, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Reply:
    """Carries a command out, as a server does; the fds are duplicated, so the test keeps its own."""
    with closing(FdList([os.dup(fd) for fd in fds])) as received:
        return session.handle(command, payload, received)


def refused(session: Session, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
    with pytest.raises(PeerError) as caught:
        call(session, command, payload, fds)
    return caught.value.errno


def greeting(capabilities: object, major: int = 0, minor: int = 0) -> bytes:
    return struct.pack("<HH", major, minor) + json.dumps({"capabilities": capabilities}).encode() + b"\0"


def hello(session: Session, capabilities: dict[str, Any]) -> Any:
    """VERSION; the capabilities of the answer."""
    reply = call(session, Command.VERSION, greeting(capabilities))
    for fd in reply.temporary:
        os.close(fd)
    assert reply.payload[:4] == bytes(4)
    assert reply.payload[-1:] == b"\0"
    return json.loads(reply.payload[4:-1])["capabilities"]


def open_fds() -> set[str]:
    return {entry.name for entry in os.scandir("/proc/self/fd")}


def query(size: int, index: int = 0, *, argsz: int | None = None, length: int | None = None) -> bytes:
    data = struct.pack("<III", size if argsz is None else argsz, 0, index)
    return data.ljust(size if length is None else length, b"\0")
