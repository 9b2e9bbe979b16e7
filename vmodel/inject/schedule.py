"""Schedules: at which of the events that it matches a rule fires."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The conditions for firing, which must all hold.  Times are in seconds since the plan was armed.

    Events before `after`, from `until` on, or while the rule is closed (`between`) are not counted; each time the rule
    opens, the count restarts.
    """

    nth: tuple[int, ...] = ()
    every: int | None = None
    first: int | None = None
    probability: float | None = None
    after: float = 0.0
    until: float | None = None
    #: The most times that the rule fires; None: no limit.
    times: int | None = None
    #: Seconds from the first firing to the end of the rule; None: no end.
    duration: float | None = None
    #: Whether the rule opens and closes (`between`); it is closed at first.
    gated: bool = False


class Progress:
    """The state of one rule's schedule.  It depends only on the seed and on the times of the rule's own events."""

    def __init__(self, schedule: Schedule, seed: str) -> None:
        self.schedule = schedule
        self.open = not schedule.gated
        #: Counted events: since the rule last opened, and in total.
        self.seen = self.matched = 0
        #: How often the rule has fired, and the time of the first firing.
        self.fired = 0
        self.since: float | None = None
        self._random = stream(seed, "schedule")

    def over(self, now: float) -> bool:
        """Whether the rule will never fire again."""
        s = self.schedule
        if s.until is not None and now >= s.until:
            return True
        if s.times is not None and self.fired >= s.times:
            return True
        if s.nth and not s.gated and self.seen >= max(s.nth):
            return True
        return s.duration is not None and self.since is not None and now >= self.since + s.duration

    def begin(self) -> None:
        """Opens the rule: the first event of `between` has happened."""
        if not self.open:
            self.open, self.seen = True, 0

    def end(self) -> None:
        """Closes the rule: the second event of `between` has happened."""
        self.open = False

    def fires(self, now: float) -> bool:
        """Counts a matching event at `now`; returns whether the rule fires at it."""
        s = self.schedule
        if not self.open or now < s.after or self.over(now):
            return False
        self.seen += 1
        self.matched += 1
        # Draw exactly once for each counted event, so that the draw for an event depends on nothing but its number.
        drawn = s.probability is None or self._random.random() < s.probability
        if s.nth and self.seen not in s.nth:
            return False
        if s.every is not None and self.seen % s.every:
            return False
        if s.first is not None and self.seen > s.first:
            return False
        if not drawn:
            return False
        self.fired += 1
        if self.since is None:
            self.since = now
        return True


def stream(seed: str, use: str) -> random.Random:
    """A random generator that depends on `seed` and `use` only."""
    return random.Random(hashlib.sha256(f"{seed}\0{use}".encode()).digest())
