"""`FaultObject`: the page requests that wait for a user's response (Linux drivers/iommu/iommufd/eventq.c)."""

from __future__ import annotations

import errno
import itertools
import math
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vmodel.errors import Access, IommuError
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.iommufd.context import Context, Object
from vmodel.iommu.seconds import check_seconds

#: How often, in seconds, a page request that waits looks whether its device still has the domain.
_LOOK = 0.1
#: IOMMU_PGFAULT_FLAGS_* and IOMMU_PGFAULT_PERM_*.
_PASID_VALID, _LAST_PAGE = 1, 2
_READ, _WRITE = 1, 2
_MESSAGE = struct.Struct("<IIIIIIQII")


@dataclass(frozen=True)
class PageFault:
    """A page request as the fd of a fault queue has it (struct iommu_hwpt_pgfault).

    `flags`: 1 `pasid` is valid, 2 the last page of its group; `perm`: 1 read, 2 write; `cookie` is for the response.
    """

    flags: int
    dev_id: int
    pasid: int
    grpid: int
    perm: int
    addr: int
    cookie: int
    length: int = 0

    def pack(self) -> bytes:
        """The message's 40 bytes."""
        head = (self.flags, self.dev_id, self.pasid, self.grpid, self.perm)
        return _MESSAGE.pack(*head, 0, self.addr, self.length, self.cookie)


class FaultObject(Object):
    """Page requests that wait for a response (IOMMU_FAULT_QUEUE_ALLOC).

    They fail after `timeout` seconds; None: they wait for as long as it takes, as in Linux.  ValueError: less than 0,
    or no number.
    """

    def __init__(self, context: Context, timeout: float | None = 5.0) -> None:
        if timeout is not None:
            check_seconds("timeout", timeout)
        super().__init__(context)
        self.timeout = timeout
        self._ready = threading.Condition()
        #: Keyed by id(): requests of different devices may be equal.
        self._unread: dict[int, PageRequest] = {}
        self._waiting: dict[int, tuple[PageRequest, PageResponse | None]] = {}
        #: Of the requests that were read as messages: the key of each cookie.
        self._cookies: dict[int, int] = {}
        self._gone = False

    def release(self) -> None:
        with self._ready:
            self._gone = True
            self._ready.notify_all()

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
        end = math.inf if self.timeout is None else time.monotonic() + self.timeout
        while attached():  # not with the lock: it takes others
            left = end - time.monotonic()
            with self._ready:
                if self._ready.wait_for(lambda: self._waiting[key][1] is not None, min(left, _LOOK)) or left <= _LOOK:
                    break
        with self._ready:
            self._unread.pop(key, None)
            _, response = self._waiting.pop(key)
            self._cookies = {cookie: other for cookie, other in self._cookies.items() if other != key}
            return PageResponse.INVALID if response is None else response

    def read(self, timeout: float = 0.0) -> list[PageRequest]:
        """The requests that have not been read yet; waits up to `timeout` seconds for one.

        IommuError(ENOENT): it has been destroyed, maybe meanwhile.  ValueError: `timeout` is no number.
        """
        check_seconds("timeout", timeout)
        self.check()
        with self._ready:
            self._ready.wait_for(lambda: self._unread or self._gone, min(timeout, threading.TIMEOUT_MAX))
            if self._gone:
                raise IommuError(errno.ENOENT, f"{self} was destroyed")
            found = list(self._unread.values())
            self._unread.clear()
            return found

    def read_faults(self, most: int = 64) -> list[PageFault]:
        """read() of the fd: up to `most` messages, oldest first, none if nobody waits.  Each group has one message.

        IommuError(EINVAL): `most` is less than the first group needs.  (Linux iommufd_fault_fops_read)
        """
        devices = {device.endpoint.name: device.id for device in list(self.context.devices)}
        found: list[PageFault] = []
        with self._ready:
            if self._unread and most < 1:
                raise IommuError(errno.EINVAL, f"{self}: no room for a page request")
            for key in list(self._unread)[:most]:
                request = self._unread.pop(key)
                # The smallest that is free, as xa_alloc chooses it.
                cookie = next(number for number in itertools.count() if number not in self._cookies)
                self._cookies[cookie] = key
                found.append(
                    PageFault(
                        _LAST_PAGE | (0 if request.pasid is None else _PASID_VALID),
                        devices.get(request.requester, 0),
                        request.pasid or 0,
                        request.group_index,
                        (_READ if Access.READ in request.access else 0)
                        | (_WRITE if Access.WRITE in request.access else 0),
                        request.iova,
                        cookie,
                    )
                )
        return found

    def write_responses(self, responses: Iterable[tuple[int, int]]) -> int:
        """write() to the fd: pairs of a cookie and a PageResponse; returns how many were taken.

        The first that is wrong ends it.  IommuError(EINVAL): that is the first of all: a response other than SUCCESS
        and INVALID, or no request with this cookie waits.  (Linux iommufd_fault_fops_write)
        """
        done = 0
        for cookie, code in responses:
            with self._ready:
                key = self._cookies.get(cookie)
                good = code in (PageResponse.SUCCESS, PageResponse.INVALID)
                if not good or key is None or self._waiting[key][1] is not None:
                    if done:
                        return done
                    raise IommuError(errno.EINVAL, f"{self}: response {code} to cookie {cookie}: none is waiting")
                del self._cookies[cookie]
                self._waiting[key] = self._waiting[key][0], PageResponse(code)
                self._ready.notify_all()
                done += 1
        return done

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
