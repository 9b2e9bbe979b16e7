"""`FaultObject`: the page requests that wait for a user's response (Linux drivers/iommu/iommufd/eventq.c)."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable

from vmodel.errors import IommuError
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.iommufd.context import Context, Object

#: How often, in seconds, a page request that waits looks whether its device still has the domain.
_LOOK = 0.1


class FaultObject(Object):
    """Page requests that wait for a response (IOMMU_FAULT_QUEUE_ALLOC); they fail after `timeout` seconds."""

    def __init__(self, context: Context, timeout: float = 5.0) -> None:
        super().__init__(context)
        self.timeout = timeout
        self._ready = threading.Condition()
        #: Keyed by id(): requests of different devices may be equal.
        self._unread: dict[int, PageRequest] = {}
        self._waiting: dict[int, tuple[PageRequest, PageResponse | None]] = {}

    def handle(self, request: PageRequest, attached: Callable[[], bool] = lambda: True) -> PageResponse:
        """The domain's page handler: waits for `respond`, on the thread of the access.  INVALID after `timeout`.

        `attached`: whether the device still has the domain; without it there is no answer to wait for.  `cancel` finds
        the requests of those that are detached; others, such as devices that are removed, are found here.
        """
        key = id(request)
        with self._ready:
            self._unread[key] = request
            self._waiting[key] = request, None
            self._ready.notify_all()
        end = time.monotonic() + self.timeout
        while attached():  # not with the lock: it takes others
            left = end - time.monotonic()
            with self._ready:
                if self._ready.wait_for(lambda: self._waiting[key][1] is not None, min(left, _LOOK)) or left <= _LOOK:
                    break
        with self._ready:
            self._unread.pop(key, None)
            _, response = self._waiting.pop(key)
            return PageResponse.INVALID if response is None else response

    def read(self, timeout: float = 0.0) -> list[PageRequest]:
        """The requests that have not been read yet; waits up to `timeout` seconds for one."""
        with self._ready:
            self._ready.wait_for(lambda: bool(self._unread), timeout)
            found = list(self._unread.values())
            self._unread.clear()
            return found

    def respond(self, request: PageRequest, response: PageResponse) -> None:
        """Answers a request that was read, with SUCCESS or INVALID.

        IommuError(EINVAL): the request is not waiting, or was not read; or another response.
        """
        if response not in (PageResponse.SUCCESS, PageResponse.INVALID):
            raise IommuError(errno.EINVAL, f"{self}: a response must be SUCCESS or INVALID, not {response!r}")
        key = id(request)
        with self._ready:
            if key in self._unread or key not in self._waiting or self._waiting[key][1] is not None:
                raise IommuError(errno.EINVAL, f"{self}: no such request is waiting: {request}")
            self._waiting[key] = request, response
            self._ready.notify_all()

    def cancel(self, requesters: Iterable[str], pasid: int | None) -> None:
        """Answers INVALID to the waiting requests of devices that are being detached."""
        names = set(requesters)
        with self._ready:
            for key, (request, response) in self._waiting.items():
                if response is None and request.requester in names and request.pasid == pasid:
                    self._waiting[key] = request, PageResponse.INVALID
            self._ready.notify_all()
