"""Uses of stale translations: the tables have changed, and the driver has not invalidated the cached entry."""

from __future__ import annotations

from dataclasses import dataclass

from vmodel._shim import STALE_ROUTE, StaleNote
from vmodel.errors import Access, Reason


@dataclass(frozen=True)
class StaleUse:
    """One access of the device `requester` behind `iommu` that used a stale cache entry."""

    iommu: str
    requester: str
    requester_id: int
    note: StaleNote

    def __str__(self) -> str:
        note = self.note
        pasid = "" if note.pasid is None else f" pasid {note.pasid:#x}"
        who = f"{self.iommu}: {self.requester} [{self.requester_id:#x}]{pasid}"
        now = f"say {Reason(note.reason).name}" if note.reason else ""
        if note.kind == STALE_ROUTE:
            now = "cannot be read" if now else f"is {note.now:#x}"
            what = f"its entry was read from {note.word:#x}, where {note.was:#x} was: now that {now}"
        else:
            now = now or f"say gpa {note.now:#x} ({_kind(note.now_prot)})"
            what = f"cached is gpa {note.was:#x} ({_kind(note.was_prot)}), the tables {now}"
        return f"{who}: {_kind(note.access)} at iova {note.iova:#x} is stale: {what}"


def _kind(access: int) -> str:
    return "|".join(flag.name or "" for flag in Access if flag in Access(access)) or "-"
