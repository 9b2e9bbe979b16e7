"""`DmaReport`: what was recorded of each endpoint's DMA, as plain data; docs/dma-sanitizer.md has the keys."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from vmodel.dma_report.finding import DmaFinding, Severity

#: It changes when a key changes its meaning.
VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class DmaMapping(_Frozen):
    """One mapping.  Times are in seconds since the watch began."""

    iova: int
    size: int
    gpa: int
    #: "r", "w" or "rw", from the device's side.
    prot: str
    pasid: int | None
    #: The endpoint that used it first, or through which it is known.
    endpoint: str
    mapped: float
    #: None: it is still mapped.
    ended: float | None
    first_use: float | None
    last_use: float | None
    #: Bytes that the device moved, and the number of bytes that it touched.
    read: int
    written: int
    touched: int
    #: Kernel pointers in it when it was mapped, and when it ended in bytes that were never touched.
    pointers: int
    exposed_pointers: int
    #: "learnt", "detached", "twin", "inexact", "long", "too large".
    flags: tuple[str, ...]


class SizeClass(_Frozen):
    """Mappings that have ended, of one size: more than half of `pages`, at most that."""

    pages: int
    count: int
    #: Those that were never used, and of the others the bytes, and how many of these were touched.
    unused: int
    bytes: int
    touched: int


class DmaTotals(_Frozen):
    """Exact counts of an endpoint's mappings."""

    mapped: int
    mapped_bytes: int
    ended: int
    live: int
    live_bytes: int
    most_live: int
    #: Known only since their first use, as the guest does not invalidate when it maps.
    learnt: int
    #: Ended when their domain was detached.
    detached: int
    #: Beyond the limit of live mappings; and changes of tables that were too large to be followed.
    unrecorded: int
    unwalked: int
    #: Invalidations of the IOTLB, or unmaps.
    flushes: int
    #: Mapped within 10 ms where another mapping had been.
    reused: int
    #: How often the driver released the device: bus mastering went off.
    released: int
    #: Refused for reasons that are in no finding, such as a fault that was injected.
    other_incidents: int
    #: Those that live long are no buffers of a transfer: rings, most likely, and not judged as such.
    long_lived: int
    #: Ended mappings by what they allowed, and what they were used for: "rw" to "r", for example; "-": not at all.
    uses: dict[str, dict[str, int]]


class EndpointReport(_Frozen):
    """The DMA of one group of devices that share their mappings; mostly there is one."""

    endpoints: tuple[str, ...]
    iommu: str
    #: How its mappings are known: "reported", when they are made; "learnt", when they are used first; "not translated".
    known: Literal["reported", "learnt", "not translated"]
    findings: tuple[DmaFinding, ...]
    totals: DmaTotals
    sizes: tuple[SizeClass, ...]
    #: Live ones, and the last that have ended, by the time of their map.
    mappings: tuple[DmaMapping, ...]
    #: When bus mastering of one of them went on or off.
    masters: tuple[tuple[float, str, bool], ...]

    @property
    def name(self) -> str:
        """The endpoints' names."""
        return ", ".join(self.endpoints)


class DmaReport(_Frozen):
    """The DMA of a machine's endpoints that an IOMMU covers."""

    kind: Literal["dma-report"] = "dma-report"
    version: int = VERSION
    machine: str
    #: How long it was watched, in seconds.
    seconds: float
    endpoints: tuple[EndpointReport, ...]

    @property
    def findings(self) -> list[tuple[EndpointReport, DmaFinding]]:
        """All findings, the gravest first; without notes."""
        order = list(Severity)
        found = [(e, f) for e in self.endpoints for f in e.findings if f.severity is not Severity.NOTE]
        return sorted(found, key=lambda pair: order.index(pair[1].severity))

    @property
    def signs(self) -> list[str]:
        """The kinds of the findings, each once: "dma-leak", for example."""
        return list(dict.fromkeys(finding.sign for _, finding in self.findings))
