"""`DmaWatch`: records the DMA of endpoints, from its beginning until it is closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from vmodel._shim import IncidentKind, Ledger, StaleNote
from vmodel.closing import Closing
from vmodel.dma_report.analysis import Followed, endpoint_report
from vmodel.dma_report.report import DmaReport
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.group import Group

#: The kind of incident that a refused access is, by the reason of the fault.
_KINDS = {
    Reason.BUS_MASTER_OFF: IncidentKind.OFF,
    Reason.NOT_MAPPED: IncidentKind.UNMAPPED,
    Reason.INPUT_WIDTH: IncidentKind.UNMAPPED,
    Reason.PERMISSION: IncidentKind.DIRECTION,
}
#: Seconds within which a guest has made the unmaps that it defers (Linux's flush queue), on a slow host, too.
SETTLE = 1.0
#: Seconds between looks at what is still mapped.
_STEP = 0.02


class DmaWatch(Closing):
    """Records what is mapped for endpoints behind an IOMMU, and what they do with it.  Any thread may call it.

    One watch at a time: a later one takes an endpoint over, and what the earlier one had recorded of it stays.

    ```python
    with DmaWatch("edu", machine.system.endpoints) as watch:
        ...
        print(watch.report().signs)
    ```
    """

    def __init__(self, machine: str, endpoints: Iterable[Endpoint]) -> None:
        self._machine = machine
        self._lock = threading.Lock()
        self._began = time.monotonic_ns()
        self._sealed: DmaReport | None = None
        self._groups: dict[Group, Followed] = {}
        self._of: dict[Endpoint, Followed] = {}
        for endpoint in endpoints:
            if endpoint.group is not None and endpoint.has_requester:
                followed = self._groups.setdefault(endpoint.group, Followed(endpoint.group, Ledger()))
                followed.endpoints.append(endpoint)
                self._of[endpoint] = followed
        for followed in self._groups.values():
            for number, endpoint in enumerate(followed.endpoints):
                if endpoint.bus_master:
                    followed.masters.add(endpoint)
                endpoint.watch(self, followed.ledger, number)

    # ---- what endpoints report (vmodel.iommu.endpoint.Watcher) -------------------------------

    def refused(self, endpoint: Endpoint, fault: DmaFault) -> None:
        """An access failed for good."""
        kind = _KINDS.get(fault.reason, IncidentKind.OTHER)
        endpoint.incident(kind, fault.iova, fault.access, fault.pasid)

    def stale(self, endpoint: Endpoint, note: StaleNote) -> None:
        """An access was served by a cached translation that is not valid any more."""
        endpoint.incident(IncidentKind.STALE, note.iova, Access(note.access), note.pasid)

    def mastering(self, endpoint: Endpoint, on: bool) -> None:
        """Bus mastering went on or off."""
        followed = self._of[endpoint]
        with self._lock:
            followed.changes.append((time.monotonic_ns(), endpoint.name, on))
            (followed.masters.add if on else followed.masters.discard)(endpoint)
            off = not followed.masters
        if off:
            followed.ledger.released()

    # ---- reports ---------------------------------------------------------------------------

    def report(self) -> DmaReport:
        """What was recorded so far, or up to `seal`."""
        if self._sealed is not None:
            return self._sealed
        with self._lock:
            now = [(followed, set(followed.masters), list(followed.changes)) for followed in self._groups.values()]
        return DmaReport(
            machine=self._machine,
            seconds=(time.monotonic_ns() - self._began) / 1e9,
            endpoints=tuple(endpoint_report(*state, self._began) for state in now),
        )

    def seal(self, *, settle: float = 0.0) -> None:
        """Ends the report here: `report` returns what was recorded up to now, whatever happens later.

        A guest may defer unmaps by some milliseconds (Linux's flush queue): this waits for up to `settle` seconds while
        something is mapped though the driver has released the device.
        """
        end = time.monotonic() + settle
        while time.monotonic() < end and any(map(self._unmaps_later, self._groups.values())):
            time.sleep(_STEP)
        if self._sealed is None:
            self._sealed = self.report()

    def _unmaps_later(self, followed: Followed) -> bool:
        return not followed.masters and any(use.released for use in followed.ledger.live())

    def close(self) -> None:
        """Seals the report, and watches no longer."""
        self.seal()
        for endpoint in self._of:
            endpoint.unwatch(self)
