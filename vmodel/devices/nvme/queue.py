"""Submission and completion queues (NVMe 1.4, 4.1), with their shadow doorbells (5.7, 7.13).

A doorbell only marks its queue as ready.  Once the guest's write has been answered, the `Arbiter` lets ready queues
run, posts what is complete and raises each vector once.
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
from vmodel.points import Event, Point, Points
from vmodel.timers import Timer

if TYPE_CHECKING:
    from vmodel.devices.nvme.arbiter import Arbiter

_U32 = struct.Struct("<I")
#: Write, Read, Write Uncorrectable, Compare, Write Zeroes, Verify: commands that name blocks.
_OF_BLOCKS = frozenset((0x01, 0x02, 0x04, 0x05, 0x08, 0x0C))


class CommandSet(Protocol):
    """A table of commands: that of the admin queue, or that of the others."""

    def execute(self, command: NvmeCommand, sq: SubmissionQueue) -> int | Later:
        """Carries a command out: Dword 0 of the completion, or Later.  CommandError, DmaFault."""

    def execute_fused(self, first: NvmeCommand, second: NvmeCommand, sq: SubmissionQueue) -> tuple[Later, Later]:
        """Carries a fused operation out.  CommandError: neither of both."""


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
        """Those of the others."""

    def interrupt(self, vector: int) -> None:
        """Raises a vector."""

    def coalesced(self, vector: int) -> tuple[int, float]:
        """(completions, seconds) that may gather before the vector is raised; (1, 0) when each counts."""

    def failed(self, sq: SubmissionQueue, command: NvmeCommand, error: CommandError) -> bool:
        """A command has failed; whether the error log has more about it."""

    def fatal(self, what: str, fault: DmaFault) -> None:
        """A queue's own memory cannot be reached: CSTS.CFS."""

    def defer(self, call: Callable[[], None]) -> None:
        """As with PciDevice."""

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """As with PciDevice."""


class Later:
    """A command that is completed after its handler has returned: by a worker, or by an event.

    `abort`: called when the guest wants it aborted; whether it could be, and then nothing may complete it any more.
    """

    def __init__(self, abort: Callable[[], bool] | None = None) -> None:
        self.abort = abort
        self._outcome: tuple[Exception | None, int] | None = None
        self._queue: SubmissionQueue | None = None
        self._command: NvmeCommand | None = None

    def succeed(self, result: int = 0) -> None:
        """Completes it; `result`: Dword 0."""
        self._end(None, result)

    def fail(self, error: Exception) -> None:
        """Completes it with another status: a CommandError's, or what a DmaFault or a bug comes to."""
        self._end(error, error.result if isinstance(error, CommandError) else 0)

    def begin(self, queue: SubmissionQueue, command: NvmeCommand) -> None:
        """It is under way; completes it at once if that is what it already is."""
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
        # A queue that is gone, or its controller reset: nobody waits for it any more.
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
        # head: where the driver reads next; tail: where we write next, with `phase`.
        self._ring = ring = host.fast.add_completion(self)
        ring.iova, ring.entries, ring.phase = iova, entries, 1
        ring.head = ring.tail = ring.reserved = ring.posted = 0
        self.queues: list[SubmissionQueue] = []
        self._shadow = self._event_index = 0
        #: What its shadow doorbell was at first; None: the driver has written another value since, and goes by it.
        self._shadow_first: int | None = None
        self._unsignalled = 0
        self._waiting: deque[tuple[SubmissionQueue, int, int, int]] = deque()
        self._timer: Timer | None = None

    @property
    def room(self) -> int:
        """Completions that it has room for, besides those of commands that workers have."""
        ring = self._ring
        free: int = (ring.head - ring.tail - 1) % self.entries - ring.reserved
        return max(free, 0)

    @property
    def held(self) -> bool:
        """There are completions that wait for room."""
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        """No more commands are taken for it."""
        if self._waiting or not self.room:
            self._poll()
            return bool(self._waiting) or not self.room
        return False

    @property
    def pending(self) -> bool:
        """There are completions that the driver has not taken: the level of a pin-based interrupt."""
        self._poll()
        return bool(self._ring.head != self._ring.tail)

    def doorbell(self, value: int) -> bool:
        """The driver has taken entries up to `value`; whether it may say so."""
        if self._shadow and value < self.entries:
            self._poll()
            if self._shadow_first is None:
                return True  # what is in memory may be further on than a doorbell that was rung before
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
        """Where its shadow doorbell and EventIdx are in guest memory.  DmaFault: they are not to be reached."""
        first: int = _U32.unpack(self._host.dma.read(doorbell, 4))[0]
        self._host.dma.write(event_index, _U32.pack(self._ring.head))
        self._shadow, self._event_index, self._shadow_first = doorbell, event_index, first

    def forget_shadow(self) -> None:
        """Doorbells alone count."""
        self._shadow = self._event_index = 0

    def _poll(self) -> None:
        """Looks at the shadow doorbell, if there is one; the next entry that is taken needs a doorbell."""
        if not self._shadow:
            return
        try:
            # Ends: each round but the last has taken some of what is posted.
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
        """Posts a completion of `sq`, as soon as there is room; `status`: the 15-bit field."""
        if self._waiting or not self.room:
            self._waiting.append((sq, cid, status, result))
        else:
            self._write(sq, cid, status, result)

    def _write(self, sq: SubmissionQueue, cid: int, status: int, result: int) -> None:
        ring = self._ring
        entry = Completion(result, sq.head, sq.qid, cid, status, ring.phase).build()
        at = self.iova + ring.tail * COMPLETION_SIZE
        try:
            # The driver may look at any time: the phase tag comes last.
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
        """Completions have been posted: an interrupt is due."""
        self._unsignalled += self._ring.posted
        self._ring.posted = 0
        if self.interrupts:
            self._host.arbiter.signal(self)

    def raise_interrupt(self) -> None:
        """Raises the vector now, or when enough completions or time have come together (5.21.1.8)."""
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
        """It is deleted."""
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
        # head: where we read next; tail: where the driver writes next.
        self._ring = ring = host.fast.add_submission(self)
        ring.iova, ring.entries, ring.cq = iova, entries, cq.qid
        ring.head = ring.tail = ring.shadow = ring.event = ring.shadow_first = ring.shadow_used = 0
        #: Commands under way, by command identifier.
        self.in_flight: dict[int, Later] = {}
        self._closed = self._has_shadow = False
        #: It stands in one of the arbiter's lines.
        self.ready = False
        cq.queues.append(self)

    @property
    def head(self) -> int:
        """The entry that is taken next."""
        return self._ring.head  # type: ignore[no-any-return]

    @property
    def waiting(self) -> bool:
        """There are commands that have not been taken."""
        return bool(self._ring.head != self._ring.tail)

    def set_shadow(self, doorbell: int, event_index: int) -> None:
        """Where its shadow doorbell and EventIdx are in guest memory.  DmaFault: they are not to be reached.

        Drivers ring the admin queue's doorbell and leave its shadow as it is (Linux, SPDK), or go by shadow and
        EventIdx with all queues, as the specification has it.  So doorbells count until the shadow is first written.
        """
        ring, dma = self._ring, self._host.dma
        first = _U32.unpack(dma.read(doorbell, 4))[0]
        dma.write(event_index, _U32.pack(ring.tail))
        ring.shadow_first, ring.shadow_used = first, 0
        ring.shadow, ring.event = doorbell, event_index
        self._has_shadow = True

    def forget_shadow(self) -> None:
        """Doorbells alone count."""
        self._has_shadow = False
        self._ring.shadow = self._ring.event = self._ring.shadow_used = 0

    def doorbell(self, value: int) -> bool:
        """The driver has written entries up to `value`; whether it may say so (5.2: invalid doorbell value)."""
        ring, n = self._ring, self.entries
        if value >= n:
            return False
        # A shadow that is used may be further on than a doorbell that was rung before.
        if not (self._has_shadow and self._by_shadow()):
            tail = ring.tail
            if (value - tail) % n > (ring.head - tail - 1) % n:
                return False  # more than are free
            ring.tail = value
        self._host.arbiter.ring(self)
        return True

    def _look(self) -> bool:
        """Looks at the shadow doorbell; whether there are commands, or no more queue."""
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
        """Whether the driver goes by the shadow doorbell, so that what it rings means no more than that it has rung."""
        if not self._ring.shadow_used:
            self._look()
        return bool(self._ring.shadow_used)

    def _poll(self) -> None:
        """Looks at the shadow doorbell, if there is one; no command that is there already is missed after it."""
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
        # It asks for a doorbell at the next command, which may have come meanwhile.
        self._look()

    def run(self, count: int, until: int) -> tuple[int, bool]:
        """Carries out up to `count` commands, and begins none after `until` (monotonic ns).

        How many there were, and whether the queue needs another turn.  It needs none when it has seen that there are no
        more commands (a driver that goes by shadow doorbells rings for the next one), and when something else lets it
        run again: workers that are done, or entries of the completion queue that the driver has taken.
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
                    continue  # the shadow doorbell knows of more room
                if stop == TURN:
                    break
                if stop != OTHER:
                    return done, False
            if cq.full:
                if not self.waiting:
                    self._poll()  # so that the next command has a doorbell
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
        """A fused operation; how many commands were taken besides the first."""
        self._host.fast.changed()
        # Both have to be there with one doorbell (4.12).
        second = self._fetch()
        if second is None:
            self.end(first, CommandError(NvmeStatus.ABORTED_MISSING_FUSED))
            return 0
        if second.flags & 3 != Fuse.SECOND:
            # It has its own turn: a queue may be full of first commands.
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
        """Carries a command out the general way."""
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
        """The status of what a command's handler has raised."""
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
        if self._host.points.wants(Point.COMPLETION):
            self._announce(command, status, result)
        else:
            self.cq.post(self, command.cid, status, result)

    def _announce(self, command: NvmeCommand, status: int, result: int) -> None:
        """Posts a completion if nobody who listens has it otherwise; one that comes late may find the queue gone."""

        def post(event: Event) -> None:
            if not self._closed:
                found = event.id or 0, event.status or 0, event.length or 0
                self.cq.post(self, found[0] & 0xFFFF, found[1] & 0x7FFF, found[2] & 0xFFFF_FFFF)

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
        """Aborts a command that is under way, which then is complete; False: it is not, or cannot be any more."""
        later = self.in_flight.get(cid)
        if later is not None and later.abort is not None and later.abort():
            later.fail(CommandError(status))
            return True
        if self._host.fast.abort(self.qid, cid):
            self.end(NvmeCommand.make(0, cid=cid), CommandError(status))
            return True
        return False

    def drain(self) -> None:
        """Completes or aborts all that is under way, as before the queue is deleted (5.6)."""
        for cid in list(self.in_flight):
            self.abort(cid, NvmeStatus.ABORTED_SQ_DELETION)
        self._host.fast.settle()

    def close(self) -> None:
        """It is deleted, or the controller is reset: nothing is posted for it any more."""
        self._closed = True
        self.in_flight.clear()
        self.cq.queues.remove(self)
        self._host.arbiter.forget(self)
