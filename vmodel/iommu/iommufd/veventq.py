"""`Veventq`: a queue of a vIOMMU's events (Linux drivers/iommu/iommufd/eventq.c)."""

from __future__ import annotations

import enum
import errno
import struct
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel.errors import IommuError
from vmodel.iommu.iommufd.context import Object
from vmodel.iommu.seconds import check_seconds

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.viommu import Viommu

#: The most events of a queue (VEVENTQ_MAX_DEPTH).
MOST_EVENTS = 1 << 19
_HEADER = struct.Struct("<II")
_INT_MAX = (1 << 31) - 1


class VeventqType(enum.IntEnum):
    """Linux enum iommu_veventq_type."""

    DEFAULT = 0
    ARM_SMMUV3 = 1
    TEGRA241_CMDQV = 2


@dataclass(frozen=True)
class Vevent:
    """An event: struct iommufd_vevent_header, and `data` in the format of the queue's type.

    `sequence` counts events from 0 to 2**31 - 1, then from 0: a gap before it is the number of events lost there.
    `lost`: no event (and no data), but the mark that events up to `sequence` were lost, and none has come since.
    """

    sequence: int
    data: bytes = b""
    lost: bool = False

    def pack(self) -> bytes:
        """The header's bytes (flags, sequence), and the data."""
        return _HEADER.pack(int(self.lost), self.sequence) + self.data


class Veventq(Object):
    """A queue of a vIOMMU's events of one type (IOMMU_VEVENTQ_ALLOC); `Viommu.veventq_alloc` makes it.

    In Linux it is read as a file, whose end is needed to destroy it.
    """

    def __init__(self, viommu: Viommu, kind: int, depth: int) -> None:
        super().__init__(viommu.context)
        self.viommu = viommu
        self.type = kind
        self.depth = depth
        self._ready = threading.Condition()
        self._items: deque[Vevent] = deque()
        self._events = 0
        self._sequence = 0
        self._gone = False
        viommu.users += 1

    def release(self) -> None:
        self.viommu.remove_veventq(self)
        self.viommu.users -= 1
        with self._ready:
            self._gone = True
            self._ready.notify_all()

    def put(self, data: bytes) -> None:
        """Adds an event; if the queue is full it is lost (iommufd_viommu_report_event, iommufd_vevent_handler)."""
        with self._ready:
            if self._items and self._items[-1].lost:
                self._items.pop()
            if lost := self._events == self.depth:
                data = b""
            else:
                self._events += 1
            self._items.append(Vevent(self._sequence, data, lost))
            self._sequence = self._sequence + 1 & _INT_MAX
            self._ready.notify_all()

    def read(self, size: int, timeout: float = 0.0) -> list[Vevent]:
        """The oldest events, as many as `size` bytes have room for, and removes them; [] if there are none.

        Waits up to `timeout` seconds for one.  IommuError: EINVAL `size` is less than a header, or than the first
        event; ENOENT the queue has been destroyed, maybe meanwhile.  ValueError: `timeout` is no number.
        (iommufd_veventq_fops_read)
        """
        check_seconds("timeout", timeout)
        self.check()
        if size < _HEADER.size:
            raise IommuError(errno.EINVAL, f"{self}: {size} bytes are less than a header")
        taken: list[Vevent] = []
        with self._ready:
            self._ready.wait_for(lambda: self._items or self._gone, min(timeout, threading.TIMEOUT_MAX))
            if self._gone:
                raise IommuError(errno.ENOENT, f"{self} was destroyed")
            while self._items and (needed := len(self._items[0].pack())) <= size:
                size -= needed
                taken.append(self._items.popleft())
                self._events -= not taken[-1].lost
            if self._items and not taken:
                raise IommuError(errno.EINVAL, f"{self}: {size} bytes are less than the next event")
        return taken

    def __len__(self) -> int:
        """Events that have not been read; the mark of lost ones counts."""
        return len(self._items)
