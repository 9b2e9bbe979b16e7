"""The server's side of each command, without a socket: one section a command, wrong sizes first."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from tests.unit.backend import Device, call, hello, open_fds, query, refused
from vmodel.errors import PeerError
from vmodel.vfio_user import wire
from vmodel.vfio_user.commands import IoEventFd, IrqAction, Reply, Session, SetIrqs
from vmodel.vfio_user.wire import Command, IrqSetFlags


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


# ---- DEVICE_GET_INFO ---------------------------------------------------------------------------------

#: Commands that ask for a structure: its size, and a request's other fields.
QUERIES = {
    Command.DEVICE_GET_INFO: 16,
    Command.DEVICE_GET_REGION_INFO: 32,
    Command.DEVICE_GET_REGION_IO_FDS: 16,
    Command.DEVICE_GET_IRQ_INFO: 16,
}


@pytest.mark.parametrize(("command", "size"), QUERIES.items())
def test_sizes_of_queries(session: Session, command: int, size: int) -> None:
    index = 7 if command in (Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_REGION_IO_FDS) else 0

    def request(**kwargs: int) -> bytes:
        return query(size, index, **kwargs)

    for length in (0, 1, 4, size - 1):
        assert refused(session, command, request(length=length)[:length]) == errno.EINVAL
    for argsz in (0, size - 1):
        assert refused(session, command, request(argsz=argsz)) == errno.EINVAL
    assert refused(session, command, request(length=size + 1)) == errno.EINVAL  # longer than its argsz
    assert len(call(session, command, request()).payload) == size
    # The ioctl's whole buffer, as SPDK sends it, and room without a buffer.
    assert len(call(session, command, request(argsz=4064, length=4064)).payload) == size
    assert len(call(session, command, request(argsz=2**32 - 1)).payload) == size


def test_device_info(session: Session) -> None:
    assert struct.unpack("<4I", call(session, Command.DEVICE_GET_INFO, query(16)).payload) == (16, 3, 9, 5)


# ---- DEVICE_GET_REGION_INFO --------------------------------------------------------------------------


def region(session: Session, index: int, argsz: int = 32) -> tuple[Any, Reply]:
    reply = call(session, Command.DEVICE_GET_REGION_INFO, query(32, index, argsz=argsz))
    return wire.RegionInfoHead.parse(reply.payload), reply


@pytest.mark.parametrize("index", [9, 2**31, 2**32 - 1])
def test_regions_that_are_not_there(session: Session, index: int) -> None:
    assert refused(session, Command.DEVICE_GET_REGION_INFO, query(32, index)) == errno.EINVAL


def test_plain_regions(session: Session) -> None:
    for index, size, flags in ((2, 0x800, 1), (3, 0, 0), (7, 4096, 3), (8, 0, 0)):
        info, reply = region(session, index, 4096)
        assert (info.argsz, info.flags, info.index, info.cap_offset) == (32, flags, index, 0)
        assert (info.size, info.offset, reply.fds) == (size, 0, ())


def test_a_region_that_is_mappable_as_a_whole(session: Session, device: Device) -> None:
    info, reply = region(session, 1, 4096)
    assert (info.argsz, info.flags, info.cap_offset, len(reply.payload)) == (32, 7, 0, 32)
    assert (reply.fds, reply.temporary) == ((device.mappable,), ())


def test_sparse_areas(session: Session, device: Device) -> None:
    info, reply = region(session, 0, 80)
    assert (info.argsz, info.flags, info.cap_offset, len(reply.payload)) == (80, 15, 32, 80)
    assert reply.fds == (device.mappable,)
    assert struct.unpack("<HHI", reply.payload[32:40]) == (1, 1, 0)  # sparse mmap, version 1, the last
    assert struct.unpack("<II4Q", reply.payload[40:]) == (2, 0, 0x1000, 0x1000, 0x3000, 0x2000)


@pytest.mark.parametrize("argsz", [32, 33, 79])
def test_areas_that_do_not_fit(session: Session, argsz: int) -> None:
    info, reply = region(session, 0, argsz)
    assert (info.argsz, len(reply.payload)) == (80, 32)


def test_a_client_that_takes_no_fds_cannot_map(device: Device) -> None:
    session = Session(device)
    hello(session, {"max_msg_fds": 0})
    info, reply = region(session, 0, 80)
    assert (info.argsz, info.flags, reply.fds) == (32, 3, ())


# ---- DEVICE_GET_REGION_IO_FDS ------------------------------------------------------------------------


def test_io_fds(session: Session, device: Device) -> None:
    reply = call(session, Command.DEVICE_GET_REGION_IO_FDS, query(16, 0, argsz=96))
    assert struct.unpack("<4I", reply.payload[:16]) == (96, 0, 0, 2)
    assert reply.fds == (device.doorbell,)  # shared by both
    assert struct.unpack("<QQIIIIQ", reply.payload[16:56]) == (0x10, 4, 0, 0, 0, 0, 0)
    assert struct.unpack("<QQIIIIQ", reply.payload[56:]) == (0x20, 2, 0, 0, 1, 0, 7)


def test_io_fds_that_do_not_fit(session: Session) -> None:
    for argsz in (16, 56, 95):
        reply = call(session, Command.DEVICE_GET_REGION_IO_FDS, query(16, 0, argsz=argsz))
        assert (struct.unpack("<4I", reply.payload), reply.fds) == ((96, 0, 0, 2), ())


def test_io_fds_of_other_regions(session: Session) -> None:
    reply = call(session, Command.DEVICE_GET_REGION_IO_FDS, query(16, 7, argsz=4096))
    assert (struct.unpack("<4I", reply.payload), reply.fds) == ((16, 0, 7, 0), ())
    assert refused(session, Command.DEVICE_GET_REGION_IO_FDS, query(16, 9)) == errno.EINVAL


@pytest.mark.parametrize(("flags", "count"), [(1, 0), (0, 1)])
def test_io_fds_with_fields_set(session: Session, flags: int, count: int) -> None:
    payload = struct.pack("<4I", 96, flags, 0, count)
    assert refused(session, Command.DEVICE_GET_REGION_IO_FDS, payload) == errno.EINVAL


def test_more_io_fds_than_the_client_takes(session: Session, device: Device) -> None:
    device.events = [IoEventFd(4 * n, 4, 1000 + n) for n in range(9)]
    payload = query(16, 0, argsz=4096)
    assert refused(session, Command.DEVICE_GET_REGION_IO_FDS, payload) == errno.ENOSPC
    device.events.pop()
    assert len(call(session, Command.DEVICE_GET_REGION_IO_FDS, payload).fds) == 8


# ---- DEVICE_GET_IRQ_INFO -----------------------------------------------------------------------------


def test_irq_info(session: Session) -> None:
    for index, flags, count in ((0, 3, 1), (1, 3, 0), (2, 3, 8), (3, 1, 1), (4, 1, 1)):
        payload = call(session, Command.DEVICE_GET_IRQ_INFO, query(16, index)).payload
        assert struct.unpack("<4I", payload) == (16, flags, index, count)
    for index in (5, 2**32 - 1):
        assert refused(session, Command.DEVICE_GET_IRQ_INFO, query(16, index)) == errno.EINVAL


# ---- DEVICE_SET_IRQS ---------------------------------------------------------------------------------

DATA = (IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD)
ACTIONS = {
    IrqSetFlags.MASK: IrqAction.MASK,
    IrqSetFlags.UNMASK: IrqAction.UNMASK,
    IrqSetFlags.TRIGGER: IrqAction.TRIGGER,
}
NONE, BOOL, EVENTFD, TRIGGER = *DATA, IrqSetFlags.TRIGGER


def irqs(
    flags: int, index: int = 2, start: int = 0, count: int = 1, data: bytes = b"", *, argsz: int | None = None
) -> bytes:
    return struct.pack("<5I", 20 + len(data) if argsz is None else argsz, flags, index, start, count) + data


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("size", range(20))
def test_set_irqs_too_short(session: Session, size: int) -> None:
    assert refused(session, Command.DEVICE_SET_IRQS, irqs(NONE | TRIGGER)[:size]) == errno.EINVAL


def test_set_irqs_argsz(session: Session) -> None:
    for argsz in (0, 19):
        assert refused(session, Command.DEVICE_SET_IRQS, irqs(NONE | TRIGGER, argsz=argsz)) == errno.EINVAL
    assert refused(session, Command.DEVICE_SET_IRQS, irqs(BOOL | TRIGGER, data=b"\1", argsz=20)) == errno.EINVAL
    assert call(session, Command.DEVICE_SET_IRQS, irqs(NONE | TRIGGER, argsz=4096)) == Reply()


def test_every_value_of_the_flags(session: Session, device: Device, event: int) -> None:
    """The nine legal combinations reach the device as what they are; all others are refused."""
    legal = {data | action: (data, action) for data, action in itertools.product(DATA, ACTIONS)}
    for flags in (*range(256), *(1 << n | NONE | TRIGGER for n in range(6, 32)), 2**32 - 1):
        data = b"\1" if flags & BOOL else b""
        fds = [event] if flags & EVENTFD else []
        if flags not in legal:
            assert refused(session, Command.DEVICE_SET_IRQS, irqs(flags, data=data), fds) == errno.EINVAL
            continue
        assert call(session, Command.DEVICE_SET_IRQS, irqs(flags, data=data), fds) == Reply()
        request, kind = device.irqs.pop(), legal[flags][0]
        assert (request.index, request.start, request.count) == (2, 0, 1)
        assert request.action is ACTIONS[legal[flags][1]]
        if kind is EVENTFD:
            assert isinstance(request.data, tuple)
            os.close(request.data[0])  # the device's now
        else:
            assert request.data == (b"\1" if kind is BOOL else None)
    assert device.irqs == []


@pytest.mark.parametrize("index", [3, 4])
@pytest.mark.parametrize("action", [IrqSetFlags.MASK, IrqSetFlags.UNMASK])
def test_types_that_cannot_be_masked(session: Session, index: int, action: int) -> None:
    assert refused(session, Command.DEVICE_SET_IRQS, irqs(NONE | action, index)) == errno.EINVAL


@pytest.mark.parametrize(
    ("index", "start", "count"),
    [
        (2, 8, 1),
        (2, 0, 9),
        (2, 7, 2),
        (2, 8, 0),
        (2, 2**32 - 1, 1),
        (2, 1, 2**32 - 1),
        (2, 2**31, 2**31),
        (1, 0, 0),
        (1, 0, 1),
        (5, 0, 1),
        (2**32 - 1, 0, 1),
    ],
)
def test_vectors_that_are_not_there(session: Session, device: Device, index: int, start: int, count: int) -> None:
    assert refused(session, Command.DEVICE_SET_IRQS, irqs(NONE | TRIGGER, index, start, count)) == errno.EINVAL
    assert device.irqs == []


def test_the_last_vectors(session: Session, device: Device) -> None:
    call(session, Command.DEVICE_SET_IRQS, irqs(NONE | TRIGGER, 2, 7, 1))
    call(session, Command.DEVICE_SET_IRQS, irqs(BOOL | TRIGGER, 2, 0, 8, b"\1\0" * 4))
    assert [(r.start, r.count, r.data) for r in device.irqs] == [(7, 1, None), (0, 8, b"\1\0" * 4)]


def test_disabling_a_type(session: Session, device: Device) -> None:
    call(session, Command.DEVICE_SET_IRQS, irqs(NONE | TRIGGER, 2, 0, 0))
    assert device.irqs == [SetIrqs(2, IrqAction.TRIGGER, 0, 0, None)]
    for flags, start in (
        (NONE | TRIGGER, 1),
        (NONE | IrqSetFlags.MASK, 0),
        (BOOL | TRIGGER, 0),
        (EVENTFD | TRIGGER, 0),
    ):
        assert refused(session, Command.DEVICE_SET_IRQS, irqs(flags, 2, start, 0)) == errno.EINVAL


@pytest.mark.parametrize(
    ("flags", "count", "data", "fds"),
    [
        (BOOL | TRIGGER, 2, b"\1", 0),
        (BOOL | TRIGGER, 2, b"\1\1\1", 0),
        (NONE | TRIGGER, 1, b"\1", 0),
        (EVENTFD | TRIGGER, 1, b"\0\0\0\0", 1),
        (EVENTFD | TRIGGER, 2, b"", 1),
        (EVENTFD | TRIGGER, 1, b"", 2),
        (NONE | TRIGGER, 1, b"", 1),
        (BOOL | TRIGGER, 1, b"\1", 1),
        (EVENTFD | TRIGGER, 0, b"", 1),
    ],
)
def test_data_that_do_not_match(
    session: Session, device: Device, event: int, flags: int, count: int, data: bytes, fds: int
) -> None:
    before = open_fds()
    payload = irqs(flags, 2, 0, count, data)
    assert refused(session, Command.DEVICE_SET_IRQS, payload, [event] * fds) == errno.EINVAL
    assert device.irqs == []
    assert open_fds() == before


def test_taking_eventfds_away(session: Session, device: Device) -> None:
    call(session, Command.DEVICE_SET_IRQS, irqs(EVENTFD | TRIGGER, 2, 3, 2))
    assert device.irqs == [SetIrqs(2, IrqAction.TRIGGER, 3, 2, (-1, -1))]


@pytest.mark.parametrize("error", [PeerError(errno.EINVAL, "no eventfd"), RuntimeError("a bug")])
def test_eventfds_that_the_device_refuses_are_closed(
    session: Session, device: Device, event: int, error: Exception
) -> None:
    device.fail = error
    before = open_fds()
    with pytest.raises(type(error)):
        call(session, Command.DEVICE_SET_IRQS, irqs(EVENTFD | TRIGGER, 2, 0, 2), [event, event])
    assert open_fds() == before


# ---- DMA_READ, DMA_WRITE, unknown commands; fds ------------------------------------------------------


@pytest.mark.parametrize("command", [Command.DMA_READ, Command.DMA_WRITE])
def test_commands_that_are_ours_to_send(session: Session, command: int) -> None:
    assert refused(session, command, bytes(16)) == errno.EINVAL


@pytest.mark.parametrize("command", [0, 14, 19, 0x7FFF, 0xFFFF])
def test_commands_that_are_none(session: Session, command: int) -> None:
    assert refused(session, command, bytes(16)) == errno.ENOTSUP


@pytest.mark.parametrize("command", [*Command, 0, 14, 99])
def test_fds_that_a_command_does_not_take_are_closed(session: Session, event: int, command: int) -> None:
    before = open_fds()
    with suppress(PeerError):
        call(session, command, query(32), [event] * 3)
    assert open_fds() == before


def test_fds_do_not_make_a_command_wrong(session: Session, event: int) -> None:
    assert len(call(session, Command.DEVICE_GET_INFO, query(16), [event]).payload) == 16


# ---- DEVICE_RESET ------------------------------------------------------------------------------------


def test_reset(session: Session, device: Device) -> None:
    assert refused(session, Command.DEVICE_RESET, b"x") == errno.EINVAL
    assert device.calls == []
    assert call(session, Command.DEVICE_RESET) == Reply()
    assert device.calls == ["reset"]
