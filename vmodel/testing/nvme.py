"""A driver for an NVMe controller, by vfio-user: for benchmarks, and for tests without a guest.

It adds little to what it measures: submission queue entries are prepared in advance, doorbells are posted, and
completions are handled many at a time.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from vmodel.closing import Closing
from vmodel.devices.nvme.command import COMPLETION_SIZE, SUBMISSION_SIZE, Completion, NvmeCommand
from vmodel.span import PAGE, MiB
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import Client, EventFd
from vmodel.vfio_user.wire import HeaderFlags, Irq, Region

_CC, _CSTS, _AQA, _ASQ, _ACQ, _DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
_ENABLE = 1 | 6 << 16 | 4 << 20
_READY = 1
_ADMIN_ENTRIES = 32
_PHASE_BYTE = 14
#: The most capabilities, of at least 4 bytes each, in the 192 bytes of config space behind the header.
_MOST_CAPABILITIES = 48

READ, WRITE, FLUSH = 0x02, 0x01, 0x00


class CommandFailed(OSError):
    """A command did not complete with the status Success."""

    def __init__(self, command: NvmeCommand, completion: Completion) -> None:
        super().__init__(f"opcode {command.opcode:#x} completed with status {completion.status & 0x7FF:#x}")
        self.completion = completion


@dataclass
class Pair:
    """A submission queue and its completion queue, with `entries` entries each, at guest addresses."""

    qid: int
    entries: int
    sq: int
    cq: int
    event: EventFd
    #: Polls the eventfd and the client's socket, which closes when the server ends.
    waiter: select.poll
    tail: int = 0
    head: int = 0
    phase: int = 1


class NvmeDriver(Closing):
    """An enabled controller with its admin queue; a context manager.  OSError and TimeoutError: see Client."""

    def __init__(self, client: Client, *, ram_size: int = 64 * MiB) -> None:
        """`client` has negotiated.  The guest gets `ram_size` bytes of memory at address 0."""
        self.client = client
        self.ram = client.share(0, ram_size)
        self._next = 0
        self._cid = 0
        client.region_write(Region.CONFIG, 4, b"\x06\x00")
        self._events = self._vectors()
        self._write32(_CC, 0)
        self.admin = self._pair(0, _ADMIN_ENTRIES)
        self._write32(_AQA, (_ADMIN_ENTRIES - 1) << 16 | _ADMIN_ENTRIES - 1)
        client.region_write(Region.BAR0, _ASQ, self.admin.sq.to_bytes(8, "little"))
        client.region_write(Region.BAR0, _ACQ, self.admin.cq.to_bytes(8, "little"))
        self._write32(_CC, _ENABLE)
        deadline = time.monotonic() + client.timeout
        while not client.region_read(Region.BAR0, _CSTS, 4)[0] & _READY:
            if time.monotonic() > deadline:
                raise TimeoutError("the controller does not become ready")
            time.sleep(0.001)

    @classmethod
    def connect(cls, path: Path | str, *, ram_size: int = 64 * MiB, timeout: float = 10.0) -> NvmeDriver:
        """Connects to a controller's socket.  `timeout`: seconds for each reply."""
        client = Client.connect(path, timeout=timeout)
        try:
            client.negotiate()
            return cls(client, ram_size=ram_size)
        except BaseException:
            client.close()
            raise

    def close(self) -> None:
        """Disconnects."""
        for event in self._events:
            event.close()
        self.client.close()

    # ---- set-up --------------------------------------------------------------------------------

    def _write32(self, offset: int, value: int) -> None:
        self.client.region_write(Region.BAR0, offset, value.to_bytes(4, "little"))

    def _vectors(self) -> list[EventFd]:
        """Enables MSI-X, with an eventfd for each of its first two vectors."""
        config = self.client.region_read(Region.CONFIG, 0, 256)
        at = config[0x34] & ~3
        for _ in range(_MOST_CAPABILITIES + 1):
            if not at or config[at] == 0x11:
                break
            at = config[at + 1] & ~3
        else:
            raise OSError("the controller's list of capabilities is a loop")
        if not at:
            raise OSError("the controller has no MSI-X")
        events = self.client.eventfds(Irq.MSIX, 2)
        self.client.region_write(Region.CONFIG, at + 2, b"\x00\x80")
        return events

    def take(self, size: int) -> int:
        """Allocates `size` bytes of guest memory, in whole pages; returns the address.  MemoryError: it is used up."""
        at = self._next
        self._next += -(-size // PAGE) * PAGE
        if self._next > self.ram.size:
            raise MemoryError(f"guest memory of {self.ram.size} bytes is used up")
        return at

    def _pair(self, qid: int, entries: int) -> Pair:
        sq, cq = self.take(entries * SUBMISSION_SIZE), self.take(entries * COMPLETION_SIZE)
        event, waiter = self._events[min(qid, 1)], select.poll()
        waiter.register(event.fd, select.POLLIN)
        waiter.register(self.client.main.sock, 0)  # POLLHUP is always reported
        return Pair(qid, entries, sq, cq, event, waiter)

    def create(self, qid: int, entries: int) -> Pair:
        """Creates an I/O queue pair, whose completions raise vector 1.  CommandFailed: the controller refuses it."""
        pair = self._pair(qid, entries)
        size = (entries - 1) << 16 | qid
        self.send(self.admin, NvmeCommand.make(0x05, dptr=prps(pair.cq), cdw10=size, cdw11=1 << 16 | 3))
        self.send(self.admin, NvmeCommand.make(0x01, dptr=prps(pair.sq), cdw10=size, cdw11=qid << 16 | 1))
        return pair

    # ---- commands ------------------------------------------------------------------------------

    def send(self, pair: Pair, command: NvmeCommand) -> Completion:
        """Executes one command, and waits for its completion.  CommandFailed: its status is not Success."""
        self._cid = self._cid % 0xFFFE + 1
        entry = bytearray(command.build())
        entry[2:4] = self._cid.to_bytes(2, "little")
        at = pair.sq + pair.tail * SUBMISSION_SIZE
        self.ram.view[at : at + SUBMISSION_SIZE] = entry
        pair.tail = (pair.tail + 1) % pair.entries
        self._write32(_DOORBELLS + 8 * pair.qid, pair.tail)
        deadline = time.monotonic() + self.client.timeout
        while not self.completed(pair, 1):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("interrupts arrive, but no completion")
            self.wait(pair, left)
        at = pair.cq + pair.head * COMPLETION_SIZE
        completion = Completion.parse(bytes(self.ram.view[at : at + COMPLETION_SIZE]))
        self.advance(pair, 1)
        self._write32(_DOORBELLS + 8 * pair.qid + 4, pair.head)
        if completion.status:
            raise CommandFailed(command, completion)
        return completion

    def wait(self, pair: Pair, seconds: float) -> None:
        """Blocks until a queue's vector has been raised.  TimeoutError; OSError: the server has ended."""
        ready = pair.waiter.poll(seconds * 1000)
        if not ready:
            raise TimeoutError("no interrupt")
        if ready[0][0] != pair.event.fd:
            raise OSError(errno.ECONNRESET, "the server has ended")
        os.eventfd_read(pair.event.fd)

    def completed(self, pair: Pair, most: int) -> int:
        """How many of the next `most` entries of a completion queue the controller has written."""
        count = min(most, pair.entries - pair.head)
        start = pair.cq + pair.head * COMPLETION_SIZE
        flags = self.ram.view[start + _PHASE_BYTE : start + count * COMPLETION_SIZE : COMPLETION_SIZE].tobytes()
        n = 0
        while n < count and flags[n] & 1 == pair.phase:
            n += 1
        if n == count < most:
            pair.phase ^= 1
            head, pair.head = pair.head, 0
            n += self.completed(pair, most - count)
            pair.head = head
            pair.phase ^= 1
        return n

    @staticmethod
    def advance(pair: Pair, count: int) -> None:
        """Takes the next `count` completions, without ringing the doorbell."""
        pair.head += count
        if pair.head >= pair.entries:
            pair.head -= pair.entries
            pair.phase ^= 1


@dataclass(frozen=True)
class Latency:
    """`count` commands that completed together, and the time since they were begun, in ns."""

    count: int
    nanoseconds: int


class CommandStream:
    """Executes commands of a prepared list, several at a time."""

    def __init__(self, driver: NvmeDriver, pair: Pair, commands: bytes) -> None:
        """`commands`: submission queue entries of 64 bytes, which are used in turn."""
        self._driver = driver
        self._pair = pair
        self._images = commands
        self._at = 0
        # Both doorbells in one posted message.
        self._head = self._message_head(2)

    def _message_head(self, writes: int) -> bytes:
        size = wire.HEADER_SIZE + 8 + 24 * writes
        head = {"id": 0, "command": wire.Command.REGION_WRITE_MULTI, "size": size, "flags": HeaderFlags.NO_REPLY}
        return bytes(wire.Header.build({**head, "error": 0})) + struct.pack("<Q", writes)

    def run(self, depth: int, seconds: float) -> list[Latency]:
        """Keeps `depth` commands outstanding for `seconds`; returns their latencies.  OSError: one failed."""
        pair, ram, images = self._pair, self._driver.ram.view, self._images
        if not 0 < depth < pair.entries:
            raise ValueError(f"a queue of {pair.entries} entries holds 1 to {pair.entries - 1} commands, not {depth}")
        send, head = self._driver.client.main.send, self._head
        pack = struct.Struct("<QIIQQIIQ").pack
        sq_doorbell, cq_doorbell = _DOORBELLS + 8 * pair.qid, _DOORBELLS + 8 * pair.qid + 4
        clock, patience = time.perf_counter_ns, self._driver.client.timeout
        found: list[Latency] = []
        begun: list[tuple[int, int]] = []  # (commands, when), oldest first
        free, outstanding, tail = depth, 0, pair.tail
        end = clock() + int(seconds * 1e9)
        while True:
            now = clock()
            if now >= end:
                free = 0
            if free:
                left = free
                while left:
                    count = min(left, pair.entries - tail, (len(images) - self._at) // SUBMISSION_SIZE)
                    start, to = self._at, pair.sq + tail * SUBMISSION_SIZE
                    size = count * SUBMISSION_SIZE
                    ram[to : to + size] = images[start : start + size]
                    self._at = (start + size) % len(images)
                    tail = (tail + count) % pair.entries
                    left -= count
                begun.append((free, now))
                outstanding += free
                send(head + pack(sq_doorbell, 0, 4, tail, cq_doorbell, 0, 4, pair.head))
            elif not outstanding:
                break
            self._driver.wait(pair, patience)
            free = self._driver.completed(pair, outstanding)
            now = clock()
            if not free and now - begun[0][1] > patience * 1e9:
                raise TimeoutError("interrupts arrive, but no completion")
            self._check(free)
            self._driver.advance(pair, free)
            outstanding -= free
            left = free
            while left:
                count, since = begun[0]
                taken = min(count, left)
                found.append(Latency(taken, now - since))
                left -= taken
                if taken == count:
                    del begun[0]
                else:
                    begun[0] = count - taken, since
        pair.tail = tail
        return found

    def _check(self, count: int) -> None:
        """OSError: the status of one of the next completions is not Success."""
        pair = self._pair
        for first, n, phase in (
            (pair.head, min(count, pair.entries - pair.head), pair.phase),
            (0, max(pair.head + count - pair.entries, 0), pair.phase ^ 1),
        ):
            start = pair.cq + first * COMPLETION_SIZE
            view = self._driver.ram.view[start : start + n * COMPLETION_SIZE]
            low, high = view[_PHASE_BYTE::COMPLETION_SIZE].tobytes(), view[_PHASE_BYTE + 1 :: COMPLETION_SIZE].tobytes()
            if low.count(phase) != n or high.count(0) != n:
                raise OSError("a command has failed")


def prps(first: int, second: int = 0) -> bytes:
    """The data pointer of a command, from two PRP entries."""
    return struct.pack("<QQ", first, second)
