"""Deferred work and timers of one device; the thread that serves the device runs them."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

#: An agenda removes cancelled timers from its heap once there are more than this, and they are the majority.
_KEPT = 64


class Timer:
    """A callback that will run once, at `deadline_ns` (monotonic)."""

    def __init__(self, agenda: Agenda, deadline_ns: int, call: Callable[[], None]) -> None:
        self._agenda = agenda
        self.deadline_ns = deadline_ns
        #: None: it has run, or was cancelled.
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Cancels the callback; does nothing if it has run already.  Any thread."""
        self._agenda.drop(self)


class Agenda:
    """A device's deferred work and timers.  Any thread may add; only the device's own thread calls `run`.

    An agenda may run work on behalf of another device, the work's owner.  `cancel` drops only the work that this
    device owns, in whichever agenda it is.  Memory is proportional to the timers that are still to run, however many
    were cancelled.
    """

    def __init__(self, wake: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """`wake` wakes the device's thread when another thread adds work; `failed` gets exceptions of callbacks."""
        self._wake = wake
        self._failed = failed
        #: (callback, owner or None, the owner's `_cancelled` when it was deferred).
        self._soon: deque[tuple[Callable[[], None], Agenda | None, int]] = deque()
        self._cancelled = 0
        #: A heap.  Cancelled timers, `_dead` of them, stay in it until their deadline or until they are the majority.
        self._timers: list[tuple[int, int, Timer]] = []
        self._dead = 0
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._thread = 0
        #: Whether `run` may have work.  May be falsely True, never falsely False: adding work also wakes the loop.
        self.waiting = False

    def defer(self, call: Callable[[], None], owner: Agenda | None) -> None:
        """Runs `call` once the current access has been answered, unless `owner` is cancelled first.  Any thread.

        `owner` None: nothing cancels the call.
        """
        self._soon.append((call, owner, owner._cancelled if owner is not None else 0))
        self.waiting = True
        if threading.get_ident() != self._thread:
            self._wake()

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Runs `call` after `seconds`.  Any thread."""
        timer = Timer(self, time.monotonic_ns() + int(seconds * 1e9), call)
        with self._lock:
            heapq.heappush(self._timers, (timer.deadline_ns, next(self._order), timer))
        self.waiting = True
        if threading.get_ident() != self._thread:
            self._wake()
        return timer

    def drop(self, timer: Timer) -> None:
        """Cancels one of this agenda's timers.  Any thread."""
        with self._lock:
            if timer.call is None:
                return
            timer.call = None
            self._dead += 1
            if self._dead > _KEPT and 2 * self._dead > len(self._timers):
                self._timers = [entry for entry in self._timers if entry[2].call is not None]
                heapq.heapify(self._timers)
                self._dead = 0

    def cancel(self) -> None:
        """Cancels all timers, and all deferred work that this device owns."""
        self._cancelled += 1
        with self._lock:
            for _, _, timer in self._timers:
                timer.call = None
            self._timers = []
            self._dead = 0

    def __len__(self) -> int:
        """Deferred calls and timers that it holds, cancelled timers included."""
        return len(self._timers) + len(self._soon)

    def run(self, now_ns: int) -> int | None:
        """Runs all work that is due; returns the next deadline (monotonic ns), None: there is none.

        Calls that deferred work defers run in the next turn, so that a device that always defers more cannot keep its
        client waiting; the deadline then is `now_ns`.
        """
        self._thread = threading.get_ident()
        for _ in range(len(self._soon)):
            if not self._soon:
                break  # a call has waited for the client, and `run` was called again meanwhile
            call, owner, cancelled = self._soon.popleft()
            if owner is None or owner._cancelled == cancelled:
                self._call(call)
        # A timer that one of these starts is due after `now_ns`: it does not run in this turn.
        while self._timers and (due := self._due(now_ns)) is not None:
            self._call(due)
        timers = self._timers  # other threads may add to it or replace it, but never take anything out
        self.waiting = bool(self._soon or timers)
        if self._soon:
            return now_ns
        return timers[0][0] if timers else None

    def _due(self, now_ns: int) -> Callable[[], None] | None:
        """Removes the next timer that is due from the heap; returns its callback, None: none is due."""
        with self._lock:
            while self._timers and self._timers[0][0] <= now_ns:
                timer = heapq.heappop(self._timers)[2]
                call, timer.call = timer.call, None
                if call is not None:
                    return call
                self._dead -= 1
        return None

    def _call(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._failed(error)
