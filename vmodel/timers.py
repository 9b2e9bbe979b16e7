"""Deferred work and timers of one device, run by whoever serves it."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

#: Cancelled timers that an agenda keeps before it looks whether they are most of all.
_KEPT = 64


class Timer:
    """Something that will run once; `cancel()` it, from any thread."""

    def __init__(self, agenda: Agenda, deadline_ns: int, call: Callable[[], None]) -> None:
        self._agenda = agenda
        self.deadline_ns = deadline_ns
        #: None: it has run, or was cancelled.
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """It will not run any more; fine if it has."""
        self._agenda.drop(self)


class Agenda:
    """What a device has to do later.  Adding is safe from any thread; `run` belongs to the device's own.

    Work that is run here may be another device's: `cancel` drops what is its own, here and elsewhere, and no other.
    Timers take memory in proportion to those that are to run, however many were cancelled.
    """

    def __init__(self, wake: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """`wake` is called when another thread adds something, `failed` with what a callback raised."""
        self._wake = wake
        self._failed = failed
        #: What to call, whose it is, and how often that one had been cancelled then.
        self._soon: deque[tuple[Callable[[], None], Agenda | None, int]] = deque()
        self._cancelled = 0
        #: A heap.  Cancelled timers, `_dead` of them, stay in it until their time, or until they are most of it.
        self._timers: list[tuple[int, int, Timer]] = []
        self._dead = 0
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._thread = 0
        #: Whether `run` is worth calling.  May say so in vain; never fails to, as adding also wakes the loop.
        self.waiting = False

    def defer(self, call: Callable[[], None], owner: Agenda | None) -> None:
        """Runs `call` as soon as the access at hand has been answered, if `owner` is not cancelled before; None: nobody
        cancels it."""
        self._soon.append((call, owner, owner._cancelled if owner is not None else 0))
        self.waiting = True
        if threading.get_ident() != self._thread:
            self._wake()

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Runs `call` in `seconds`."""
        timer = Timer(self, time.monotonic_ns() + int(seconds * 1e9), call)
        with self._lock:
            heapq.heappush(self._timers, (timer.deadline_ns, next(self._order), timer))
        self.waiting = True
        if threading.get_ident() != self._thread:
            self._wake()
        return timer

    def drop(self, timer: Timer) -> None:
        """Cancels one of its timers."""
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
        """Drops all timers, and the deferred work that is its own."""
        self._cancelled += 1
        with self._lock:
            for _, _, timer in self._timers:
                timer.call = None
            self._timers = []
            self._dead = 0

    def __len__(self) -> int:
        """Timers that it holds, cancelled ones among them, and what is deferred."""
        return len(self._timers) + len(self._soon)

    def run(self, now_ns: int) -> int | None:
        """Runs all that is due; the next deadline (monotonic ns), None without one.

        Work deferred by deferred work waits for the next turn, so that a device that always defers more
        cannot keep its client waiting; the deadline then is `now_ns`.
        """
        self._thread = threading.get_ident()
        for _ in range(len(self._soon)):
            if not self._soon:
                break  # a call has waited for its client, and served it and the rest of these meanwhile
            call, owner, cancelled = self._soon.popleft()
            if owner is None or owner._cancelled == cancelled:
                self._call(call)
        while self._timers and (due := self._due(now_ns)) is not None:
            self._call(due)
        timers = self._timers  # other threads add to it, or put another in its place; none takes anything out
        self.waiting = bool(self._soon or timers)
        if self._soon:
            return now_ns
        return timers[0][0] if timers else None

    def _due(self, now_ns: int) -> Callable[[], None] | None:
        """What the next timer that is due calls; the timer is gone then."""
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
        except Exception as error:
            self._failed(error)
