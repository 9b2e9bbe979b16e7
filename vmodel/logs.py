"""Log lines that somebody outside can cause: at most so many in a while, and the rest is counted and said.

What a guest or client does in a loop would fill a disk otherwise.  `limited(name)` is a logger for such lines; the
limit is for each level and each device, which a line names as its first argument.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable

#: Lines of warnings and errors, and of what --verbose adds, in SECONDS.
BURST, VERBOSE_BURST = 10, 200
SECONDS = 5.0
#: Names that a limiter tells apart; further ones share one limit.
_NAMES = 64


class RateLimit:
    """At most `burst` events in `seconds`; the rest are counted."""

    def __init__(self, burst: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.burst, self.seconds = burst, seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._began = clock()
        self._passed = self._held = 0

    def __call__(self) -> tuple[bool, int]:
        """Whether this event may pass; and how many were held back in the interval that has ended with it."""
        with self._lock:
            now, held = self._clock(), 0
            if now - self._began >= self.seconds:
                held, self._held = self._held, 0
                self._began, self._passed = now, 0
            if self._passed < self.burst:
                self._passed += 1
                return True, held
            self._held += 1
            return False, held

    def take(self) -> int:
        """How many were held back and not told of yet."""
        with self._lock:
            held, self._held = self._held, 0
            return held


class Limiter(logging.Filter):
    """Holds back what is too much of one logger; the next line that passes says how much that was."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._limits: dict[Hashable, RateLimit] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        first = record.args[0] if isinstance(record.args, tuple) and record.args else None
        name = first if isinstance(first, str) else None
        passed, held = self._limit(record.levelno, name)()
        if held:
            record.msg, record.args = f"{record.getMessage()} ({held} lines before it were held back)", ()
        return passed

    def _limit(self, level: int, name: str | None) -> RateLimit:
        key: Hashable = (level, name)
        limit = self._limits.get(key)
        if limit is None:
            if len(self._limits) >= _NAMES:
                key = (level, None)
            burst = BURST if level >= logging.WARNING else VERBOSE_BURST
            limit = self._limits.setdefault(key, RateLimit(burst, SECONDS, self._clock))
        return limit

    def take(self) -> int:
        """Lines that were held back and not told of yet."""
        return sum(limit.take() for limit in list(self._limits.values()))


def limited(name: str) -> logging.Logger:
    """The logger of that name, with a limit that begins anew."""
    logger = logging.getLogger(name)
    for old in [found for found in logger.filters if isinstance(found, Limiter)]:
        logger.removeFilter(old)
    logger.addFilter(Limiter())
    return logger


def tell_held(logger: logging.Logger) -> None:
    """Says how many lines of a limited logger were held back, if any; for the end."""
    for limiter in [found for found in logger.filters if isinstance(found, Limiter)]:
        if held := limiter.take():
            text = (logger.name, held)
            # Not logger.warning(): the limiter would hold this back, too.
            record = logger.makeRecord(
                logger.name, logging.WARNING, __file__, 0, "%s: %d lines were held back", text, None
            )
            logger.callHandlers(record)
