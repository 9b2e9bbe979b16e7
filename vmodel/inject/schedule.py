"""When a rule fires: which of the events that it matches."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """All that is set must hold.  Times are in seconds since the plan was armed.

    Events before `after`, from `until` on, or while the rule is not open (`between`) are not counted; each time it
    opens, counting begins anew.
    """

    nth: tuple[int, ...] = ()
    every: int | None = None
    first: int | None = None
    probability: float | None = None
    after: float = 0.0
    until: float | None = None
    #: Most often in all; None: no limit.
    times: int | None = None
    #: How long after it first fired the rule ends, in seconds; None: it does not.
    duration: float | None = None
    #: Whether it opens and closes, and is closed at first.
    gated: bool = False


class Progress:
    """One rule's schedule at work.  What it does follows from the seed and the times of its own events alone."""

    def __init__(self, schedule: Schedule, seed: str) -> None:
        self.schedule = schedule
        self.open = not schedule.gated
        #: Matching events that were counted, since it last opened; and in all.
        self.seen = self.matched = 0
        #: How often it has fired, and when first.
        self.fired = 0
        self.since: float | None = None
        self._random = stream(seed, "schedule")

    def over(self, now: float) -> bool:
        """Whether it will never fire again."""
        s = self.schedule
        if s.until is not None and now >= s.until:
            return True
        if s.times is not None and self.fired >= s.times:
            return True
        if s.nth and not s.gated and self.seen >= max(s.nth):
            return True
        return s.duration is not None and self.since is not None and now >= self.since + s.duration

    def begin(self) -> None:
        """The first of the two events of `between` has happened."""
        if not self.open:
            self.open, self.seen = True, 0

    def end(self) -> None:
        """The second has."""
        self.open = False

    def fires(self, now: float) -> bool:
        """A matching event at `now`: whether it is one of those."""
        s = self.schedule
        if not self.open or now < s.after or self.over(now):
            return False
        self.seen += 1
        self.matched += 1
        # One draw for each counted event, come what may: so what is drawn for one does not depend on the others.
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
    """A generator of its own for each seed and use."""
    return random.Random(hashlib.sha256(f"{seed}\0{use}".encode()).digest())
