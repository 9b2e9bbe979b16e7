"""Fault records, which an IOMMU keeps of failed accesses, and page requests, which it makes before an access fails."""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vmodel.errors import Access, Reason


@dataclass(frozen=True)
class FaultRecord:
    """One failed access.

    `time_ns` is CLOCK_MONOTONIC; `requester` the name of the endpoint, `requester_id` the id that the IOMMU saw;
    `domain` (its type) and `group` are those of the access; `level` and `stage` as in DmaFault.
    """

    time_ns: int
    iommu: str
    requester: str
    requester_id: int
    pasid: int | None
    iova: int
    access: Access
    reason: Reason
    level: int
    stage: int
    domain: str
    group: int | None

    def __str__(self) -> str:
        pasid = "" if self.pasid is None else f" pasid {self.pasid:#x}"
        level = f" at level {self.level}" if self.level else ""
        stage = f" of stage {self.stage}" if self.stage else ""
        kind = "|".join(flag.name or "" for flag in Access if flag in self.access) or "-"
        group = "no group" if self.group is None else f"group {self.group}"
        return (
            f"{self.iommu}: {self.requester} [{self.requester_id:#x}]{pasid}: {kind} at iova {self.iova:#x}: "
            f"{self.reason.name}{level}{stage} ({self.domain} domain, {group})"
        )


class FaultQueue:
    """A queue of at most `depth` records, oldest first; a record that arrives when it is full is lost, see `overflow`.

    ValueError: `depth` is less than 1.
    """

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"a fault queue of {depth} records")
        self.depth = depth
        #: Set when a record is lost; stays so until `clear_overflow`.
        self.overflow = False
        #: The number of all records, and of those that were lost.
        self.total = self.lost = 0
        self._records: deque[FaultRecord] = deque()
        self._lock = threading.Lock()

    def put(self, record: FaultRecord) -> bool:
        """Adds a record; False: the queue is full, and the record is lost."""
        with self._lock:
            self.total += 1
            if len(self._records) >= self.depth:
                self.lost += 1
                self.overflow = True
                return False
            self._records.append(record)
            return True

    def peek(self) -> list[FaultRecord]:
        """All records; the queue keeps them."""
        with self._lock:
            return list(self._records)

    def drain(self) -> list[FaultRecord]:
        """All records; the queue is empty afterwards."""
        with self._lock:
            records = list(self._records)
            self._records.clear()
            return records

    def clear_overflow(self) -> None:
        """Clears `overflow`, as a driver does after it has emptied the queue."""
        with self._lock:
            self.overflow = False

    def __len__(self) -> int:
        return len(self._records)


class PageResponse(enum.IntEnum):
    """Answers to a page request (PCIe 10.4.2.2)."""

    #: The page is mapped now: the device tries again.
    SUCCESS = 0
    #: There is no such page, or it does not permit this access: the access fails.
    INVALID = 1
    #: An error occurred: the access fails, and the device makes no further page requests until they are enabled again.
    FAILURE = 15


@dataclass(frozen=True)
class PageRequest:
    """An access waits for the page at `iova` (PCIe 10.4; Linux struct iommu_fault_page_request).

    `requester` is the endpoint's name; `pasid` is None for an access without one; `group_index` identifies the request
    among those of the device.
    """

    requester: str
    pasid: int | None
    iova: int
    access: Access
    group_index: int


#: Answers a page request, on the thread whose access is waiting.
PageHandler = Callable[[PageRequest], PageResponse]
