"""What is mapped for devices, and what they do with it; see vms_ledger_*."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vmodel._shim.fault import NO_PASID
from vmodel._shim.handle import check, create
from vmodel._shim.requester import Requester
from vmodel._vmshim import ffi, lib

#: The most live mappings, kept ended ones and kept incidents of a ledger, and the spans of each mapping and direction.
LEDGER_LIVE: int = lib.VMS_LEDGER_LIVE
LEDGER_ENDED: int = lib.VMS_LEDGER_ENDED
LEDGER_INCIDENTS: int = lib.VMS_LEDGER_INCIDENTS
SET_SPANS: int = lib.VMS_SET_SPANS
REUSE_NS: int = lib.VMS_REUSE_NS
#: Nanoseconds after which a mapping is UseFlag.LONG.
LONG_NS: int = lib.VMS_LONG_NS
_CHUNK = 256


class UseFlag(enum.IntFlag):
    """VMS_USE_*."""

    LEARNT = lib.VMS_USE_LEARNT
    DETACHED = lib.VMS_USE_DETACHED
    TWIN = lib.VMS_USE_TWIN
    INEXACT = lib.VMS_USE_INEXACT
    LONG = lib.VMS_USE_LONG
    TOO_LARGE = lib.VMS_USE_TOO_LARGE


class IncidentKind(enum.IntEnum):
    """enum vms_incident_kind."""

    OFF = lib.VMS_INCIDENT_OFF
    UNMAPPED = lib.VMS_INCIDENT_UNMAPPED
    DIRECTION = lib.VMS_INCIDENT_DIRECTION
    STALE = lib.VMS_INCIDENT_STALE
    OTHER = lib.VMS_INCIDENT_OTHER


@dataclass(frozen=True)
class MappingUse:
    """A mapping and its use; the fields are those of vms_use, but `pasid`: None without one."""

    id: int
    start: int
    last: int
    gpa: int
    prot: int
    pasid: int | None
    who: int
    flags: UseFlag
    mapped: int
    ended: int
    first_use: int
    last_use: int
    released: int
    read: int
    written: int
    touched: int
    pointers: int
    exposed_pointers: int
    twin: int

    @property
    def size(self) -> int:
        return self.last - self.start + 1


@dataclass(frozen=True)
class DmaIncident:
    """An access that was refused, or should have been; `use`: the mapping it met, None: none is known."""

    time: int
    iova: int
    kind: IncidentKind
    access: int
    pasid: int | None
    who: int
    use: MappingUse | None


@dataclass(frozen=True)
class LedgerTotals:
    """The fields are those of vms_ledger_totals; `uses`, `bytes` and `touched` are indexed as there."""

    mapped: int
    mapped_bytes: int
    ended: int
    live: int
    live_bytes: int
    most_live: int
    learnt: int
    detached: int
    unrecorded: int
    unwalked: int
    flushes: int
    reused: int
    twins: int
    released: int
    incidents: tuple[int, ...]
    #: Of what has ended; the first index is 1 for UseFlag.LONG: by protection - 1, directions used (1: read,
    #: 2: written) and size class (2**n pages at most).
    uses: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    #: Of what was used: by protection - 1 and size class.
    bytes: tuple[tuple[tuple[int, ...], ...], ...]
    touched: tuple[tuple[tuple[int, ...], ...], ...]
    too_large: tuple[int, ...]
    too_large_bytes: tuple[int, ...]
    exposed_pointers: tuple[int, ...]
    pointers: int


def _use(u: Any) -> MappingUse:
    pasid = None if u.pasid == NO_PASID else u.pasid
    times = u.mapped, u.ended, u.first_use, u.last_use, u.released
    moved = u.read, u.written, u.touched
    flags = UseFlag(u.flags)
    return MappingUse(
        u.id,
        u.start,
        u.last,
        u.gpa,
        u.prot,
        pasid,
        u.who,
        flags,
        *times,
        *moved,
        u.pointers,
        u.exposed_pointers,
        u.twin,
    )


def _nested(array: Any, depth: int) -> Any:
    return tuple(_nested(item, depth - 1) if depth > 1 else int(item) for item in array)


class Ledger:
    """Records what is mapped for the requesters that follow it, and what they do with it.  Any thread may call it."""

    def __init__(self) -> None:
        self.handle = create(lib.vms_ledger_create, lib.vms_ledger_destroy, "vms_ledger")

    def follow(self, requester: Requester, who: int, *, notified: bool) -> None:
        """Records this requester from now on; `notified`: its guest invalidates the IOTLB after it maps, too."""
        check(lib.vms_requester_follow(requester.handle, self.handle, who, notified))

    @staticmethod
    def leave(requester: Requester) -> None:
        """The requester is not recorded any more."""
        check(lib.vms_requester_follow(requester.handle, ffi.NULL, 0, False))

    @staticmethod
    def incident(requester: Requester, kind: IncidentKind, iova: int, access: int, pasid: int = NO_PASID) -> None:
        """Notes an access that was refused, or should have been.  OSError(ENOENT): the requester follows no ledger."""
        check(lib.vms_requester_incident(requester.handle, pasid, kind, iova, access))

    def released(self) -> None:
        """The driver released the device: what stays mapped, and is not used any more, has `released`."""
        check(lib.vms_ledger_released(self.handle))

    def live(self) -> Iterator[MappingUse]:
        """Live mappings, in the order in which they were made."""
        out = ffi.new("vms_use[]", _CHUNK)
        last = 0
        while n := lib.vms_ledger_live(self.handle, last, out, _CHUNK):
            yield from [_use(out[i]) for i in range(n)]
            last = out[n - 1].id

    def ended(self, number: int = 0) -> Iterator[tuple[int, MappingUse]]:
        """Mappings that have ended, of the last LEDGER_ENDED those from `number` on, with their numbers."""
        out, at = ffi.new("vms_use[]", _CHUNK), ffi.new("uint64_t *", number)
        while n := lib.vms_ledger_ended(self.handle, at, out, _CHUNK):
            first = at[0] - n
            yield from [(first + i, _use(out[i])) for i in range(n)]

    def spans(self, mapping: int, *, written: bool) -> list[tuple[int, int]]:
        """The (first, last) bytes that were read, or written, in a mapping, by its id."""
        out = ffi.new("vms_range[]", SET_SPANS)
        n = lib.vms_ledger_spans(self.handle, mapping, written, out, SET_SPANS)
        return [(out[i].start, out[i].last) for i in range(n)]

    def incidents(self, number: int = 0) -> Iterator[tuple[int, DmaIncident]]:
        """Of the last LEDGER_INCIDENTS incidents those from `number` on, with their numbers."""
        out, at = ffi.new("vms_incident[]", _CHUNK), ffi.new("uint64_t *", number)
        while n := lib.vms_ledger_incidents(self.handle, at, out, _CHUNK):
            first = at[0] - n
            for i in range(n):
                item = out[i]
                pasid = None if item.pasid == NO_PASID else item.pasid
                met = _use(item.use) if item.use.id else None
                yield (
                    first + i,
                    DmaIncident(item.time, item.iova, IncidentKind(item.kind), item.access, pasid, item.who, met),
                )

    def totals(self) -> LedgerTotals:
        out = ffi.new("vms_ledger_totals *")
        lib.vms_ledger_totals_get(self.handle, out)
        t = out[0]
        counts = t.unrecorded, t.unwalked, t.flushes, t.reused, t.twins, t.released
        arrays = _nested(t.uses, 4), _nested(t.bytes, 3), _nested(t.touched, 3)
        lists = _nested(t.too_large, 1), _nested(t.too_large_bytes, 1), _nested(t.exposed_pointers, 1)
        return LedgerTotals(
            *(t.mapped, t.mapped_bytes, t.ended, t.live, t.live_bytes, t.most_live, t.learnt, t.detached, *counts),
            _nested(t.incidents, 1),
            *arrays,
            *lists,
            t.pointers,
        )
