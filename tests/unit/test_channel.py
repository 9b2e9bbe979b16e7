"""The shim's channel on a bare socketpair: framing, fds, what it serves itself, what leaves as an exit."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fds import room_for_fds
from tests.waiting import until
from vmodel import _shim
from vmodel.memory import GuestMemory

HEADER = struct.Struct("<HHIII")
ACCESS = struct.Struct("<QII")
MAP = struct.Struct("<IIQQQ")
UNMAP = struct.Struct("<IIQQ")
NO_REPLY, REPLY, ERROR = 0x10, 1, 0x20
DMA_MAP, DMA_UNMAP, GET_INFO, SET_IRQS, READ, WRITE, DMA_READ, MULTI = 2, 3, 4, 8, 9, 10, 11, 15
MAX_XFER = 65536
PLAIN, HOOKED = 0x00, 0x10


def message(command: int, body: bytes = b"", *, id: int = 7, flags: int = 0, size: int | None = None) -> bytes:
    return HEADER.pack(id, command, 16 + len(body) if size is None else size, flags, 0) + body


def read(offset: int, count: int = 4, region: int = 0, **kwargs: int) -> bytes:
    return message(READ, ACCESS.pack(offset, region, count), **kwargs)


def write(offset: int, data: bytes, region: int = 0, **kwargs: int) -> bytes:
    return message(WRITE, ACCESS.pack(offset, region, len(data)) + data, **kwargs)


def multi(*entries: tuple[int, int, bytes], flags: int = 0) -> bytes:
    body = b"".join(ACCESS.pack(o, r, len(d)) + d.ljust(8, b"\0") for r, o, d in entries)
    return message(MULTI, struct.pack("<Q", len(entries)) + body, flags=flags)


class Rig:
    """A function with 16 plain bytes, 16 hooked ones and a hole, its channel, and the client's socket."""

    def __init__(self, opened: bool = True) -> None:
        self.function = _shim.FunctionRegions()
        self.function.define_region(0, 4096)
        self.bank = self.function.add_bank(0, 0, 32)
        policy = _shim.Policy(32)
        policy.store[:] = b"\xff" * 32
        policy.exits[16:] = b"\x03" * 16
        self.function.set_policy(0, 0, policy)
        self.function.define_region(6, 4096, writable=False)
        self.memory = GuestMemory(_shim.Files())
        self.client, server = socket.socketpair()
        self.client.settimeout(5)
        self.channel = _shim.Channel(self.function, self.memory.shim, server.detach(), MAX_XFER, 4, 5000)
        if opened:
            self.channel.open(MAX_XFER, -1)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        if fds:
            socket.send_fds(self.client, [data], fds)
        else:
            self.client.sendall(data)

    def enter(self) -> int:
        """Serves what has been sent; the exit, TIMEOUT when the shim did all by itself."""
        return self.channel.enter(time.monotonic_ns() + 20_000_000)

    def reply(self) -> tuple[tuple[int, int, int, int, int], bytes]:
        header = HEADER.unpack(self.client.recv(16, socket.MSG_WAITALL))
        size = header[2] - 16
        return header, self.client.recv(size, socket.MSG_WAITALL) if size else b""

    def error(self) -> int:
        """The errno of a header-only error reply."""
        (id, _command, size, flags, code), _ = self.reply()
        assert (id, size, flags) == (7, 16, REPLY | ERROR)
        return code

    def silent(self) -> bool:
        return not select.select([self.client], [], [], 0)[0]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.client.close()
    rig.channel.close()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# ---- served without Python ---------------------------------------------------------------------


def test_plain_registers_do_not_exit(rig: Rig) -> None:
    rig.send(write(4, b"\x11\x22\x33\x44") + read(4, 8))
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.reply() == ((7, WRITE, 32, REPLY, 0), ACCESS.pack(4, 0, 4))
    assert rig.reply() == ((7, READ, 40, REPLY, 0), ACCESS.pack(4, 0, 8) + b"\x11\x22\x33\x44" + bytes(4))
    stats = rig.function.stats()
    assert (stats.messages, stats.reads, stats.writes, stats.served) == (2, 1, 1, 2)


def test_a_hole_reads_as_fill(rig: Rig) -> None:
    rig.send(write(100, b"abcd", flags=NO_REPLY) + read(100) + read(30, 1))
    assert rig.enter() == _shim.EXIT_READ
    assert rig.reply()[1][16:] == b"\xff" * 4


def test_hooked_read(rig: Rig) -> None:
    rig.send(read(HOOKED, id=0xBEEF))
    assert rig.enter() == _shim.EXIT_READ
    run = rig.channel.run
    assert (run.region, run.offset, run.count) == (0, HOOKED, 4)
    assert rig.silent()
    run.value = 0x12345678
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.reply() == ((0xBEEF, READ, 36, REPLY, 0), ACCESS.pack(HOOKED, 0, 4) + b"\x78\x56\x34\x12")


def test_a_long_hooked_read(rig: Rig) -> None:
    rig.send(read(0, 32))
    assert rig.enter() == _shim.EXIT_READ
    rig.channel.fill(bytes(range(32)))
    rig.enter()
    assert rig.reply()[1][16:] == bytes(range(32))


def test_hooked_write_waits_for_python(rig: Rig) -> None:
    rig.send(write(HOOKED, b"\x01\x02\x03\x04"))
    assert rig.enter() == _shim.EXIT_WRITE
    assert rig.channel.run.value == 0x04030201
    assert rig.silent()
    rig.channel.complete()
    assert rig.reply() == ((7, WRITE, 32, REPLY, 0), ACCESS.pack(HOOKED, 0, 4))
    assert bytes(rig.bank[HOOKED : HOOKED + 4]) == bytes(4)  # the hook stores, not the shim


def test_a_refused_access_is_an_error_reply(rig: Rig) -> None:
    rig.send(write(HOOKED, b"abcd"))
    assert rig.enter() == _shim.EXIT_WRITE
    rig.channel.run.error = errno.EIO
    rig.enter()
    assert rig.error() == errno.EIO


def accesses(rig: Rig) -> list[tuple[int, ...]]:
    """(offset, value, key, region, count) of each posted write, as vms_access has them."""
    return list(struct.iter_unpack("<QQQII", rig.channel.accesses()))


def test_posted_writes_come_in_batches_and_in_order(rig: Rig) -> None:
    # The plain write in the middle must not overtake the hooked one before it.
    rig.send(
        b"".join(write(at, bytes([n]), flags=NO_REPLY) for n, at in enumerate((PLAIN, HOOKED, PLAIN, HOOKED + 1)))
        + read(PLAIN)
    )
    assert rig.enter() == _shim.EXIT_POSTED
    keys = [_shim.key(0, at, 1) for at in (HOOKED, PLAIN, HOOKED + 1)]
    assert accesses(rig) == [(HOOKED, 1, keys[0], 0, 1), (PLAIN, 2, keys[1], 0, 1), (HOOKED + 1, 3, keys[2], 0, 1)]
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.reply()[1][16:] == b"\0\0\0\0"
    assert rig.silent()


def test_more_posted_writes_than_a_batch_holds(rig: Rig) -> None:
    total = _shim.BATCH + 10
    rig.send(b"".join(write(HOOKED, struct.pack("<I", n), flags=NO_REPLY) for n in range(total)))
    values: list[int] = []
    while len(values) < total:
        assert rig.enter() == _shim.EXIT_POSTED
        values += [value for _, value, _, _, _ in accesses(rig)]
    assert values == list(range(total))


def test_write_multi(rig: Rig) -> None:
    rig.send(multi((0, PLAIN, b"abcd"), (0, HOOKED, b"e"), (0, PLAIN + 4, b"fg")))
    assert rig.enter() == _shim.EXIT_POSTED
    assert bytes(rig.bank[:4]) == b"abcd"
    assert accesses(rig) == [
        (HOOKED, ord("e"), _shim.key(0, HOOKED, 1), 0, 1),
        (PLAIN + 4, 0x6766, _shim.key(0, PLAIN + 4, 2), 0, 2),
    ]
    assert rig.silent()  # the reply says that all is done
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.reply() == ((7, MULTI, 24, REPLY, 0), struct.pack("<Q", 3))


@pytest.mark.parametrize(
    "bad",
    [
        message(MULTI, b"1234567"),
        message(MULTI, struct.pack("<Q", 1)),
        message(MULTI, struct.pack("<Q", 2**61)),
        message(MULTI, struct.pack("<Q", 2**64 - 1) + bytes(24)),
        multi((0, 4096, b"a")),
        multi((9, 0, b"a")),
        multi((0, 0, b"")),
        message(MULTI, struct.pack("<Q", 1) + ACCESS.pack(0, 0, 9) + bytes(8)),
        read(0, 0),
        read(4096, 1),
        read(4093, 4),
        read(2**64 - 1, 4),
        read(0, 4, region=9),
        read(0, 4, region=2**32 - 1),
        read(0, 4, region=3),  # not there
        read(0, 2**32 - 1),
        message(READ, bytes(15)),
        message(READ, ACCESS.pack(0, 0, 4) + b"x"),
        write(0, b""),
        message(WRITE, ACCESS.pack(0, 0, 4) + b"abc"),
        message(WRITE, ACCESS.pack(0, 0, 4) + b"abcde"),
        message(WRITE, ACCESS.pack(0, 0, 2**32 - 1)),
        message(WRITE, b""),
        message(DMA_MAP, MAP.pack(31, 3, 0, 0, 4096)),
        message(DMA_MAP, MAP.pack(32, 0, 0, 0, 4096)),
        message(DMA_MAP, MAP.pack(32, 7, 0, 0, 4096)),
        message(DMA_MAP, MAP.pack(32, 3, 4096, 0, 4096)),  # an offset into no file
        message(DMA_MAP, MAP.pack(32, 3, 0, 1, 4096)),
        message(DMA_MAP, MAP.pack(32, 3, 0, 2**64 - 4096, 8192)),
        message(DMA_MAP, MAP.pack(32, 3, 0, 0, 4096) + b"x"),
        message(DMA_MAP),
        message(DMA_UNMAP, UNMAP.pack(23, 0, 0, 4096)),
        message(DMA_UNMAP, UNMAP.pack(24, 1, 0, 4096)),
        message(DMA_UNMAP, UNMAP.pack(24, 2, 0, 4096)),
        message(DMA_UNMAP, UNMAP.pack(24, 0, 0, 0)),
        message(DMA_UNMAP, UNMAP.pack(24, 0, 2**64 - 4096, 8192)),
        message(DMA_UNMAP),
    ],
)
def test_malformed_commands_are_einval_and_the_stream_lives_on(rig: Rig, bad: bytes) -> None:
    rig.send(bad + read(PLAIN))
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.error() == errno.EINVAL
    assert rig.reply()[0][3] == REPLY
    posted = bytearray(bad)
    posted[8] |= NO_REPLY
    rig.send(bytes(posted) + read(PLAIN))
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.reply()[0][3] == REPLY
    assert rig.silent()


def test_a_region_that_cannot_be_written(rig: Rig) -> None:
    rig.send(write(0, b"x", region=6))
    rig.enter()
    assert rig.error() == errno.EPERM


@pytest.mark.parametrize(
    ("sizes", "allowed"),
    [
        (4, {(0, 4)}),
        (4 | 8, {(0, 4), (0, 8)}),
        (1 | 2 | _shim.MISALIGNED, {(0, 1), (1, 1), (0, 2), (1, 2)}),
        (_shim.SIZE_ODD, {(0, 3), (1, 3), (0, 5)}),
    ],
)
def test_access_sizes(rig: Rig, sizes: int, allowed: set[tuple[int, int]]) -> None:
    policy = _shim.Policy(16)
    policy.store[:] = b"\xff" * 16
    policy.sizes[:] = bytes([sizes]) * 16
    rig.function.set_policy(0, 0, policy)
    for at, size in ((0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3), (0, 4), (2, 4), (0, 5), (0, 8), (4, 8)):
        rig.bank[:16] = bytes(16)
        rig.send(write(at, b"\x5a" * size, flags=NO_REPLY) + read(at, size))
        assert rig.enter() == _shim.EXIT_TIMEOUT
        seen = rig.reply()[1][16:]
        assert seen == (b"\x5a" if (at, size) in allowed else b"\xff") * size
        assert any(rig.bank[:16]) == ((at, size) in allowed)
    rig.send(read(0, 16))
    rig.enter()
    assert rig.reply()[1][16:] == bytes(rig.bank[:16])  # bulk copies always work


# ---- framing -------------------------------------------------------------------------------------


def test_split_at_every_byte(rig: Rig) -> None:
    whole = write(0, b"\x55\xaa\x55\xaa") + read(0) + multi((0, 8, b"wxyz"))
    for cut in range(1, len(whole)):
        rig.send(whole[:cut])
        assert rig.enter() == _shim.EXIT_TIMEOUT
        rig.send(whole[cut:])
        assert rig.enter() == _shim.EXIT_TIMEOUT
        assert rig.reply()[0][1] == WRITE
        assert rig.reply()[1][16:] == b"\x55\xaa\x55\xaa"
        assert rig.reply()[0][1] == MULTI


def test_byte_by_byte_with_fds(rig: Rig) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4096)
    whole = message(DMA_MAP, MAP.pack(32, 3, 0, 0x10000, 4096))
    rig.send(whole[:1], [fd])
    os.close(fd)
    for byte in whole[1:]:
        rig.enter()
        rig.send(bytes([byte]))
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.reply()[0][3] == REPLY
    assert [w.has_file for w in rig.memory.windows()] == [True]


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_size_below_the_header_ends_the_stream(rig: Rig, size: int) -> None:
    rig.send(message(READ, size=size))
    assert rig.enter() == _shim.EXIT_CLOSED
    assert rig.channel.run.error == errno.EPROTO
    assert rig.error() == errno.EINVAL


def test_an_oversized_message_is_drained(rig: Rig) -> None:
    size = MAX_XFER * 20 + 3
    rig.client.setblocking(False)
    data = message(WRITE, size=size) + bytes(size - 16) + read(PLAIN)
    while data:
        with contextlib.suppress(BlockingIOError):
            data = data[rig.client.send(data) :]
        assert rig.channel.enter(0) == _shim.EXIT_TIMEOUT
    rig.enter()
    rig.client.setblocking(True)
    assert rig.error() == errno.EINVAL
    assert rig.reply()[0][1] == READ


@pytest.mark.parametrize("kind", [2, 15])
def test_an_unknown_message_type(rig: Rig, kind: int) -> None:
    rig.send(message(READ, b"body", flags=kind) + read(PLAIN))
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.error() == errno.EINVAL
    assert rig.reply()[0][1] == READ


def test_nothing_is_served_before_the_handshake() -> None:
    rig = Rig(opened=False)
    rig.send(read(PLAIN))
    assert rig.enter() == _shim.EXIT_COMMAND
    assert rig.channel.run.command == READ
    rig.client.close()
    rig.channel.close()


def test_other_commands_reach_python_whole(rig: Rig) -> None:
    rig.send(message(GET_INFO, b"payload", id=0x1234, flags=NO_REPLY))
    assert rig.enter() == _shim.EXIT_COMMAND
    run = rig.channel.run
    assert (run.id, run.command, run.posted, rig.channel.payload()) == (0x1234, GET_INFO, 1, b"payload")


def test_end_of_stream(rig: Rig) -> None:
    rig.send(read(PLAIN)[:20])
    rig.client.close()
    assert rig.enter() == _shim.EXIT_CLOSED
    assert rig.channel.run.error == errno.ECONNRESET


def test_a_client_that_does_not_listen(rig: Rig) -> None:
    rig.client.shutdown(socket.SHUT_RD)
    rig.send(read(PLAIN))
    reason = until(lambda: (reason := rig.enter()) != _shim.EXIT_TIMEOUT and reason, "the end of the stream")
    assert reason == _shim.EXIT_CLOSED
    assert rig.channel.run.error == errno.EPIPE


# ---- file descriptors ------------------------------------------------------------------------------


def test_fds_go_to_their_message(rig: Rig) -> None:
    """Pipelined in one sendmsg(): the fd belongs to the command that takes one."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8192)
    rig.send(read(PLAIN))
    rig.send(read(PLAIN) + message(DMA_MAP, MAP.pack(32, 3, 4096, 0x10000, 4096)) + read(PLAIN), [fd])
    rig.send(message(DMA_MAP, MAP.pack(32, 3, 0, 0x20000, 4096)), [fd])
    rig.send(message(DMA_MAP, MAP.pack(32, 3, 0, 0x30000, 4096)))
    assert rig.enter() == _shim.EXIT_TIMEOUT
    replies = [rig.reply()[0] for _ in range(6)]
    assert all(flags == REPLY for _, _, _, flags, _ in replies)
    assert [(w.span.start, w.has_file, w.offset) for w in rig.memory.windows()] == [
        (0x10000, True, 4096),
        (0x20000, True, 0),
        (0x30000, False, 0),
    ]
    os.close(fd)


def test_stray_fds_are_closed(rig: Rig) -> None:
    fd = os.memfd_create("stray")
    before = open_fds()
    for bad in (
        read(PLAIN),
        write(0, b"abcd"),
        multi((0, 0, b"a")),
        message(DMA_UNMAP, UNMAP.pack(24, 0, 0, 4096)),
        message(DMA_MAP, MAP.pack(32, 3, 0, 0, 4096)),
        message(READ, size=MAX_XFER * 2) + bytes(MAX_XFER * 2 - 16),
        read(4096),
    ):
        for count in (1, 2, 4, 5, 100):
            rig.send(bad[:16], [fd] * count)
            rig.send(bad[16:])
            assert rig.enter() == _shim.EXIT_TIMEOUT
            rig.reply()
            rig.memory.unmap_all()
            assert open_fds() == before, (bad[:16], count)
    rig.send(read(PLAIN)[:8], [fd] * 10)
    rig.enter()
    rig.channel.close()  # with fds still held
    assert open_fds() == before - 1  # and the channel's own socket
    os.close(fd)


def test_more_fds_than_allowed(rig: Rig) -> None:
    fd = os.memfd_create("ram")
    rig.send(message(GET_INFO, bytes(16)), [fd] * 5)
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.error() == errno.EINVAL
    rig.send(message(GET_INFO, bytes(16)), [fd] * 4)
    assert rig.enter() == _shim.EXIT_COMMAND
    for received in rig.channel.fds():
        os.close(received)
    os.close(fd)


@pytest.mark.parametrize(("count", "room"), [(1, 0), (2, 1), (4, 0), (4, 3)])
@pytest.mark.parametrize("command", [DMA_MAP, SET_IRQS, GET_INFO])
def test_fds_that_the_process_has_no_room_for(rig: Rig, command: int, count: int, room: int) -> None:
    """recvmsg(2), MSG_CTRUNC: without its fds the message would be another one, so it is refused, whoever answers."""
    fd = os.eventfd(0)
    before = open_fds()
    rig.send(message(command, MAP.pack(32, 3, 0, 0x10000, 4096)), [fd] * count)
    with room_for_fds(room):
        assert rig.enter() == _shim.EXIT_COMMAND
    run = rig.channel.run
    assert (run.id, run.command, run.error, rig.channel.fds()) == (7, command, errno.EMFILE, [])
    assert open_fds() == before
    assert rig.memory.windows() == []
    rig.send(message(command, MAP.pack(32, 3, 0, 0x10000, 4096), flags=NO_REPLY), [fd])
    with room_for_fds(0):
        assert rig.enter() == _shim.EXIT_COMMAND
    assert (run.posted, run.error) == (1, errno.EMFILE)
    rig.send(message(GET_INFO, bytes(16)), [fd])
    assert rig.enter() == _shim.EXIT_COMMAND
    assert run.error == 0
    for received in rig.channel.fds():
        os.close(received)
    os.close(fd)


def test_lost_fds_count_for_their_message_alone(rig: Rig) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8192)
    one, two = (message(DMA_MAP, MAP.pack(32, 3, 0, gpa, 4096)) for gpa in (0x10000, 0x20000))
    rig.send(read(PLAIN) + one + read(PLAIN), [fd])  # the fd is the command's that takes one
    with room_for_fds(0):
        assert rig.enter() == _shim.EXIT_COMMAND
        assert (rig.channel.run.command, rig.channel.run.error) == (DMA_MAP, errno.EMFILE)
        assert rig.enter() == _shim.EXIT_TIMEOUT
    assert [rig.reply()[0][1] for _ in range(2)] == [READ, READ]
    # The whole message comes when there is room again, and the next one with its fd.
    rig.send(one[:1], [fd])
    with room_for_fds(0):
        assert rig.enter() == _shim.EXIT_TIMEOUT
    rig.send(one[1:])
    rig.send(two, [fd])
    assert rig.enter() == _shim.EXIT_COMMAND
    assert rig.channel.run.error == errno.EMFILE
    assert rig.enter() == _shim.EXIT_TIMEOUT
    assert [(w.span.start, w.has_file) for w in rig.memory.windows()] == [(0x20000, True)]
    # Messages that take no fds do not need theirs.
    rig.reply()
    rig.send(write(0, b"abcd"), [fd])
    with room_for_fds(0):
        assert rig.enter() == _shim.EXIT_TIMEOUT
    assert rig.reply()[0][3] == REPLY
    os.close(fd)


# ---- signals ---------------------------------------------------------------------------------------


def test_the_process_has_one_aio_context(rig: Rig) -> None:
    """The kernel takes a grace period of RCU for each at its end, and has a limit for all; more signals than a ring."""
    events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    functions = [_shim.FunctionRegions() for _ in events]
    for n in range(1000):
        functions[n % 8].signal(events[n % 8])
    assert [os.eventfd_read(event) for event in events] == [125] * 8
    assert Path("/proc/self/maps").read_text().count("/[aio]") == 1
    for event in events:
        os.close(event)


# ---- waking ----------------------------------------------------------------------------------------


def test_wake_watch_and_deadline(rig: Rig) -> None:
    rig.function.wake()
    assert rig.enter() == _shim.EXIT_WAKE
    fd = os.eventfd(0)
    rig.function.watch(fd, 42)
    assert rig.enter() == _shim.EXIT_WAKE
    os.eventfd_write(fd, 3)
    assert rig.enter() == _shim.EXIT_EVENT
    assert rig.channel.run.id == 42
    rig.function.unwatch(fd)
    os.eventfd_write(fd, 1)
    assert rig.enter() == _shim.EXIT_TIMEOUT
    with pytest.raises(FileNotFoundError):
        rig.function.unwatch(fd)
    os.close(fd)


def test_a_busy_client_does_not_hold_back_timers(rig: Rig) -> None:
    rig.send(read(PLAIN))
    assert rig.channel.enter(1) == _shim.EXIT_TIMEOUT  # long past: yet what was there has been served
    assert rig.reply()[0][1] == READ


# ---- anything at all ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_mutated_streams_never_break_the_shim(seed: int) -> None:
    """Valid messages with bytes changed, cut and repeated: an exit or a close, and no fd stays open."""
    rng = random.Random(seed)
    before = open_fds()
    valid = [
        read(PLAIN),
        read(HOOKED),
        write(PLAIN, b"abcdefgh"),
        write(HOOKED, b"abcd", flags=NO_REPLY),
        multi((0, 0, b"a"), (0, HOOKED, b"b")),
        message(DMA_MAP, MAP.pack(32, 3, 0, 0x10000, 4096)),
        message(DMA_UNMAP, UNMAP.pack(24, 0, 0x10000, 4096)),
        message(GET_INFO, bytes(16)),
        message(DMA_READ, bytes(16), flags=REPLY),
    ]
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8192)
    for _ in range(150):
        rig = Rig()
        for _ in range(12):
            data = bytearray(rng.choice(valid))
            for _ in range(rng.randrange(4)):
                data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            if rng.random() < 0.1:
                del data[rng.randrange(len(data)) :]
            try:
                rig.send(bytes(data), [fd] * rng.randrange(3))
                reason = _shim.EXIT_WAKE
                while reason not in (_shim.EXIT_TIMEOUT, _shim.EXIT_CLOSED):
                    reason = rig.channel.enter(0)
                    for received in rig.channel.fds():
                        os.close(received)
                if reason == _shim.EXIT_CLOSED:
                    break
                while not rig.silent():
                    rig.client.recv(1 << 20)
            except BrokenPipeError:
                break
        rig.client.close()
        rig.channel.close()
        del rig
    os.close(fd)
    assert open_fds() == before


def test_a_client_that_answers_at_once(rig: Rig) -> None:
    """The shim looks for its next message before it sleeps: deadlines, wakes and the end are as without that."""

    def client() -> None:
        for n in range(300):
            rig.send(write(HOOKED, struct.pack("<I", n)))
            rig.reply()

    thread = threading.Thread(target=client)
    thread.start()
    seen: list[int] = []
    while len(seen) < 300:
        assert rig.channel.enter(_shim.FOREVER) == _shim.EXIT_WRITE
        seen.append(rig.channel.run.value)
        for ahead in (0, 20_000, 300_000) if len(seen) % 50 == 0 else ():
            deadline = time.monotonic_ns() + ahead
            if rig.channel.enter(deadline) == _shim.EXIT_TIMEOUT:
                assert time.monotonic_ns() >= deadline
            else:
                seen.append(rig.channel.run.value)
    rig.channel.complete()
    thread.join()
    assert seen == list(range(300))
    threading.Timer(0.02, rig.function.wake).start()
    assert rig.channel.enter(_shim.FOREVER) == _shim.EXIT_WAKE
    rig.client.close()
    assert rig.channel.enter(_shim.FOREVER) == _shim.EXIT_CLOSED
