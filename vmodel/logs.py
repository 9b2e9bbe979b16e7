"""Rate-limited loggers, for lines that a guest or client can cause: otherwise a loop of theirs could fill a disk.

`limited(name)` is such a logger.  The limit is per level and device (a line's first argument names the device); lines
over the limit are counted, and a later line or `report_held` at the end reports how many there were.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable

#: Lines in SECONDS: of warnings and errors; of the lower levels that --verbose enables.
BURST, VERBOSE_BURST = 10, 200
SECONDS = 5.0
#: Most device names with a limit of their own in one limiter; further ones share one limit.
_NAMES = 64

_lock = threading.Lock()
#: All that may hold back lines; guarded by `_lock`.
_loggers: weakref.WeakSet[logging.Logger] = weakref.WeakSet()
_warnings: weakref.WeakSet[Warnings] = weakref.WeakSet()


class RateLimit:
    """At most `burst` events in `seconds`; the rest are counted."""

    def __init__(self, burst: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.burst, self.seconds = burst, seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._began = clock()
        self._passed = self._held = 0

    def __call__(self) -> tuple[bool, int]:
        """(whether this event may pass, how many were held back in the interval that has just ended)."""
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
        """Returns how many events were held back and not reported yet, and resets that number."""
        with self._lock:
            held, self._held = self._held, 0
            return held


class Warnings:
    """Warnings of one kind from code that is too hot for a limited logger: a line that is held back is never made."""

    def __init__(self, logger: logging.Logger, name: str, what: str) -> None:
        """`what`, of the device or IOMMU `name`, is in the line that reports how many lines were held back."""
        self.limit = RateLimit(BURST, SECONDS)
        self._logger, self._name, self._what = logger, name, what
        with _lock:
            _warnings.add(self)

    def put(self, what: object) -> None:
        """Logs a line, unless it is over the limit."""
        passed, held = self.limit()
        self._report(held)
        if passed:
            self._logger.warning("%s", what)

    def report_held(self) -> None:
        """Logs how many lines were held back and not reported yet, if any."""
        self._report(self.limit.take())

    def _report(self, held: int) -> None:
        if held:
            self._logger.warning("%s: %d more %s were not logged", self._name, held, self._what)


class Limiter(logging.Filter):
    """Holds back a logger's lines over the limit; the next line that passes reports how many those were."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, verbose_burst: int = VERBOSE_BURST) -> None:
        super().__init__()
        self._clock = clock
        self._verbose_burst = verbose_burst
        self._limits: dict[Hashable, RateLimit] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line may be logged; adds to its text how many lines were held back before."""
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
            burst = BURST if level >= logging.WARNING else self._verbose_burst
            limit = self._limits.setdefault(key, RateLimit(burst, SECONDS, self._clock))
        return limit

    def take(self) -> int:
        """Returns how many lines were held back and not reported yet, and resets that number."""
        return sum(limit.take() for limit in list(self._limits.values()))


def limited(name: str, verbose_burst: int = VERBOSE_BURST) -> logging.Logger:
    """The logger of that name with a new rate limit, which replaces an earlier one.

    `verbose_burst`: most lines of the levels below warnings, for each device in SECONDS.
    """
    logger = logging.getLogger(name)
    for old in [found for found in logger.filters if isinstance(found, Limiter)]:
        logger.removeFilter(old)
    logger.addFilter(Limiter(verbose_burst=verbose_burst))
    with _lock:
        _loggers.add(logger)
    return logger


def report_held() -> None:
    """Logs how many lines were held back and not reported yet, if any, one line for each logger; call it at the end."""
    with _lock:
        loggers, warnings = list(_loggers), list(_warnings)
    for one in warnings:
        one.report_held()
    for logger in loggers:
        held = sum(limiter.take() for limiter in logger.filters if isinstance(limiter, Limiter))
        if held:
            text = (logger.name, held)
            # Not logger.warning(): the limiter would hold this back, too.
            record = logger.makeRecord(
                logger.name, logging.WARNING, __file__, 0, "%s: %d lines were held back", text, None
            )
            logger.callHandlers(record)
