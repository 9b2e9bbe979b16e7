"""Arbitration: which submission queue is served next and for how long, and when interrupts are raised (4.13)."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmodel.devices.nvme.queue import CompletionQueue, Host, SubmissionQueue

#: Most commands of all queues in one turn; between turns the device serves its client.
TURN = 256
#: Nanoseconds after which a turn begins no further command: one command may move 256 MiB.
TURN_NS = 10_000_000
#: The value of Arbitration Burst that means no limit.
NO_BURST = 7


class Arbiter:
    """Chooses the queue that runs next, and raises interrupts when all have run.

    Round robin, or with `weights` weighted round robin with urgent priority class (4.13.2).
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        #: Most commands of one queue before the next queue is served.
        self.burst = TURN
        #: Commands of the high, medium and low priority class in each round; None: round robin.
        self.weights: tuple[int, int, int] | None = None
        self.reset()

    def reset(self) -> None:
        """Removes all queues; returns to round robin without a burst limit."""
        self.set_burst(NO_BURST)
        self.weights = None
        # The admin queue's line, then one for each priority class; round robin uses the first line for all queues.
        self._lines: list[deque[SubmissionQueue]] = [deque() for _ in range(5)]
        self._credit = [0, 0, 0]
        self._signals: list[CompletionQueue] = []
        self._running = self._scheduled = False

    def set_burst(self, value: int) -> None:
        """Sets Arbitration Burst as in the feature: 1 << `value` commands, 7: no limit."""
        self.burst = TURN if value == NO_BURST else 1 << value

    def ring(self, queue: SubmissionQueue) -> None:
        """Marks a queue as ready: it has, or may have, commands."""
        if not queue.ready:
            queue.ready = True
            self._line_of(queue).append(queue)
        self._schedule()

    def signal(self, queue: CompletionQueue) -> None:
        """Marks a completion queue's interrupt as due at the end of the turn."""
        if queue not in self._signals:
            self._signals.append(queue)
        self._schedule()

    def remove(self, queue: SubmissionQueue) -> None:
        """Removes a queue that is deleted."""
        for line in self._lines:
            if queue in line:
                line.remove(queue)

    def _line_of(self, queue: SubmissionQueue) -> deque[SubmissionQueue]:
        if self.weights is None or not queue.qid:
            return self._lines[0]
        return self._lines[1 + queue.priority]

    def _schedule(self) -> None:
        if not self._scheduled and not self._running:
            self._scheduled = True
            self._host.defer(self.run)

    def run(self) -> None:
        """Runs ready queues until none is left or the turn's limits are reached, then raises interrupts."""
        self._scheduled, self._running = False, True
        try:
            left, until = TURN, time.monotonic_ns() + TURN_NS
            while left > 0 and (chosen := self._next()) is not None:
                line, burst = chosen
                queue = line.popleft()
                queue.ready = False
                taken, more = queue.run(min(burst, left), until)
                left -= taken
                if self.weights is not None and queue.qid and queue.priority:
                    self._credit[queue.priority - 1] -= taken
                if more and not queue.ready:
                    queue.ready = True
                    line.append(queue)
                if time.monotonic_ns() >= until:
                    break
        finally:
            self._running = False
        signals, self._signals = self._signals, []
        for cq in signals:
            if cq.interrupts:
                cq.raise_interrupt()
        if any(self._lines):
            self._schedule()

    def _next(self) -> tuple[deque[SubmissionQueue], int] | None:
        """The line whose first queue is next, and the most commands that this queue may run; None: none is ready."""
        lines = self._lines
        for line in lines[:2]:
            if line:
                return line, self.burst
        classes = [n for n in range(3) if lines[2 + n]]
        if not classes:
            return None
        if all(self._credit[n] <= 0 for n in classes):
            self._credit = list(self.weights or (1, 1, 1))
        n = next(n for n in classes if self._credit[n] > 0)
        return lines[2 + n], min(self.burst, self._credit[n])
