"""The context cache and the PASID cache (6.2): which domain each request goes through, and for how long.

A device without an entry in the caches is attached to `unread`, which lets nothing through, and its PASIDs to nothing.
So its first access fails, `resolve` reads its entries and attaches what they say, and the access is tried again.  After
that memory is not looked at until the guest invalidates the entries, as with CAP.CM clear: what is not present is never
cached.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vmodel.devices.vtd.codes import FaultCode, Stage, walk_code
from vmodel.devices.vtd.regs import Ecap, VtdCap
from vmodel.devices.vtd.tables import Directory, Entry, Refused, Tables
from vmodel.dma import Dma
from vmodel.errors import DmaFault, IommuError, Reason
from vmodel.iommu.allocate import walked_domain_alloc
from vmodel.iommu.domain import AllocFlags, BlockedDomain, Domain, DomainType, PagingDomain, TableDomain
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.fault import FaultRecord, PageHandler
from vmodel.iommu.group import Group
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat
from vmodel.memory import GuestMemory
from vmodel.points import Point, Points
from vmodel.span import PAGE, Span

#: Source-id, and the PASID of a request or of an entry, if any.
Key = tuple[int, int | None]
#: Reasons for which a request without an entry fails.
_UNREAD = frozenset((Reason.BLOCKED, Reason.PASID))
#: How many entries are cached, and how many refusals are remembered until they are reported.
_MOST = 4096
_ALL = Span(0, (1 << 64) - 1)


@dataclass(frozen=True)
class CachedContext:
    """A cached entry, and the domain that it leads to."""

    entry: Entry
    domain: Domain


class Contexts:
    """Which domain each device behind a unit goes through.  Any thread may call it."""

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
        """`covered`: the devices behind the unit at any time; `memory`: where tables are read.

        `ats`: whether a device uses a TLB of its own now; `page_handler`: asked for pages, None: there are no requests.
        """
        self._points = points
        self.iommu = iommu
        self._covered = covered
        self.cap, self.ecap = VtdCap(cap), Ecap(ecap)
        #: GSTS.TES.
        self.enabled = False
        #: What is not translated goes through it: identity, less protected memory.
        self.plain: Domain = iommu.identity
        self.unread = BlockedDomain()
        self.unread.name = "no context entry read"
        #: Scalable mode's context cache.
        self.directories: dict[int, Directory] = {}
        #: The PASID cache; in legacy mode (no PASID) the context cache.
        self.entries: dict[Key, CachedContext] = {}
        #: What requests go through, by the PASID that they carry.
        self._shown: dict[Key, CachedContext] = {}
        #: Why there is nothing that they could go through, and why a page request was not passed on.
        self._why: dict[Key, Refused] = {}
        self._unasked: dict[Key, Refused] = {}
        self._memory = memory
        #: How the unit itself reaches memory, whatever its function's Command says: SeaBIOS leaves bus mastering off,
        #: and the guest does not see the function.
        self.dma = Dma(memory)
        self.dma.bus_master = True
        self._output_bits = min(iommu.capabilities.output_bits, 52)
        self.tables = Tables(self.dma, self.cap, self.ecap, self._output_bits)
        self._ats = ats
        self._page_handler = page_handler
        #: Devices that had a TLB of their own when that was last looked at.
        self._with_tlb: set[str] = set()
        self._lock = threading.RLock()

    # ---- on and off ------------------------------------------------------------------------

    def enable(self, on: bool) -> None:
        """GCMD.TE.  Either way the caches are empty afterwards."""
        with self._lock:
            self.enabled = on
            self.directories.clear()
            self.entries.clear()
            self._shown.clear()
            self._why.clear()
            self._unasked.clear()
            for group in {endpoint.group for endpoint in self._covered()}:
                if group is not None:
                    for pasid in list(group.pasids):
                        group.detach_pasid(pasid)
                    group.set_default(self.unread if on else self.plain)

    def protect(self, spans: Iterable[Span]) -> None:
        """Protected memory (11.4.7): what is not translated does not get there, without a fault being recorded."""
        with self._lock:
            self.plain = _without(self.iommu, spans)
            if not self.enabled:
                self.enable(False)
            else:
                self._drop(lambda source, entry: entry.stage is Stage.PASS_THROUGH)

    # ---- reading ---------------------------------------------------------------------------

    def resolve(self, endpoint: Endpoint, fault: DmaFault) -> bool:
        """An access has failed: whether that was for want of an entry, and there is one now."""
        source = endpoint.requester_id
        if source is None or fault.reason not in _UNREAD:
            return False
        key = source, fault.pasid
        with self._lock:
            if not self.enabled:  # perhaps since a moment ago
                return fault.reason is Reason.BLOCKED
            if key in self._shown:  # another thread, or device of this source-id, was first
                return True
            try:
                self._shown[key] = self._look_up(endpoint, source, fault.pasid)
                self._show(endpoint, fault.pasid)
            except Refused as refused:
                _note(self._why, key, refused)
                return False
            except IommuError:
                self._shown.pop(key, None)
                code = FaultCode.PASID_INVALID if self.tables.scalable else FaultCode.CONTEXT_INVALID
                _note(self._why, key, Refused(code))
                return False
            return True

    def _look_up(self, endpoint: Endpoint, source: int, asked: int | None) -> CachedContext:
        """By way of the caches."""
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
        known = next((context.domain for context in self.entries.values() if context.entry == entry), None)
        context = CachedContext(entry, known or self._domain(endpoint, entry))
        if len(self.entries) >= _MOST:
            oldest = next(iter(self.entries))
            self._drop(lambda source, entry: (source, entry.pasid) == oldest)
        self.entries[source, entry.pasid] = context
        return context

    def _domain(self, endpoint: Endpoint, entry: Entry) -> Domain:
        if entry.stage is Stage.PASS_THROUGH:
            return self.plain
        domain = None
        if entry.second_levels:
            bits = min(12 + 9 * entry.second_levels, self.cap.MGAW + 1)
            table = Table(
                TableFormat.VTD_SECOND, entry.second_levels, entry.second, bits, self._output_bits, self._flags(entry)
            )
            domain = walked_domain_alloc(endpoint, self._memory, table)
        if entry.first_levels:
            bits = 12 + 9 * entry.first_levels
            table = Table(TableFormat.X86, entry.first_levels, entry.first, bits, self._output_bits)
            domain = walked_domain_alloc(endpoint, self._memory, table, domain)
        assert domain is not None
        domain.name = f"domain-id {entry.domain_id}"
        if entry.pasid is not None:
            domain.name += f", {entry.stage.name.lower()} stage, pasid {entry.pasid}"
        domain.page_handler = self._page_handler
        return domain

    def _flags(self, entry: Entry) -> TableFlag:
        flags = TableFlag(0)
        for flag, there in (
            (TableFlag.PAGES_2M, self.cap.SLLPS & 1),
            (TableFlag.PAGES_1G, self.cap.SLLPS & 2),
            (TableFlag.SNOOP, self.ecap.SC),
            (TableFlag.SET_ACCESSED | TableFlag.SET_DIRTY, entry.sets_flags),
        ):
            flags |= flag if there else 0
        return flags

    # ---- what is attached ------------------------------------------------------------------

    def _show(self, first: Endpoint, pasid: int | None) -> None:
        """A group has one domain to be looked at, `first`'s; its other source-ids have what their own entries say."""
        group = first.group
        assert group is not None
        self._attach(group, self._shown[first.requester_id or 0, pasid].domain, pasid)
        for endpoint in group.endpoints:
            context = self._shown.get((endpoint.requester_id or 0, pasid))
            if endpoint.requester_id != first.requester_id:
                nothing = self.unread if pasid is None else None
                endpoint.attach(nothing if context is None else context.domain, pasid)
            if context is not None:
                endpoint.chosen_by(self._memory, context.entry.words, pasid)

    def _attach(self, group: Group, domain: Domain, pasid: int | None) -> None:
        if pasid is None:
            group.set_default(domain)
        elif pasid in group.pasids:
            group.replace_pasid(domain, pasid)
        else:
            group.attach_pasid(domain, pasid)

    def _hide(self, keys: set[Key]) -> None:
        """What these requests went through is gone: they have to be looked up again."""
        for key in keys:
            del self._shown[key]
        gone: dict[int, set[int | None]] = {}
        for source, pasid in keys:
            gone.setdefault(source, set()).add(pasid)
        for endpoint in self._covered():
            for pasid in gone.get(endpoint.requester_id or 0, ()):
                if (group := endpoint.group) is not None:
                    self._detach(group, pasid)

    def _detach(self, group: Group, pasid: int | None) -> None:
        left = next((e for e in group.endpoints if (e.requester_id or 0, pasid) in self._shown), None)
        with contextlib.suppress(IommuError):  # blocked fits everywhere
            if left is not None:
                self._show(left, pasid)
            elif pasid is None:
                group.set_default(self.unread)
            elif pasid in group.pasids:
                group.detach_pasid(pasid)

    # ---- invalidation ----------------------------------------------------------------------

    def _invalidate(
        self, kind: str, carry_out: Callable[[], None], sources: Callable[[], set[int]], **about: str | int | None
    ) -> None:
        """Carries an invalidation out, as a fault point; `sources`: the devices that it concerns, by source-id."""
        if not self._points.wants(Point.INVALIDATE):
            carry_out()
            return
        with self._lock:
            concerned = sources()
        others = tuple(endpoint.name for endpoint in self._covered() if endpoint.requester_id in concerned)
        self._points.at(Point.INVALIDATE, lambda _: carry_out(), kind=kind, others=others, **about)

    def _sources(self, chosen: Callable[[int, Entry], bool]) -> set[int]:
        return {source for (source, _), context in self.entries.items() if chosen(source, context.entry)}

    def forget(self, domain_id: int | None = None, source: int | None = None, mask: int = 0) -> None:
        """Context-cache invalidation: all, those of a domain, or those of a device; `mask`: bits that do not matter."""

        def meant(cached: int) -> bool:
            return source is None or not (cached ^ source) & 0xFFFF & ~mask

        def chosen(cached: int, entry: Entry) -> bool:
            # Scalable mode's context entries have no domain-id.
            return meant(cached) and (self.tables.scalable or domain_id in (None, entry.domain_id))

        def forget() -> None:
            with self._lock:
                if not self.tables.scalable:
                    self._drop(chosen)
                    return
                # What the PASID cache has stays.
                gone = {cached for cached in self.directories if meant(cached)}
                for cached in gone:
                    del self.directories[cached]
                self._hide({key for key in self._shown if key[0] in gone})

        self._invalidate("context", forget, lambda: self._sources(chosen))

    def forget_pasids(self, domain_id: int | None = None, pasid: int | None = None) -> None:
        """PASID-cache invalidation: all, those of a domain, or one PASID of a domain."""

        def chosen(_: int, entry: Entry) -> bool:
            return entry.pasid is not None and domain_id in (None, entry.domain_id) and pasid in (None, entry.pasid)

        def forget() -> None:
            with self._lock:
                self._drop(chosen)

        self._invalidate("pasid", forget, lambda: self._sources(chosen), domain=_named(domain_id))

    def _drop(self, chosen: Callable[[int, Entry], bool]) -> None:
        gone = {key: context for key, context in self.entries.items() if chosen(key[0], context.entry)}
        for key in gone:
            del self.entries[key]
        # Requests of a PASID and those without one may share an entry.
        lost = {(source, context.entry.pasid) for (source, _), context in gone.items()}
        self._hide({key for key, context in self._shown.items() if (key[0], context.entry.pasid) in lost})

    def flush(self, domain_id: int | None = None, span: Span | None = None) -> None:
        """IOTLB invalidation: all, those of a domain, or those of IOVAs of a domain."""
        # 6.5.2.3: of what first-stage tables have a part in, all goes.
        self._flush(
            lambda entry: domain_id in (None, entry.domain_id),
            lambda entry: None if entry.first_levels else span,
            domain_id,
            span,
        )

    def flush_pasid(self, domain_id: int, pasid: int, span: Span | None = None) -> None:
        """PASID-based IOTLB invalidation: all of a domain's PASID, or those of IOVAs."""
        # 6.5.2.4: the other way round.
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
            self._look_at_tlbs()

        def flush() -> None:
            for domain, part in domains.items():
                if isinstance(domain, TableDomain):
                    domain.flush(part, own=False)

        self._invalidate(
            "iotlb",
            flush,
            lambda: self._sources(lambda _, entry: chosen(entry)),
            domain=_named(domain_id),
            **_where(span),
        )

    # ---- devices' own TLBs -----------------------------------------------------------------

    def _has_tlb(self, endpoint: Endpoint) -> bool:
        """Whether a device uses a TLB of its own; where that has changed it is empty afterwards."""
        on = self._ats(endpoint)
        if on != (endpoint.name in self._with_tlb):
            (self._with_tlb.add if on else self._with_tlb.discard)(endpoint.name)
            endpoint.set_ats(on)
            self._flush_device(endpoint, _ALL)
        return on

    def _look_at_tlbs(self) -> None:
        if self.ecap.DT:
            for endpoint in self._covered():
                self._has_tlb(endpoint)

    def _flush_device(self, endpoint: Endpoint, span: Span) -> None:
        endpoint.invalidate(span)
        for pasid in [] if endpoint.group is None else list(endpoint.group.pasids):
            endpoint.invalidate(span, pasid)

    def flush_device(self, source: int, span: Span, pasid: int | None = None, everything: bool = False) -> None:
        """Device-TLB invalidation: IOVAs of requests with a PASID, or without; `everything`: with any, or none."""

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
            "device-tlb", flush, lambda: {s for s, _ in self.entries if s & 0xFFFF == source}, **_where(span)
        )

    # ---- faults and page requests ----------------------------------------------------------

    def may_ask(self, source: int, pasid: int | None) -> bool:
        """Whether a device's context entry lets it ask for pages; if not, that is the next fault to be reported."""
        with self._lock:
            directory = self.directories.get(source)
            if directory is None or not directory.page_requests:
                quiet = directory is not None and directory.quiet
                code = FaultCode.NO_PAGE_REQUESTS if self.tables.scalable else FaultCode.PAGE_REQUEST_IN_LEGACY
                _note(self._unasked, (source, pasid), Refused(code, quiet))
                return False
            return True

    def code_of(self, record: FaultRecord) -> FaultCode | None:
        """How the unit reports a failed access; None: not at all."""
        key = record.requester_id, record.pasid
        with self._lock:
            if not self.enabled:
                return None
            why = self._why.get(key) if record.reason in _UNREAD else self._unasked.pop(key, None)
            context = self._shown.get(key)
        if why is not None:
            return None if why.quiet else why.code
        if context is None or context.entry.quiet or context.entry.stage is Stage.PASS_THROUGH:
            return None
        return walk_code(record, context.entry.stage, self.tables.scalable)


def _named(domain_id: int | None) -> str | None:
    return None if domain_id is None else f"domain-id {domain_id}"


def _where(span: Span | None) -> dict[str, int]:
    return {"address": 0, "size": 1 << 64} if span is None else {"address": span.start, "size": span.size}


def _note(refusals: dict[Key, Refused], key: Key, refused: Refused) -> None:
    if len(refusals) >= _MOST:
        refusals.clear()
    refusals[key] = refused


def _without(iommu: Iommu, spans: Iterable[Span]) -> Domain:
    """Identity, less `spans`."""
    holes = sorted(spans)
    if not holes:
        return iommu.identity
    domain = PagingDomain(DomainType.UNMANAGED, iommu, AllocFlags.NONE, "identity but protected memory")
    at = (domain.aperture.start + PAGE - 1) // PAGE * PAGE
    end = (min(domain.aperture.last, (1 << domain.output_bits) - 1) + 1) // PAGE * PAGE
    for hole in [*holes, Span(end, end)]:
        if at < min(hole.start, end):
            domain.map(at, at, min(hole.start, end) - at)
        at = max(at, hole.last + 1)
    return domain
