"""Submission and completion queues (NVMe 1.4, 4.1), with their shadow doorbells (5.7, 7.13).

A doorbell only marks its queue as ready.  Once the guest's write has been answered, the `Arbiter` runs the ready
queues, which post completions, and raises each vector once.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from vmodel.devices.nvme.command import COMPLETION_SIZE, SUBMISSION_SIZE, Completion, Fuse, NvmeCommand
from vmodel.devices.nvme.fast import BUSY, FULL, OTHER, TURN, FastPath
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.dma import Dma
from vmodel.errors import DmaFault
from vmodel.points import CompletionEvent, Point, Points
from vmodel.timers import Timer

if TYPE_CHECKING:
    from vmodel.devices.nvme.arbiter import Arbiter

_U32 = struct.Struct("<I")
#: Commands that address blocks: Write, Read, Write Uncorrectable, Compare, Write Zeroes, Verify.
_OF_BLOCKS = frozenset((0x01, 0x02, 0x04, 0x05, 0x08, 0x0C))


class CommandSet(Protocol):
    """A table of commands: that of the admin queue, or that of I/O queues."""

    def execute(self, command: NvmeCommand, sq: SubmissionQueue) -> int | Later:
        """Carries out a command; returns Dword 0 of the completion, or Later.  CommandError, DmaFault."""

    def execute_fused(self, first: NvmeCommand, second: NvmeCommand, sq: SubmissionQueue) -> tuple[Later, Later]:
        """Carries out a fused operation.  CommandError: neither command was carried out."""


class Host(Protocol):
    """The controller as its queues see it."""

    dma: Dma
    points: Points
    log: logging.Logger
    fast: FastPath
    arbiter: Arbiter

    @property
    def admin(self) -> CommandSet:
        """The commands of the admin queue."""

    @property
    def io(self) -> CommandSet:
        """The commands of I/O queues."""

    def interrupt(self, vector: int) -> None:
        """Raises an interrupt vector."""

    def coalesced(self, vector: int) -> tuple[int, float]:
        """(completions, seconds) to coalesce before the vector is raised; (1, 0): no coalescing."""

    def failed(self, sq: SubmissionQueue, command: NvmeCommand, error: CommandError) -> bool:
        """Records a failed command; returns whether the error log has an entry for it."""

    def fatal(self, what: str, fault: DmaFault) -> None:
        """Sets CSTS.CFS, as the memory of a queue cannot be accessed; `what` names it for the log."""

    def defer(self, call: Callable[[], None]) -> None:
        """As in PciDevice."""

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """As in PciDevice."""


class Later:
    """A command that is completed after its handler has returned: by a worker, or by an event.

    `abort` is called when the guest aborts the command; it returns whether it could, and then nothing else may complete
    the command.
    """

    def __init__(self, abort: Callable[[], bool] | None = None) -> None:
        self.abort = abort
        self._outcome: tuple[Exception | None, int] | None = None
        self._queue: SubmissionQueue | None = None
        self._command: NvmeCommand | None = None

    def succeed(self, result: int = 0) -> None:
        """Completes the command; `result`: Dword 0."""
        self._end(None, result)

    def fail(self, error: Exception) -> None:
        """Completes the command with the status of a CommandError, or the status that another exception results in."""
        self._end(error, error.result if isinstance(error, CommandError) else 0)

    def begin(self, queue: SubmissionQueue, command: NvmeCommand) -> None:
        """Registers the command as in progress; if its outcome is known already, completes it at once."""
        self._queue, self._command = queue, command
        if self._outcome is not None:
            queue.end(command, *self._outcome)
        else:
            queue.in_flight[command.cid] = self

    def _end(self, error: Exception | None, result: int) -> None:
        if self._outcome is not None:
            raise ValueError("a command was completed twice")
        self._outcome = error, result
        queue, command = self._queue, self._command
        # If the queue was deleted or the controller reset, the completion is not posted.
        if queue is not None and command is not None and queue.in_flight.get(command.cid) is self:
            del queue.in_flight[command.cid]
            queue.end(command, error, result)


class CompletionQueue:
    """Completions of one or more submission queues."""

    def __init__(self, host: Host, qid: int, iova: int, entries: int, vector: int, interrupts: bool) -> None:
        self._host = host
        self.qid = qid
        self.iova = iova
        self.entries = entries
        self.vector = vector
        self.interrupts = interrupts
        # head: the entry that the driver reads next; tail: the entry that is written next, with `phase`.
        self._ring = ring = host.fast.add_completion(self)
        ring.iova, ring.entries, ring.phase = iova, entries, 1
        ring.head = ring.tail = ring.reserved = ring.posted = 0
        self.queues: list[SubmissionQueue] = []
        self._shadow = self._event_index = 0
        #: The initial value of the shadow doorbell; None: the driver has changed it since, so it is in use.
        self._shadow_first: int | None = None
        self._unsignalled = 0
        self._waiting: deque[tuple[SubmissionQueue, int, int, int]] = deque()
        self._timer: Timer | None = None

    @property
    def room(self) -> int:
        """Free entries, without those that are reserved for commands that workers have."""
        ring = self._ring
        free: int = (ring.head - ring.tail - 1) % self.entries - ring.reserved
        return max(free, 0)

    @property
    def held(self) -> bool:
        """Whether completions wait for free entries."""
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        """Whether no further command may be taken, as its completion would have no entry."""
        if self._waiting or not self.room:
            self._poll()
            return bool(self._waiting) or not self.room
        return False

    @property
    def pending(self) -> bool:
        """Whether there are completions that the driver has not taken: the level of a pin-based interrupt."""
        self._poll()
        return bool(self._ring.head != self._ring.tail)

    def doorbell(self, value: int) -> bool:
        """The driver writes its head doorbell; returns False if the value is invalid."""
        if self._shadow and value < self.entries:
            self._poll()
            if self._shadow_first is None:
                return True  # the shadow doorbell may be ahead of an earlier write of the doorbell
        return self._taken(value)

    def _taken(self, value: int) -> bool:
        ring = self._ring
        if value >= self.entries or (value - ring.head) % self.entries > (ring.tail - ring.head) % self.entries:
            return False
        ring.head = value
        while self._waiting and self.room:
            self._write(*self._waiting.popleft())
        for queue in self.queues:
            if queue.waiting:
                self._host.arbiter.ring(queue)
        return True

    def set_shadow(self, doorbell: int, event_index: int) -> None:
        """Sets the guest addresses of shadow doorbell and EventIdx.  DmaFault: they cannot be accessed."""
        first: int = _U32.unpack(self._host.dma.read(doorbell, 4))[0]
        self._host.dma.write(event_index, _U32.pack(self._ring.head))
        self._shadow, self._event_index, self._shadow_first = doorbell, event_index, first

    def clear_shadow(self) -> None:
        """Stops using the shadow doorbell."""
        self._shadow = self._event_index = 0

    def _poll(self) -> None:
        """Reads the shadow doorbell, if there is one, and requests a doorbell write for the next change (EventIdx)."""
        if not self._shadow:
            return
        try:
            # The loop is bounded: in each round but the last the driver has taken completions.
            while True:
                self._host.dma.write(self._event_index, _U32.pack(self._ring.head))
                value: int = _U32.unpack(self._host.dma.read(self._shadow, 4))[0]
                if value == self._shadow_first:
                    return
                self._shadow_first = None
                if value == self._ring.head or not self._taken(value):
                    return
        except DmaFault as fault:
            self._host.fatal(f"the shadow doorbell of completion queue {self.qid}", fault)

    def post(self, sq: SubmissionQueue, cid: int, status: int, result: int = 0) -> None:
        """Posts a completion of `sq`, once there is a free entry; `status`: the 15-bit field."""
        if self._waiting or not self.room:
            self._waiting.append((sq, cid, status, result))
        else:
            self._write(sq, cid, status, result)

    def _write(self, sq: SubmissionQueue, cid: int, status: int, result: int) -> None:
        ring = self._ring
        entry = Completion(result, sq.head, sq.qid, cid, status, ring.phase).build()
        at = self.iova + ring.tail * COMPLETION_SIZE
        try:
            # The driver may read the entry at any time, so the phase tag is written last.
            self._host.dma.write(at, entry[:12])
            self._host.dma.write(at + 12, entry[12:])
        except DmaFault as fault:
            self._host.fatal(f"completion queue {self.qid}", fault)
            return
        ring.tail += 1
        if ring.tail == self.entries:
            ring.tail = 0
            ring.phase ^= 1
        ring.posted += 1
        self.posted()

    def posted(self) -> None:
        """Requests an interrupt, after completions have been posted."""
        self._unsignalled += self._ring.posted
        self._ring.posted = 0
        if self.interrupts:
            self._host.arbiter.signal(self)

    def raise_interrupt(self) -> None:
        """Raises the vector now, or after the coalescing threshold or time (5.21.1.8)."""
        threshold, seconds = self._host.coalesced(self.vector)
        if self._unsignalled >= threshold:
            self._fire()
        elif self._timer is None:
            self._timer = self._host.after(seconds, self._fire)

    def _fire(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unsignalled = 0
        self._host.interrupt(self.vector)

    def close(self) -> None:
        """Ends the queue, as it is deleted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting.clear()
        self.interrupts = False


class SubmissionQueue:
    """Commands of the driver; qid 0 is the admin queue.  `priority`: 0 (urgent) to 3 (low)."""

    def __init__(self, host: Host, qid: int, iova: int, entries: int, cq: CompletionQueue, priority: int = 0) -> None:
        self._host = host
        self._commands = host.io if qid else host.admin
        self.qid = qid
        self.iova = iova
        self.entries = entries
        self.cq = cq
        self.priority = priority
        # head: the entry that is read next; tail: the entry that the driver writes next.
        self._ring = ring = host.fast.add_submission(self)
        ring.iova, ring.entries, ring.cq = iova, entries, cq.qid
        ring.head = ring.tail = ring.shadow = ring.event = ring.shadow_first = ring.shadow_used = 0
        #: Commands in progress, by command identifier.
        self.in_flight: dict[int, Later] = {}
        self._closed = self._has_shadow = False
        #: Whether it is in one of the arbiter's lines.
        self.ready = False
        cq.queues.append(self)

    @property
    def head(self) -> int:
        """The entry that is taken next."""
        return self._ring.head  # type: ignore[no-any-return]

    @property
    def waiting(self) -> bool:
        """Whether there are commands that have not been taken."""
        return bool(self._ring.head != self._ring.tail)

    def set_shadow(self, doorbell: int, event_index: int) -> None:
        """Sets the guest addresses of shadow doorbell and EventIdx.  DmaFault: they cannot be accessed.

        For the admin queue, Linux and SPDK write the doorbell and never its shadow; the specification makes drivers use
        shadow and EventIdx for all queues.  So doorbell writes are valid until the shadow is first written.
        """
        ring, dma = self._ring, self._host.dma
        first = _U32.unpack(dma.read(doorbell, 4))[0]
        dma.write(event_index, _U32.pack(ring.tail))
        ring.shadow_first, ring.shadow_used = first, 0
        ring.shadow, ring.event = doorbell, event_index
        self._has_shadow = True

    def clear_shadow(self) -> None:
        """Stops using the shadow doorbell."""
        self._has_shadow = False
        self._ring.shadow = self._ring.event = self._ring.shadow_used = 0

    def doorbell(self, value: int) -> bool:
        """The driver writes its tail doorbell; returns False if the value is invalid (5.2: invalid doorbell value)."""
        ring, n = self._ring, self.entries
        if value >= n:
            return False
        # A shadow doorbell in use may be ahead of this write of the doorbell.
        if not (self._has_shadow and self._by_shadow()):
            tail = ring.tail
            if (value - tail) % n > (ring.head - tail - 1) % n:
                return False  # more entries than are free
            ring.tail = value
        self._host.arbiter.ring(self)
        return True

    def _look(self) -> bool:
        """Reads the shadow doorbell; returns whether there are commands, or the controller has failed."""
        ring = self._ring
        try:
            value: int = _U32.unpack(self._host.dma.read(ring.shadow, 4))[0]
        except DmaFault as fault:
            self._host.fatal(f"the shadow doorbell of submission queue {self.qid}", fault)
            return True
        if ring.shadow_used or value != ring.shadow_first:
            ring.shadow_used = 1
            if value < self.entries:
                ring.tail = value
        return bool(ring.head != ring.tail)

    def _by_shadow(self) -> bool:
        """Whether the driver uses the shadow doorbell, so that the value of a doorbell write is ignored."""
        if not self._ring.shadow_used:
            self._look()
        return bool(self._ring.shadow_used)

    def _poll(self) -> None:
        """Reads the shadow doorbell, if there is one, and sets EventIdx, so that the next command has a doorbell."""
        ring, dma = self._ring, self._host.dma
        if not ring.shadow or self._look():
            return
        try:
            event: int = _U32.unpack(dma.read(ring.event, 4))[0]
            if event == ring.tail:
                return
            dma.write(ring.event, _U32.pack(ring.tail))
        except DmaFault as fault:
            self._host.fatal(f"the EventIdx of submission queue {self.qid}", fault)
            return
        # Read again: the driver may have added a command before it could see the new EventIdx.
        self._look()

    def run(self, count: int, until: int) -> tuple[int, bool]:
        """Carries out up to `count` commands, none begun after `until` (monotonic ns).

        Returns (how many there were, whether the queue needs another turn).  It needs none if it has found no more
        commands (a driver with shadow doorbells rings for the next one), or if another event will run it again: workers
        that are not busy any more, or entries of the completion queue that the driver takes.
        """
        done, fast, cq = 0, self._host.fast, self.cq
        while done < count and not self._closed:
            if done and time.monotonic_ns() >= until:
                break
            if self.qid and fast.busy:
                fast.wait(self)
                return done, False
            plain = self.qid and fast.enabled and not self._host.points.detailed
            if plain and not (cq.held and cq.full):
                stop, taken = fast.run(self.qid, count - done)
                if taken:
                    done += taken
                    cq.posted()
                if stop == BUSY or (stop == FULL and not cq.full):
                    continue  # the shadow doorbell shows that there are free entries now
                if stop == TURN:
                    break
                if stop != OTHER:
                    return done, False
            if cq.full:
                if not self.waiting:
                    self._poll()  # sets EventIdx, so that the driver rings for its next command
                return done, False
            command = self._fetch()
            if command is None:
                return done, False
            done += 1
            if command.flags & 3 == Fuse.FIRST:
                done += self._fused(command)
            else:
                self.carry_out(command)
        return done, not self._closed

    def _fetch(self) -> NvmeCommand | None:
        ring = self._ring
        if ring.head == ring.tail:
            self._poll()
            if ring.head == ring.tail:
                return None
        try:
            entry = self._host.dma.read(self.iova + ring.head * SUBMISSION_SIZE, SUBMISSION_SIZE)
        except DmaFault as fault:
            self._host.fatal(f"submission queue {self.qid}", fault)
            return None
        ring.head = (ring.head + 1) % self.entries
        return NvmeCommand.parse(entry)

    def _fused(self, first: NvmeCommand) -> int:
        """Carries out a fused operation; returns how many commands were taken besides the first."""
        self._host.fast.changed()
        # Both commands have to be submitted by one doorbell write (4.12).
        second = self._fetch()
        if second is None:
            self.end(first, CommandError(NvmeStatus.ABORTED_MISSING_FUSED))
            return 0
        if second.flags & 3 != Fuse.SECOND:
            # Put it back: it may be a first command itself, and the queue may be full of those.
            self._ring.head = (self._ring.head - 1) % self.entries
            self.end(first, CommandError(NvmeStatus.ABORTED_MISSING_FUSED))
            return 0
        try:
            self._check_cid(first)
            self._check_cid(second)
            if first.cid == second.cid:
                raise CommandError(NvmeStatus.CID_CONFLICT)
            later = self._commands.execute_fused(first, second, self)
        except Exception as error:
            self.end(first, error)
            self.end(second, CommandError(NvmeStatus.ABORTED_FAILED_FUSED))
        else:
            later[0].begin(self, first)
            later[1].begin(self, second)
        return 1

    def _check_cid(self, command: NvmeCommand) -> None:
        if command.cid in self.in_flight:
            raise CommandError(NvmeStatus.CID_CONFLICT)

    def carry_out(self, command: NvmeCommand) -> None:
        """Carries out a command on the general path."""
        self._host.fast.changed()
        try:
            if command.flags & 3 == Fuse.SECOND:
                raise CommandError(NvmeStatus.ABORTED_MISSING_FUSED)
            if command.flags & 3 == Fuse.RESERVED or command.flags >> 6 == 3:
                raise CommandError(NvmeStatus.INVALID_FIELD, location=1)
            self._check_cid(command)
            outcome = self._commands.execute(command, self)
        except Exception as error:
            self.end(command, error)
        else:
            if isinstance(outcome, Later):
                outcome.begin(self, command)
            else:
                self.end(command, None, outcome)

    def _as_status(self, error: Exception) -> CommandError:
        """The status for an exception of a command's handler."""
        if isinstance(error, CommandError):
            return error
        if isinstance(error, DmaFault):
            self._host.log.info("submission queue %d: %s", self.qid, error)
            return CommandError(NvmeStatus.DATA_TRANSFER_ERROR, dnr=False)
        self._host.log.error("submission queue %d: a command failed", self.qid, exc_info=error)
        return CommandError(NvmeStatus.INTERNAL_ERROR)

    def end(self, command: NvmeCommand, error: Exception | None, result: int = 0) -> None:
        """Posts a command's completion."""
        if self._closed:
            return
        self._host.fast.changed()
        status = 0
        if error is not None:
            failure = self._as_status(error)
            status = failure.field(more=self._host.failed(self, command, failure))
            result = failure.result
        if self._host.points.armed(Point.COMPLETION):
            self._post_at_point(command, status, result)
        else:
            self.cq.post(self, command.cid, status, result)

    def _post_at_point(self, command: NvmeCommand, status: int, result: int) -> None:
        """Posts a completion at its fault point: a rule may change, drop or delay it, even until the queue is gone."""

        def post(event: CompletionEvent) -> None:
            if not self._closed:
                self.cq.post(self, event.id & 0xFFFF, (event.status or 0) & 0x7FFF, event.length & 0xFFFF_FFFF)

        blocks = (command.slba, command.blocks) if self.qid and command.opcode in _OF_BLOCKS else (None, None)
        self._host.points.completion(
            post,
            queue=self.qid,
            opcode=command.opcode,
            lba=blocks[0],
            blocks=blocks[1],
            id=command.cid,
            status=status,
            length=result,
        )

    def abort(self, cid: int, status: NvmeStatus = NvmeStatus.ABORT_REQUESTED) -> bool:
        """Aborts a command in progress and completes it; returns False if there is none, or it cannot be aborted."""
        later = self.in_flight.get(cid)
        if later is not None and later.abort is not None and later.abort():
            later.fail(CommandError(status))
            return True
        if self._host.fast.abort(self.qid, cid):
            self.end(NvmeCommand.make(0, cid=cid), CommandError(status))
            return True
        return False

    def drain(self) -> None:
        """Completes or aborts all commands in progress, before the queue is deleted (5.6)."""
        for cid in list(self.in_flight):
            self.abort(cid, NvmeStatus.ABORTED_SQ_DELETION)
        self._host.fast.settle()

    def close(self) -> None:
        """Ends the queue, as it is deleted or the controller reset: no more completions are posted for it."""
        self._closed = True
        self.in_flight.clear()
        self.cq.queues.remove(self)
        self._host.arbiter.remove(self)
