"""`Changes`: notifies subscribers of devices, groups, drivers, domains and owners that come and go.

Linux: the bus notifiers (include/linux/device/bus.h, BUS_NOTIFY_*), and until Linux 5.18 those of groups
(iommu_group_register_notifier), with the same names.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel.logs import limited

if TYPE_CHECKING:
    from vmodel.iommu.endpoint import Endpoint
    from vmodel.iommu.group import Group

log = logging.getLogger(__name__)
_lost = limited(f"{__name__}.lost")

#: The most changes that wait for a slow subscriber; more are lost, and logged.
MOST_WAITING = 65536


class ChangeKind(enum.Enum):
    """What has changed.  The names in capitals are those of Linux, without BUS_NOTIFY_ or IOMMU_GROUP_NOTIFY_."""

    #: A device was added, or one that was there before got its group, from an IOMMU that was added.
    ADD_DEVICE = "device added"
    #: A device is about to be removed; it still has its group.
    DEL_DEVICE = "device about to be removed"
    REMOVED_DEVICE = "device removed"
    BIND_DRIVER = "driver about to be bound"
    BOUND_DRIVER = "driver bound"
    #: The group has another owner, or a user's domain.
    DRIVER_NOT_BOUND = "driver not bound"
    UNBIND_DRIVER = "driver about to be unbound"
    UNBOUND_DRIVER = "driver unbound"
    #: The owner is asked to release the group, as its device is to be unbound or removed (VFIO_PCI_REQ_ERR_IRQ).
    REQUEST = "release requested"
    ADD_GROUP = "group added"
    REMOVED_GROUP = "group removed"
    NAME = "group named"
    DOMAIN = "domain attached"
    DEFAULT_DOMAIN = "default domain set"
    OWNER = "owner changed"


@dataclass(frozen=True)
class Change:
    """One change.

    `endpoint`: the device, for the kinds about one; `group`: its group or the changed one, or None; `pasid`: of DOMAIN,
    if it is not for all requests without one.  `value`: the driver; the domain, or None for a PASID that has none any
    more; of ADD_GROUP the default domain, which is attached; the owner, None if it was released, and for REQUEST the
    one that is asked; or the name.
    """

    kind: ChangeKind
    endpoint: Endpoint | None = None
    group: Group | None = None
    value: object = None
    pasid: int | None = None


Subscriber = Callable[[Change], object]


class Changes:
    """The lock of a System and its groups, and the changes made while it is held.

    A context manager: the lock, which may be taken again by the thread that has it.  When it is released, the
    subscribers are called, without it.
    """

    def __init__(self) -> None:
        #: The lock alone, for those that read: an access must not call subscribers, which may wait for its end.
        self.reading = self._lock = threading.RLock()
        self._depth = 0
        #: By subscription: a function may have several.
        self._subscribers: dict[object, Subscriber] = {}
        self._waiting: deque[tuple[Change, dict[object, Subscriber]]] = deque()
        #: Held by the thread that calls subscribers: one at a time, so that all see the changes in their order.
        self._one = threading.Lock()
        self._deliverer: int | None = None
        self._released = threading.Condition()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        outermost = not self._depth
        self._lock.release()
        if outermost:
            self._deliver()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` after each change; returns a function that ends it, which may be called twice.

        Subscribers are called one by one, in the order of the changes, by a thread that makes one; a change that is
        made meanwhile, by a subscriber or another thread, follows when they have returned.  An exception of a
        subscriber is logged, and changes nothing.
        """
        this = object()
        with self._lock:
            self._subscribers = {**self._subscribers, this: subscriber}

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = {key: other for key, other in self._subscribers.items() if key is not this}

        return unsubscribe

    def notify(
        self,
        kind: ChangeKind,
        endpoint: Endpoint | None = None,
        group: Group | None = None,
        value: object = None,
        pasid: int | None = None,
    ) -> None:
        """Reports a change: at once, or when the lock is released."""
        with self:
            if not self._subscribers:
                return
            if len(self._waiting) >= MOST_WAITING:
                _lost.warning("a change is not reported, as %d others wait: %s", MOST_WAITING, kind.value)
                return
            self._waiting.append((Change(kind, endpoint, group, value, pasid), self._subscribers))

    def _deliver(self) -> None:
        while self._waiting and self._one.acquire(blocking=False):
            self._deliverer = threading.get_ident()
            try:
                while self._waiting:  # only this thread takes some away
                    change, subscribers = self._waiting.popleft()
                    for key, subscriber in subscribers.items():
                        if key in self._subscribers:
                            _call(subscriber, change)
            finally:
                self._deliverer = None
                self._one.release()

    @property
    def delivering(self) -> bool:
        """Whether the calling thread is a subscriber's."""
        return self._deliverer == threading.get_ident()

    def owner_released(self) -> None:
        """Wakes those that wait for an owner."""
        with self._released:
            self._released.notify_all()

    def wait_for(self, done: Callable[[], bool], seconds: float) -> bool:
        """Waits, without the lock, until `owner_released` and `done`; whether it is done."""
        with self._released:
            return self._released.wait_for(done, seconds)


def _call(subscriber: Subscriber, change: Change) -> None:
    try:
        subscriber(change)
    except Exception:
        log.exception("a subscriber failed at: %s", change.kind.value)
