"""Asynchronous events (NVMe 1.4, 5.2)."""

from __future__ import annotations

import enum
from collections import deque

from vmodel.devices.nvme.queue import Later
from vmodel.devices.nvme.status import CommandError, NvmeStatus

#: Asynchronous Event Requests that may be outstanding (AERL + 1).
LIMIT = 4
#: Most events that wait for a request; further ones are dropped.
_WAITING = 32


class AsyncEvent(enum.Enum):
    """An event as (type, information, log page), the fields of the completion's Dword 0."""

    INVALID_DOORBELL_REGISTER = (0, 0x00, 0x01)
    INVALID_DOORBELL_VALUE = (0, 0x01, 0x01)
    PERSISTENT_ERROR = (0, 0x03, 0x01)
    TRANSIENT_ERROR = (0, 0x04, 0x01)
    RELIABILITY = (1, 0x00, 0x02)
    TEMPERATURE = (1, 0x01, 0x02)
    SPARE = (1, 0x02, 0x02)
    NAMESPACE_CHANGED = (2, 0x00, 0x04)
    FIRMWARE_ACTIVATION = (2, 0x01, 0x03)
    SANITIZE_COMPLETED = (6, 0x01, 0x81)

    @property
    def type(self) -> int:
        """The event type; after an event, its type is masked until the host has read the log page."""
        return self.value[0]

    @property
    def log_page(self) -> int:
        """The identifier of the log page with details."""
        return self.value[2]

    @property
    def result(self) -> int:
        """Dword 0 of the completion."""
        kind, information, page = self.value
        return page << 16 | information << 8 | kind


class Events:
    """Asynchronous Event Requests that wait for events, and events that wait for requests."""

    def __init__(self) -> None:
        self._requests: deque[Later] = deque()
        self._events: deque[AsyncEvent] = deque()
        self._masked: set[int] = set()

    def clear(self) -> None:
        """Drops all requests and events, at a controller reset."""
        self._requests.clear()
        self._events.clear()
        self._masked.clear()

    def request(self) -> Later:
        """Adds a request, which is completed at the next event.  CommandError: too many are outstanding."""
        if len(self._requests) >= LIMIT:
            raise CommandError(NvmeStatus.EVENT_LIMIT_EXCEEDED)
        later = Later(lambda: self._remove(later))
        self._requests.append(later)
        self._deliver()
        return later

    def _remove(self, later: Later) -> bool:
        self._requests.remove(later)
        return True

    def report(self, event: AsyncEvent) -> None:
        """Reports an event; an equal event that is still waiting is merged with it."""
        if event not in self._events and len(self._events) < _WAITING:
            self._events.append(event)
            self._deliver()

    def drop(self, event: AsyncEvent) -> None:
        """Drops an event that was not reported to the host yet."""
        if event in self._events:
            self._events.remove(event)

    def read(self, log_page: int) -> None:
        """Unmasks the event types of a log page, which the host has read."""
        unmasked = {event.type for event in AsyncEvent if event.log_page == log_page}
        # The page that the host has just read includes these events.
        self._events = deque(e for e in self._events if not (e.log_page == log_page and e.type in self._masked))
        self._masked -= unmasked
        self._deliver()

    def _deliver(self) -> None:
        while self._requests:
            event = next((e for e in self._events if e.type not in self._masked), None)
            if event is None:
                return
            self._events.remove(event)
            self._masked.add(event.type)
            self._requests.popleft().succeed(event.result)
