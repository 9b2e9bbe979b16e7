"""Asynchronous events (NVMe 1.4, 5.2)."""

from __future__ import annotations

import enum
from collections import deque

from vmodel.devices.nvme.queue import Later
from vmodel.devices.nvme.status import CommandError, NvmeStatus

#: Asynchronous Event Requests that may be outstanding (AERL + 1).
LIMIT = 4
#: Events that wait for a request; what comes when there are so many is lost, as the host has not looked for long.
_WAITING = 32


class AsyncEvent(enum.Enum):
    """(type, information, log page), the fields of the completion's Dword 0."""

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
        """What is masked until the log page has been read."""
        return self.value[0]

    @property
    def log_page(self) -> int:
        """The page that says more."""
        return self.value[2]

    @property
    def result(self) -> int:
        """Dword 0 of the completion."""
        kind, information, page = self.value
        return page << 16 | information << 8 | kind


class Events:
    """Requests that wait for events, and events that wait for requests."""

    def __init__(self) -> None:
        self._requests: deque[Later] = deque()
        self._events: deque[AsyncEvent] = deque()
        self._masked: set[int] = set()

    def clear(self) -> None:
        """A controller reset: nothing waits any more."""
        self._requests.clear()
        self._events.clear()
        self._masked.clear()

    def request(self) -> Later:
        """A request has come: it is completed when there is an event.  CommandError: there are too many."""
        if len(self._requests) >= LIMIT:
            raise CommandError(NvmeStatus.EVENT_LIMIT_EXCEEDED)
        later = Later(lambda: self._forget(later))
        self._requests.append(later)
        self._deliver()
        return later

    def _forget(self, later: Later) -> bool:
        self._requests.remove(later)
        return True

    def report(self, event: AsyncEvent) -> None:
        """Something has happened.  The same event that waits already is one."""
        if event not in self._events and len(self._events) < _WAITING:
            self._events.append(event)
            self._deliver()

    def forget(self, event: AsyncEvent) -> None:
        """An event that nobody has heard of yet is not worth it any more."""
        if event in self._events:
            self._events.remove(event)

    def read(self, log_page: int) -> None:
        """The host has read a log page and wants further events of its kinds."""
        unmasked = {event.type for event in AsyncEvent if event.log_page == log_page}
        # What has happened before that is in the page just read.
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
