"""From a ledger to findings: what of the mappings and accesses of a group is wrong."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vmodel._shim import DmaIncident, IncidentKind, Ledger, LedgerTotals, MappingUse, UseFlag
from vmodel.dma_report.finding import EXAMPLES, SIGNS, DmaFinding, SpanShown
from vmodel.dma_report.report import DmaMapping, DmaTotals, EndpointReport, SizeClass
from vmodel.iommu.capabilities import RegionType
from vmodel.iommu.domain import DomainType, TableDomain
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.group import Group
from vmodel.span import Span

_RW = 3
#: By the bits of a protection, or of what was used.
_WORDS = ("-", "r", "w", "rw")
_FLAGS = {
    UseFlag.LEARNT: "learnt",
    UseFlag.DETACHED: "detached",
    UseFlag.TWIN: "twin",
    UseFlag.INEXACT: "inexact",
    UseFlag.LONG: "long",
    UseFlag.TOO_LARGE: "too large",
}
#: Most changes of bus mastering that are kept for a group.
_CHANGES = 256


@dataclass(eq=False)
class Followed:
    """A group whose endpoints are watched; `masters` are those with bus mastering on."""

    group: Group
    ledger: Ledger
    endpoints: list[Endpoint] = field(default_factory=list)
    masters: set[Endpoint] = field(default_factory=set)
    #: (time, endpoint, on)
    changes: collections.deque[tuple[int, str, bool]] = field(
        default_factory=lambda: collections.deque(maxlen=_CHANGES)
    )


def size(count: int) -> str:
    """Bytes for people: "12 KiB", "1.5 MiB".

    >>> size(12288), size(100)
    ('12 KiB', '100 bytes')
    """
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f}".removesuffix(".0") + f" {name}"
    return "1 byte" if count == 1 else f"{count} bytes"


def _n(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


class _Analysis:
    """The findings of one group."""

    def __init__(self, followed: Followed, masters: set[Endpoint], began: int) -> None:
        self._began = began
        self._followed = followed
        self._masters = masters
        self.name = ", ".join(endpoint.name for endpoint in followed.endpoints)
        ledger = followed.ledger
        self.totals: LedgerTotals = ledger.totals()
        self.live = [use for use in ledger.live() if not self._is_firmware(use)]
        self.ended = [use for _, use in ledger.ended()]
        self.incidents = [item for _, item in ledger.incidents()]
        #: Refused accesses that met a live mapping which allows them: not the driver's doing.
        self.unexplained = 0
        self.findings: list[DmaFinding] = []

    def _is_firmware(self, use: MappingUse) -> bool:
        """Whether it is in a region that must always be mapped 1:1, so that nobody unmaps it."""
        span = Span(use.start, use.last)
        regions = (region for endpoint in self._followed.endpoints for region in endpoint.reserved)
        return any(region.type is RegionType.DIRECT and region.span.overlaps(span) for region in regions)

    def seconds(self, at: int) -> float:
        return max(0.0, (at - self._began) / 1e9)

    def run(self) -> None:
        self._accesses()
        self._still_mapped()
        totals = self.totals
        if count := totals.exposed_pointers[0]:
            shown = [use for use in self._judged() if use.exposed_pointers > 0 and use.touched > 0]
            self._add_mappings(
                "dma-exposed",
                f"{_n(count, 'pointer')} of the kernel in bytes of mapped pages that the device never touched",
                len(shown),
                lambda use: use in shown,
                lambda use: f"{_n(use.exposed_pointers, 'pointer')}, {size(use.size - use.touched)} untouched",
            )
        if count := totals.twins:
            self._add_mappings(
                "dma-mapped-twice",
                f"{_n(count, 'mapping')} of a page that was mapped already",
                count,
                lambda use: UseFlag.TWIN in use.flags and use.twin != 0,
                lambda use: f"the other one is at {use.twin:#x}",
                live=True,
            )
        self._too_wide()
        self.findings.sort(key=lambda finding: list(SIGNS).index(finding.sign))

    # ---- accesses --------------------------------------------------------------------------

    def _accesses(self) -> None:
        by_sign: dict[str, list[DmaIncident]] = {}
        for item in self.incidents:
            by_sign.setdefault(self._sign_of(item), []).append(item)
        counted = self.totals.incidents
        #: Incidents of which only the number is known: the last ones are kept.
        self.lost = sum(counted) - len(self.incidents)
        for sign in ("dma-in-flight", "dma-direction", "dma-after-unmap", "dma-unmapped"):
            if items := by_sign.get(sign):
                self._add_accesses(sign, items)
        self.unexplained = len(by_sign.get("", ()))

    def _sign_of(self, item: DmaIncident) -> str:
        """The sign of an incident; "": a live mapping allows the access, so it is not the driver's."""
        use = item.use
        live = use is not None and not use.ended
        if item.kind is IncidentKind.OFF:
            return "dma-in-flight"
        if item.kind is IncidentKind.STALE:
            return "dma-after-unmap"
        if item.kind is IncidentKind.UNMAPPED:
            return "" if live else "dma-unmapped" if use is None else "dma-after-unmap"
        if item.kind is IncidentKind.DIRECTION:
            return "dma-direction" if use is None or item.access & ~use.prot else ""
        return ""

    def _add_accesses(self, sign: str, items: Sequence[DmaIncident]) -> None:
        reads = sum(item.access == 1 for item in items)
        how = "read" if reads == len(items) else "write" if not reads else "access"
        many = "accesses" if how == "access" else f"{how}s"
        stale = sum(item.kind is IncidentKind.STALE for item in items)
        what = {
            "dma-in-flight": "with bus mastering off",
            "dma-direction": "that the mapping does not allow",
            "dma-after-unmap": "of memory that was unmapped",
            "dma-unmapped": "of addresses that were never mapped",
        }[sign]
        if stale:
            what += f", {'all' if stale == len(items) else stale} of them served by a stale IOTLB entry"
        least = "at least " if self.lost else ""
        text = f"{least}{_n(len(items), how, many)} {what}"
        self._add(sign, text, len(items), 0, [self._shown(item) for item in items])

    def _shown(self, item: DmaIncident) -> SpanShown:
        use = item.use
        text = _WORDS[item.access] + f" at {item.iova:#x}"
        if use is not None and use.ended and item.time >= use.ended:
            text += f", {_ago(item.time - use.ended)} after the unmap of {use.start:#x} ({size(use.size)})"
        elif use is not None:
            text += f", in {use.start:#x} ({size(use.size)}, {_WORDS[use.prot]})"
        if item.kind is IncidentKind.STALE:
            text += ", by a stale IOTLB entry"
        start, bytes_, gpa = (item.iova, 0, None) if use is None else (use.start, use.size, use.gpa)
        return SpanShown(iova=start, size=bytes_, gpa=gpa, at=self.seconds(item.time), text=text)

    # ---- mappings --------------------------------------------------------------------------

    def _still_mapped(self) -> None:
        kept = [use for use in self.live if use.released and UseFlag.DETACHED not in use.flags]
        if not kept:
            return
        sign = "dma-held" if self._masters else "dma-leak"
        total = sum(use.size for use in kept)
        text = f"{_n(len(kept), 'mapping')} of {size(total)} still there"
        self._add(
            sign,
            f"{text}, though the driver released the device" if sign == "dma-leak" else f"{text} since before a reset",
            len(kept),
            total,
            [self._mapping(use, f"mapped {self.seconds(use.mapped):.3f} s after the beginning") for use in kept],
        )

    def _too_wide(self) -> None:
        totals = self.totals
        one_way = [sum(totals.uses[0][_RW - 1][used]) for used in (1, 2)]
        if sum(one_way):
            parts = [
                f"{count:,} only {word}" for count, word in zip(one_way, ("read", "written"), strict=True) if count
            ]
            self._add_mappings(
                "dma-both-directions",
                f"{_n(sum(one_way), 'mapping')} for both directions: {', '.join(parts)}",
                sum(one_way),
                lambda use: use.prot == _RW and (not use.read) != (not use.written),
                lambda use: f"only {'read' if use.read else 'written'}",
            )
        if count := totals.too_large[0]:
            self._add_mappings(
                "dma-too-large",
                f"{_n(count, 'mapping')} with {size(totals.too_large_bytes[0])} in pages that the device never touched",
                count,
                lambda use: UseFlag.TOO_LARGE in use.flags,
                lambda use: f"{size(use.touched)} of {size(use.size)} touched",
            )
        if count := sum(sum(totals.uses[0][prot][0]) for prot in range(3)):
            self._add_mappings(
                "dma-unused",
                f"{_n(count, 'mapping')} that the device never touched",
                count,
                lambda use: not use.touched,
                lambda use: f"mapped for {_ago(use.ended - use.mapped)}",
            )

    def _add_mappings(
        self,
        sign: str,
        text: str,
        count: int,
        chosen: Callable[[MappingUse], bool],
        words: Callable[[MappingUse], str],
        *,
        live: bool = False,
    ) -> None:
        """A finding of mappings that have ended, or (`live`) have not; those that live long are not judged."""
        uses = [*self.ended, *self.live] if live else self._judged()
        shown = [use for use in uses if chosen(use)]
        self._add(sign, text, count, sum(use.size for use in shown), [self._mapping(use, words(use)) for use in shown])

    def _judged(self) -> list[MappingUse]:
        """The mappings that have ended, and did not live long."""
        return [use for use in self.ended if not use.flags & (UseFlag.LONG | UseFlag.DETACHED)]

    def _mapping(self, use: MappingUse, text: str) -> SpanShown:
        return SpanShown(iova=use.start, size=use.size, gpa=use.gpa, at=self.seconds(use.mapped), text=text)

    def _add(self, sign: str, text: str, count: int, total: int, examples: Iterable[SpanShown]) -> None:
        kind = SIGNS[sign]
        self.findings.append(
            DmaFinding(
                sign=sign,
                endpoint=self.name,
                severity=kind.severity,
                sure=kind.sure,
                text=text,
                count=count,
                bytes=total,
                examples=tuple(examples)[:EXAMPLES],
            )
        )

    # ---- tables ----------------------------------------------------------------------------

    def known(self) -> Literal["reported", "learnt", "not translated"]:
        totals = self.totals
        if not totals.mapped:
            plain = self._followed.group.domain.type is DomainType.IDENTITY
            return "not translated" if plain else "learnt" if self._learns() else "reported"
        return "learnt" if totals.learnt else "reported"

    def _learns(self) -> bool:
        """Whether its domain is of a guest that does not report what it maps."""
        group = self._followed.group
        return isinstance(group.domain, TableDomain) and not group.iommu.reports_maps

    def counts(self) -> DmaTotals:
        t = self.totals
        by_prot = [[sum(t.uses[0][p][u]) + sum(t.uses[1][p][u]) for u in range(4)] for p in range(3)]
        return DmaTotals(
            mapped=t.mapped,
            mapped_bytes=t.mapped_bytes,
            ended=t.ended,
            live=t.live,
            live_bytes=t.live_bytes,
            most_live=t.most_live,
            learnt=t.learnt,
            detached=t.detached,
            unrecorded=t.unrecorded,
            unwalked=t.unwalked,
            flushes=t.flushes,
            reused=t.reused,
            released=t.released,
            other_incidents=self.unexplained,
            long_lived=sum(sum(map(sum, t.uses[1][p])) for p in range(3)),
            uses={
                _WORDS[p + 1]: {_WORDS[u]: by_prot[p][u] for u in range(4) if by_prot[p][u]}
                for p in range(3)
                if any(by_prot[p])
            },
        )

    def sizes(self) -> tuple[SizeClass, ...]:
        t, both = self.totals, range(2)
        found = []
        for order in range(len(t.bytes[0][0])):
            count = sum(t.uses[i][p][u][order] for i in both for p in range(3) for u in range(4))
            if count:
                found.append(
                    SizeClass(
                        pages=1 << order,
                        count=count,
                        unused=sum(t.uses[i][p][0][order] for i in both for p in range(3)),
                        bytes=sum(t.bytes[i][p][order] for i in both for p in range(3)),
                        touched=sum(t.touched[i][p][order] for i in both for p in range(3)),
                    )
                )
        return tuple(found)

    def mappings(self) -> tuple[DmaMapping, ...]:
        names = [endpoint.name for endpoint in self._followed.endpoints]
        uses = sorted([*self.ended, *self.live], key=lambda use: use.id)

        def when(at: int) -> float | None:
            return self.seconds(at) if at else None

        return tuple(
            DmaMapping(
                iova=use.start,
                size=use.size,
                gpa=use.gpa,
                prot=_WORDS[use.prot],
                pasid=use.pasid,
                endpoint=names[use.who],
                mapped=self.seconds(use.mapped),
                ended=when(use.ended),
                first_use=when(use.first_use),
                last_use=when(use.last_use),
                read=use.read,
                written=use.written,
                touched=use.touched,
                pointers=use.pointers,
                exposed_pointers=use.exposed_pointers,
                flags=tuple(word for flag, word in _FLAGS.items() if flag in use.flags),
            )
            for use in uses
        )


def _ago(ns: int) -> str:
    """A duration for people: "3 µs", "12 ms", "1.5 s"."""
    for unit, name in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if ns >= unit:
            return f"{ns / unit:.1f} {name}" if ns < 10 * unit else f"{ns // unit} {name}"
    return f"{ns} ns"


def endpoint_report(
    followed: Followed, masters: set[Endpoint], changes: Sequence[tuple[int, str, bool]], began: int
) -> EndpointReport:
    """The report of a group; `began`: when its watch did, as CLOCK_MONOTONIC in ns."""
    analysis = _Analysis(followed, masters, began)
    analysis.run()
    return EndpointReport(
        endpoints=tuple(endpoint.name for endpoint in followed.endpoints),
        iommu=followed.group.iommu.name,
        known=analysis.known(),
        findings=tuple(analysis.findings),
        totals=analysis.counts(),
        sizes=analysis.sizes(),
        mappings=analysis.mappings(),
        masters=tuple((analysis.seconds(at), name, on) for at, name, on in changes),
    )
