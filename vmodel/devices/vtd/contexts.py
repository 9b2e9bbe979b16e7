"""Root and context tables (9.1, 9.3), and the cache of what was read from them.

A device without an entry in the cache is attached to `unread`, which lets nothing through: so its first access fails,
`resolve` reads its entry and attaches what that says, and the access is tried again.  After that memory is not looked
at until the guest invalidates the entry, as with CAP.CM clear: what is not present is never cached.
"""

from __future__ import annotations

import contextlib
import enum
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vmodel.devices.vtd.regs import Cap, Ecap
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, IommuError, Reason
from vmodel.iommu.core import Endpoint, Iommu, walked_domain_alloc
from vmodel.iommu.domain import AllocFlags, BlockedDomain, Domain, DomainType, PagingDomain, TableDomain
from vmodel.iommu.fault import FaultRecord
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat
from vmodel.memory import GuestMemory
from vmodel.points import Point, Points
from vmodel.span import PAGE, Span


class Code(enum.IntEnum):
    """Fault reasons of legacy mode (7.1.3; names are ours)."""

    ROOT_NOT_PRESENT = 0x1
    CONTEXT_NOT_PRESENT = 0x2
    CONTEXT_INVALID = 0x3
    ADDRESS_TOO_WIDE = 0x4
    NO_WRITE = 0x5
    NO_READ = 0x6
    TABLE_ACCESS = 0x7
    ROOT_ACCESS = 0x8
    CONTEXT_ACCESS = 0x9
    ROOT_RESERVED = 0xA
    CONTEXT_RESERVED = 0xB
    TABLE_RESERVED = 0xC


#: What a walk's failure is here.  What happens after translation is not the unit's to report.
_CODES = {
    Reason.INPUT_WIDTH: Code.ADDRESS_TOO_WIDE,
    Reason.OUTPUT_WIDTH: Code.TABLE_RESERVED,
    Reason.RESERVED_BITS: Code.TABLE_RESERVED,
    Reason.TABLE_ACCESS: Code.TABLE_ACCESS,
    Reason.TABLE_CHANGING: Code.TABLE_ACCESS,
}
_PRESENT, _FPD = 1, 2
_SECOND_STAGE, _PASS_THROUGH = 0, 2
_ADDRESS = (1 << 64) - (1 << 12)
_ENTRY = struct.Struct("<QQ")


class _Refused(Exception):
    """A root or context entry does not let a request through.  `quiet`: FPD says not to report it."""

    def __init__(self, code: Code, quiet: bool = False) -> None:
        super().__init__(code.name)
        self.code = code
        self.quiet = quiet


@dataclass(frozen=True)
class Context:
    """A cached context entry, and the domain that it leads to; `quiet`: FPD."""

    domain_id: int
    domain: Domain
    key: tuple[int, int, int] | None
    quiet: bool


class Contexts:
    """Which domain each device behind a unit goes through.  Any thread may call it."""

    def __init__(
        self,
        iommu: Iommu,
        covered: Callable[[], list[Endpoint]],
        memory: GuestMemory,
        cap: int,
        ecap: int,
        points: Points,
    ) -> None:
        """`covered`: the devices behind the unit at any time; `memory`: where tables are read."""
        self._points = points
        self.iommu = iommu
        self._covered = covered
        self.cap, self.ecap = Cap(cap), Ecap(ecap)
        #: The root table, as it was when software last set it.
        self.root = 0
        #: GSTS.TES.
        self.enabled = False
        #: What is not translated goes through it: identity, less protected memory.
        self.plain: Domain = iommu.identity
        self.unread = BlockedDomain()
        self.unread.name = "no context entry read"
        self.cache: dict[int, Context] = {}
        self._why: dict[int, _Refused] = {}
        self._memory = memory
        #: How the unit itself reaches memory, whatever its function's Command says: SeaBIOS leaves bus mastering off,
        #: and the guest does not see the function.
        self.dma = Dma(memory)
        self.dma.bus_master = True
        self._output_bits = min(iommu.capabilities.output_bits, 52)
        self._lock = threading.RLock()

    # ---- on and off ------------------------------------------------------------------------

    def enable(self, on: bool) -> None:
        """GCMD.TE.  Either way the cache is empty afterwards."""
        with self._lock:
            self.enabled = on
            self.cache.clear()
            for group in {endpoint.group for endpoint in self._covered()}:
                if group is not None:
                    group.set_default(self.unread if on else self.plain)

    def protect(self, spans: Iterable[Span]) -> None:
        """Protected memory (11.4.7): what is not translated does not get there, without a fault being recorded."""
        with self._lock:
            self.plain = _without(self.iommu, spans)
            if not self.enabled:
                self.enable(False)
            else:
                self._forget(lambda source, context: context.key is None)

    # ---- reading ---------------------------------------------------------------------------

    def resolve(self, endpoint: Endpoint, fault: DmaFault) -> bool:
        """An access has failed: whether that was for want of a context entry, and there is one now."""
        source = endpoint.requester_id
        with self._lock:
            if source is None or fault.pasid is not None:
                return False
            if not self.enabled:  # perhaps since a moment ago
                return fault.reason is Reason.BLOCKED
            if (cached := self.cache.get(source)) is not None:
                # Another device of this source-id may have been first.
                return fault.reason is Reason.BLOCKED and cached.domain is not self.unread
            try:
                context = self._read(endpoint, source)
                self.cache[source] = context
                self._attach(endpoint, context.domain)
            except _Refused as refused:
                self._why[source] = refused
                return False
            except IommuError:
                self.cache.pop(source, None)
                self._why[source] = _Refused(Code.CONTEXT_INVALID)
                return False
            return True

    def _attach(self, endpoint: Endpoint, domain: Domain) -> None:
        """A group has one domain to be looked at; its other source-ids have what their own entries say."""
        assert endpoint.group is not None
        endpoint.group.set_default(domain)
        for other in endpoint.group.endpoints:
            if other.requester_id != endpoint.requester_id:
                own = self.cache.get(other.requester_id or 0)
                other.show(self.unread if own is None else own.domain)

    def _entry(self, table: int, index: int, code: Code) -> tuple[int, int]:
        try:
            low, high = _ENTRY.unpack(self.dma.read(table + 16 * index, 16))
        except DmaFault:
            raise _Refused(code) from None
        return low, high

    def _read(self, endpoint: Endpoint, source: int) -> Context:
        low, high = self._entry(self.root, source >> 8 & 0xFF, Code.ROOT_ACCESS)
        if not low & _PRESENT:
            raise _Refused(Code.ROOT_NOT_PRESENT)
        if low & 0xFFE or low >> self._output_bits or high:
            raise _Refused(Code.ROOT_RESERVED)
        low, high = self._entry(low & _ADDRESS, source & 0xFF, Code.CONTEXT_ACCESS)
        quiet = bool(low & _FPD)
        if not low & _PRESENT:
            raise _Refused(Code.CONTEXT_NOT_PRESENT, quiet)
        if low & 0xFF0 or low >> self._output_bits or high & ~0xFF_FF7F:
            raise _Refused(Code.CONTEXT_RESERVED, quiet)
        kind, width, domain_id = low >> 2 & 3, high & 7, high >> 8 & 0xFFFF
        if not self.cap.SAGAW >> width & 1 or kind not in (_SECOND_STAGE, _PASS_THROUGH):
            raise _Refused(Code.CONTEXT_INVALID, quiet)
        if kind == _PASS_THROUGH:
            return Context(domain_id, self.plain, None, quiet)
        key = domain_id, low & _ADDRESS, width
        domain = next((c.domain for c in self.cache.values() if c.key == key), None)
        return Context(domain_id, domain or self._walked(endpoint, *key), key, quiet)

    def _walked(self, endpoint: Endpoint, domain_id: int, root: int, width: int) -> TableDomain:
        flags = TableFlag(0)
        for flag, there in (
            (TableFlag.PAGES_2M, self.cap.SLLPS & 1),
            (TableFlag.PAGES_1G, self.cap.SLLPS & 2),
            (TableFlag.SNOOP, self.ecap.SC),
        ):
            flags |= flag if there else 0
        levels = width + 2
        bits = min(12 + 9 * levels, self.cap.MGAW + 1)
        table = Table(TableFormat.VTD_SECOND, levels, root, bits, self._output_bits, flags)
        domain = walked_domain_alloc(endpoint, self._memory, table)
        domain.name = f"domain-id {domain_id}"
        return domain

    # ---- invalidation ----------------------------------------------------------------------

    def forget(self, domain_id: int | None = None, source: int | None = None, mask: int = 0) -> None:
        """Context-cache invalidation: all, those of a domain, or those of a device; `mask`: bits that do not matter."""

        def chosen(cached: int, context: Context) -> bool:
            if source is not None and (cached ^ source) & 0xFFFF & ~mask:
                return False
            return domain_id is None or context.domain_id == domain_id

        def forget(_: object) -> None:
            with self._lock:
                self._forget(chosen)

        if self._points.wants(Point.INVALIDATE):
            others = self._concerned(chosen)
            self._points.at(Point.INVALIDATE, forget, kind="context", others=others)
        else:
            forget(None)

    def _concerned(self, chosen: Callable[[int, Context], bool]) -> tuple[str, ...]:
        """The devices whose cached entries are chosen."""
        with self._lock:
            sources = {source for source, context in self.cache.items() if chosen(source, context)}
        return tuple(endpoint.name for endpoint in self._covered() if endpoint.requester_id in sources)

    def _forget(self, chosen: Callable[[int, Context], bool]) -> None:
        gone = {source for source, context in self.cache.items() if chosen(source, context)}
        for source in gone:
            del self.cache[source]
        for endpoint in self._covered():
            if endpoint.requester_id in gone and endpoint.group is not None:
                with contextlib.suppress(IommuError):  # blocked fits everywhere
                    self._attach(endpoint, self.unread)

    def flush(self, domain_id: int | None = None, span: Span | None = None) -> None:
        """IOTLB invalidation: all, those of a domain, or those of IOVAs of a domain."""
        with self._lock:
            domains = {c.domain for c in self.cache.values() if domain_id is None or c.domain_id == domain_id}

        def flush(_: object) -> None:
            for domain in domains:
                if isinstance(domain, TableDomain):
                    domain.flush(span)

        if self._points.wants(Point.INVALIDATE):
            about = {
                "kind": "iotlb",
                "others": self._concerned(lambda _, c: domain_id is None or c.domain_id == domain_id),
                "domain": None if domain_id is None else f"domain-id {domain_id}",
                "address": 0 if span is None else span.start,
                "size": 1 << 64 if span is None else span.size,
            }
            self._points.at(Point.INVALIDATE, flush, **about)
        else:
            flush(None)

    # ---- faults ----------------------------------------------------------------------------

    def code_of(self, record: FaultRecord) -> Code | None:
        """How the unit reports a failed access; None: not at all."""
        if not self.enabled or record.pasid is not None:
            return None
        context = self.cache.get(record.requester_id)
        if record.reason is Reason.BLOCKED:
            why = self._why.get(record.requester_id)
            return None if why is None or why.quiet else why.code
        if context is None or context.quiet or context.key is None:
            return None
        if record.reason in (Reason.NOT_MAPPED, Reason.PERMISSION):
            # After translation there are permissions, too: those of memory itself have no level.
            if not record.level:
                return None
            return Code.NO_WRITE if Access.WRITE in record.access else Code.NO_READ
        return _CODES.get(record.reason)


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
