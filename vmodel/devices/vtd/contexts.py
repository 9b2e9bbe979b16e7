"""The context cache and the PASID cache (6.2), which choose the domain of each request.

A device without a cached entry is attached to `unread`, which blocks all requests; its PASIDs are not attached.  So its
first access fails, `resolve` reads its entries from memory and attaches the domain that they describe, and the access
is tried again.  After that, memory is not read until the guest invalidates the entries.  Entries that are not present
are never cached, as with CAP.CM clear.

With CAP.CM the guest invalidates entries that were not present as well, once it has changed them (6.1): so entries are
read at the invalidation, ahead of the first access, which attaches devices before the guest maps anything for them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from vmodel.devices.vtd.codes import FaultCode, Stage, walk_code
from vmodel.devices.vtd.domains import identity_without, walked_domain
from vmodel.devices.vtd.tables import Directory, Entry, Refused, Tables
from vmodel.dma import Dma
from vmodel.errors import DmaFault, IommuError, Reason
from vmodel.iommu.domain import BlockedDomain, Domain, TableDomain
from vmodel.iommu.drivers.vtd_capability import Ecap, VtdCap
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.fault import FaultRecord, PageHandler
from vmodel.iommu.group import Group
from vmodel.iommu.iommu import Iommu
from vmodel.memory import GuestMemory
from vmodel.points import InvalidationEvent, Point, Points
from vmodel.span import Span

#: (source-id, PASID or None) of a request or of an entry.
Key = tuple[int, int | None]
#: The reasons of a fault that is due to a missing cache entry.
_UNREAD = frozenset((Reason.BLOCKED, Reason.PASID))
#: Most cached entries, and most refusals that are kept until they are reported.
_MOST = 4096
#: Most PASIDs that one invalidation reads ahead: a guest may have thousands.
_MOST_AHEAD = 256
_ALL = Span(0, (1 << 64) - 1)


@dataclass(frozen=True)
class CachedContext:
    """A cached entry, and the domain that it describes."""

    entry: Entry
    domain: Domain


class Contexts:
    """Chooses the domain of each device behind a unit, by the guest's tables.  Any thread may call it."""

    def __init__(
        self,
        iommu: Iommu,
        covered: Callable[[], list[Endpoint]],
        memory: GuestMemory,
        cap: int,
        ecap: int,
        ats: Callable[[Endpoint], bool],
        page_handler: PageHandler | None,
        points: Points,
    ) -> None:
        """`covered` returns the devices behind the unit; tables are read from `memory`.

        `ats` returns whether a device currently uses its own TLB; `page_handler` handles page requests, None: they are
        not supported.
        """
        self._points = points
        self.iommu = iommu
        self._covered = covered
        self.cap, self.ecap = VtdCap(cap), Ecap(ecap)
        #: GSTS.TES.
        self.enabled = False
        #: The domain of requests that are not translated: identity without protected memory.
        self.plain: Domain = iommu.identity
        self.unread = BlockedDomain()
        self.unread.name = "no context entry read"
        #: Scalable mode's context cache.
        self.directories: dict[int, Directory] = {}
        #: The PASID cache; in legacy mode (no PASID) the context cache.
        self.entries: dict[Key, CachedContext] = {}
        #: Where the same entry is cached: those share a domain.
        self._alike: dict[Entry, set[Key]] = {}
        #: The attached contexts, by the PASID that requests carry.
        self._attached: dict[Key, CachedContext] = {}
        #: Why requests have no context, and why a page request was refused.
        self._why: dict[Key, Refused] = {}
        self._unasked: dict[Key, Refused] = {}
        self._memory = memory
        #: The unit's own DMA.  It does not depend on the function's Command register: SeaBIOS leaves bus mastering off,
        #: and the guest does not see the function.
        self.dma = Dma(memory)
        self.dma.bus_master = True
        self._output_bits = min(iommu.capabilities.output_bits, 52)
        self.tables = Tables(self.dma, self.cap, self.ecap, self._output_bits)
        self._ats = ats
        self._page_handler = page_handler
        #: Devices that used their own TLB at the last check.
        self._with_tlb: set[str] = set()
        self._lock = threading.RLock()

    # ---- on and off ------------------------------------------------------------------------

    def enable(self, on: bool) -> None:
        """Applies GCMD.TE; the caches are empty afterwards."""
        with self._lock:
            self.enabled = on
            self.directories.clear()
            self.entries.clear()
            self._alike.clear()
            self._attached.clear()
            self._why.clear()
            self._unasked.clear()
            for group in {endpoint.group for endpoint in self._covered()}:
                if group is not None:
                    for pasid in list(group.pasids):
                        group.detach_pasid(pasid)
                    group.set_default(self.unread if on else self.plain, forced=True)
            self._read_ahead()

    def protect(self, spans: Iterable[Span]) -> None:
        """Sets protected memory (11.4.7): untranslated requests to it are blocked, without a fault record."""
        with self._lock:
            self.plain = identity_without(self.iommu, spans)
            if not self.enabled:
                self.enable(False)
            else:
                self._read_ahead(self._drop(lambda source, entry: entry.stage is Stage.PASS_THROUGH))

    # ---- reading ---------------------------------------------------------------------------

    def resolve(self, endpoint: Endpoint, fault: DmaFault) -> bool:
        """Reads a device's entries after a fault; returns whether the access may succeed now.

        That is so if the access failed because its entries were not cached, and the entries allow it.
        """
        source = endpoint.requester_id
        if source is None or fault.reason not in _UNREAD:
            return False
        key = source, fault.pasid
        with self._lock:
            if not self.enabled:  # it may have been disabled after the fault
                return fault.reason is Reason.BLOCKED
            if key in self._attached:  # another thread, or another device with this source-id, was first
                return True
            try:
                self._admit(endpoint, source, fault.pasid)
            except Refused as refused:
                _note(self._why, key, refused)
                return False
            return True

    def _admit(self, endpoint: Endpoint, source: int, asked: int | None) -> None:
        """Attaches a device, or a PASID of it, to the domain that its entries describe.

        Refused: they block such requests.  OSError(ENOMEM): it is not attached.
        """
        key = source, asked
        try:
            self._attached[key] = self._look_up(endpoint, source, asked)
            self._apply(endpoint, asked)
        except IommuError:
            self._attached.pop(key, None)
            raise Refused(FaultCode.PASID_INVALID if self.tables.scalable else FaultCode.CONTEXT_INVALID) from None
        except OSError:
            self._attached.pop(key, None)
            if endpoint.group is not None:
                self._detach(endpoint.group, asked)
            raise

    def _read_ahead(self, lost: Collection[Key] = (), meant: Callable[[int], bool] = lambda source: True) -> None:
        """With CAP.CM: attaches devices that have no cached entry, and `lost`, PASIDs that had one, by their entries.

        What cannot be attached waits for an access, for which the unit then reports a fault.
        """
        if not (self.enabled and self.cap.CM):
            return
        pasids: dict[int, list[int]] = {}
        for device, pasid in islice(((source, pasid) for source, pasid in lost if pasid is not None), _MOST_AHEAD):
            pasids.setdefault(device, []).append(pasid)
        for endpoint in self._covered():
            if (source := endpoint.requester_id) is None or not meant(source):
                continue
            for asked in (None, *pasids.get(source, ())):
                if (source, asked) not in self._attached and len(self.entries) < _MOST:
                    with contextlib.suppress(Refused, OSError):
                        self._admit(endpoint, source, asked)

    def _look_up(self, endpoint: Endpoint, source: int, asked: int | None) -> CachedContext:
        """The context of a request, from the caches or else from memory.  Refused."""
        with_tlb = self._has_tlb(endpoint)
        if not self.tables.scalable:
            if asked is not None:
                raise Refused(FaultCode.PASID_IN_LEGACY)
            context = self.entries.get((source, None)) or self._read(endpoint, self.tables.legacy(source), source)
            if with_tlb and not context.entry.device_tlb:
                raise Refused(FaultCode.NO_DEVICE_TLB, context.entry.quiet)
            return context
        directory = self.directories.get(source)
        if directory is None:
            directory = self.directories[source] = self.tables.directory(source)
        if with_tlb and not directory.device_tlb:
            raise Refused(FaultCode.SM_NO_DEVICE_TLB, directory.quiet)
        pasid = directory.pasid_of(asked)
        return self.entries.get((source, pasid)) or self._read(endpoint, self.tables.entry(directory, pasid), source)

    def _read(self, endpoint: Endpoint, entry: Entry, source: int) -> CachedContext:
        alike = self._alike.get(entry)
        domain = self.entries[next(iter(alike))].domain if alike else self._domain(endpoint, entry)
        context = CachedContext(entry, domain)
        if len(self.entries) >= _MOST:
            oldest = next(iter(self.entries))
            self._drop(lambda source, entry: (source, entry.pasid) == oldest)
        self.entries[source, entry.pasid] = context
        self._alike.setdefault(entry, set()).add((source, entry.pasid))
        return context

    def _domain(self, endpoint: Endpoint, entry: Entry) -> Domain:
        if entry.stage is Stage.PASS_THROUGH:
            return self.plain
        domain = walked_domain(endpoint, self._memory, entry, self.cap, self.ecap, self._output_bits)
        domain.page_handler = self._page_handler
        return domain

    # ---- what is attached ------------------------------------------------------------------

    def _apply(self, first: Endpoint, pasid: int | None) -> None:
        """Attaches the group of `first` to its domain; other source-ids of the group get that of their own entries."""
        group = first.group
        assert group is not None
        self._attach(group, self._attached[first.requester_id or 0, pasid].domain, pasid)
        for endpoint in group.endpoints:
            context = self._attached.get((endpoint.requester_id or 0, pasid))
            if endpoint.requester_id != first.requester_id:
                nothing = self.unread if pasid is None else None
                endpoint.attach(nothing if context is None else context.domain, pasid)
            if context is not None:
                endpoint.chosen_by(self._memory, context.entry.words, pasid)

    def _attach(self, group: Group, domain: Domain, pasid: int | None) -> None:
        if pasid is None:
            group.set_default(domain, forced=True)
        elif pasid in group.pasids:
            group.replace_pasid(domain, pasid)
        else:
            group.attach_pasid(domain, pasid)

    def _drop_attached(self, keys: list[Key]) -> list[Key]:
        """Detaches these requests from their contexts, so that their entries are read again; returns them."""
        for key in keys:
            del self._attached[key]
        gone: dict[int, set[int | None]] = {}
        for source, pasid in keys:
            gone.setdefault(source, set()).add(pasid)
        for endpoint in self._covered():
            for pasid in gone.get(endpoint.requester_id or 0, ()):
                if (group := endpoint.group) is not None:
                    self._detach(group, pasid)
        return keys

    def _detach(self, group: Group, pasid: int | None) -> None:
        left = next((e for e in group.endpoints if (e.requester_id or 0, pasid) in self._attached), None)
        with contextlib.suppress(IommuError):  # a blocking domain can always be attached
            if left is not None:
                self._apply(left, pasid)
            elif pasid is None:
                group.set_default(self.unread, forced=True)
            elif pasid in group.pasids:
                group.detach_pasid(pasid)

    # ---- invalidation ----------------------------------------------------------------------

    def _invalidate(
        self,
        kind: str,
        carry_out: Callable[[], None],
        sources: Callable[[], set[int]],
        *,
        domain: str | None = None,
        span: Span | None = None,
    ) -> None:
        """Carries out an invalidation at a fault point; `sources` returns the source-ids that it concerns."""
        if not self._points.armed(Point.INVALIDATE):
            carry_out()
            return
        with self._lock:
            concerned = sources()
        others = tuple(endpoint.name for endpoint in self._covered() if endpoint.requester_id in concerned)
        address, size = (None, None) if span is None else (span.start, span.size)
        event = InvalidationEvent(Point.INVALIDATE, others=others, kind=kind, domain=domain, address=address, size=size)
        self._points.at(event, lambda _: carry_out())

    def _sources(self, chosen: Callable[[int, Entry], bool]) -> set[int]:
        return {source for (source, _), context in self.entries.items() if chosen(source, context.entry)}

    def _unread_sources(self, meant: Callable[[int], bool] = lambda source: True) -> set[int]:
        """The source-ids for which an invalidation reads entries ahead that are not cached."""
        sources = {endpoint.requester_id for endpoint in self._covered()} if self.enabled and self.cap.CM else set()
        return {s for s in sources if s is not None and meant(s) and (s, None) not in self._attached}

    def invalidate(self, domain_id: int | None = None, source: int | None = None, mask: int = 0) -> None:
        """Context-cache invalidation: of all entries, of a domain, or of a device.

        `mask`: bits of `source` that are ignored.
        """

        def meant(cached: int) -> bool:
            return source is None or not (cached ^ source) & 0xFFFF & ~mask

        def chosen(cached: int, entry: Entry) -> bool:
            # Scalable mode's context entries have no domain-id.
            return meant(cached) and (self.tables.scalable or domain_id in (None, entry.domain_id))

        def carry_out() -> None:
            with self._lock:
                if not self.tables.scalable:
                    lost = self._drop(chosen)
                else:
                    # The PASID cache keeps its entries.
                    gone = {cached for cached in self.directories if meant(cached)}
                    for cached in gone:
                        del self.directories[cached]
                    lost = self._drop_attached([key for key in self._attached if key[0] in gone])
                self._read_ahead(lost, meant)

        self._invalidate("context", carry_out, lambda: self._sources(chosen) | self._unread_sources(meant))

    def invalidate_pasids(self, domain_id: int | None = None, pasid: int | None = None) -> None:
        """PASID-cache invalidation: of all entries, of a domain, or of one PASID of a domain."""

        def chosen(_: int, entry: Entry) -> bool:
            return entry.pasid is not None and domain_id in (None, entry.domain_id) and pasid in (None, entry.pasid)

        def carry_out() -> None:
            with self._lock:
                lost = self._drop(chosen)
                if pasid:
                    lost += [(e.requester_id, pasid) for e in self._covered() if e.requester_id is not None]
                self._read_ahead(lost)

        self._invalidate(
            "pasid", carry_out, lambda: self._sources(chosen) | self._unread_sources(), domain=_named(domain_id)
        )

    def _drop(self, chosen: Callable[[int, Entry], bool]) -> list[Key]:
        """Drops cached entries; returns the requests that they translated, which are detached."""
        gone = {key: context for key, context in self.entries.items() if chosen(key[0], context.entry)}
        for key, context in gone.items():
            del self.entries[key]
            alike = self._alike[context.entry]
            alike.remove(key)
            if not alike:
                del self._alike[context.entry]
        # Requests with a PASID and requests without one may share an entry.
        lost = {(source, context.entry.pasid) for (source, _), context in gone.items()}
        return self._drop_attached(
            [key for key, context in self._attached.items() if (key[0], context.entry.pasid) in lost]
        )

    def flush(self, domain_id: int | None = None, span: Span | None = None) -> None:
        """IOTLB invalidation: of all translations, of a domain, or of IOVAs of a domain."""
        # 6.5.2.3: translations that involve first-stage tables are invalidated completely.
        self._flush(
            lambda entry: domain_id in (None, entry.domain_id),
            lambda entry: None if entry.first_levels else span,
            domain_id,
            span,
        )

    def flush_pasid(self, domain_id: int, pasid: int, span: Span | None = None) -> None:
        """PASID-based IOTLB invalidation: of all translations of a PASID in a domain, or of IOVAs."""
        # 6.5.2.4: here translations by second-stage tables alone are invalidated completely.
        self._flush(
            lambda entry: (entry.domain_id, entry.pasid) == (domain_id, pasid),
            lambda entry: span if entry.first_levels else None,
            domain_id,
            span,
        )

    def _flush(
        self,
        chosen: Callable[[Entry], bool],
        what: Callable[[Entry], Span | None],
        domain_id: int | None,
        span: Span | None,
    ) -> None:
        with self._lock:
            domains = {c.domain: what(c.entry) for c in self.entries.values() if chosen(c.entry)}
            self._update_tlbs()

        def flush() -> None:
            for domain, part in domains.items():
                if isinstance(domain, TableDomain):
                    domain.flush(part, own=False)

        self._invalidate(
            "iotlb",
            flush,
            lambda: self._sources(lambda _, entry: chosen(entry)),
            domain=_named(domain_id),
            span=_where(span),
        )

    # ---- devices' own TLBs -----------------------------------------------------------------

    def _has_tlb(self, endpoint: Endpoint) -> bool:
        """Whether a device uses its own TLB; if that has changed, the TLB is empty afterwards."""
        on = self._ats(endpoint)
        if on != (endpoint.name in self._with_tlb):
            (self._with_tlb.add if on else self._with_tlb.discard)(endpoint.name)
            endpoint.set_ats(on)
            self._flush_device(endpoint, _ALL)
        return on

    def _update_tlbs(self) -> None:
        if self.ecap.DT:
            for endpoint in self._covered():
                self._has_tlb(endpoint)

    def _flush_device(self, endpoint: Endpoint, span: Span) -> None:
        endpoint.invalidate(span)
        for pasid in [] if endpoint.group is None else list(endpoint.group.pasids):
            endpoint.invalidate(span, pasid)

    def flush_device(self, source: int, span: Span, pasid: int | None = None, everything: bool = False) -> None:
        """Device-TLB invalidation of IOVAs: of a PASID, or without one; `everything`: of all PASIDs and without one."""

        def flush() -> None:
            with self._lock:
                for endpoint in self._covered():
                    if endpoint.requester_id is None or endpoint.requester_id & 0xFFFF != source:
                        continue
                    if not self._has_tlb(endpoint):
                        continue
                    if everything:
                        self._flush_device(endpoint, span)
                    else:
                        endpoint.invalidate(span, pasid)

        self._invalidate(
            "device-tlb", flush, lambda: {s for s, _ in self.entries if s & 0xFFFF == source}, span=_where(span)
        )

    # ---- faults and page requests ----------------------------------------------------------

    def may_ask(self, source: int, pasid: int | None) -> bool:
        """Whether a device's context entry allows page requests; if not, its next fault has that reason."""
        with self._lock:
            directory = self.directories.get(source)
            if directory is None or not directory.page_requests:
                quiet = directory is not None and directory.quiet
                code = FaultCode.NO_PAGE_REQUESTS if self.tables.scalable else FaultCode.PAGE_REQUEST_IN_LEGACY
                _note(self._unasked, (source, pasid), Refused(code, quiet))
                return False
            return True

    def code_of(self, record: FaultRecord) -> FaultCode | None:
        """The fault reason with which the unit reports a failed access; None: the unit does not report it."""
        key = record.requester_id, record.pasid
        with self._lock:
            if not self.enabled:
                return None
            why = self._why.get(key) if record.reason in _UNREAD else self._unasked.pop(key, None)
            context = self._attached.get(key)
        if why is not None:
            return None if why.quiet else why.code
        if context is None or context.entry.quiet or context.entry.stage is Stage.PASS_THROUGH:
            return None
        return walk_code(record, context.entry.stage, self.tables.scalable)


def _named(domain_id: int | None) -> str | None:
    return None if domain_id is None else f"domain-id {domain_id}"


def _where(span: Span | None) -> Span:
    return Span(0, 2**64 - 1) if span is None else span


def _note(refusals: dict[Key, Refused], key: Key, refused: Refused) -> None:
    if len(refusals) >= _MOST:
        refusals.clear()
    refusals[key] = refused
