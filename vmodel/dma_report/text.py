"""A report as text for a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from vmodel.dma_report.analysis import size
from vmodel.dma_report.finding import DmaFinding, Severity
from vmodel.dma_report.report import DmaReport, EndpointReport

#: Most examples of a finding that are printed.
_EXAMPLES = 3
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "bold"}
_KNOWN = {
    "reported": "each known when it was made",
    "learnt": "known at first use: with params = { caching_mode = true } the guest reports maps",
}


def text(report: DmaReport) -> RenderableType:
    """For rich's console: each endpoint with its findings, the gravest first."""
    parts: list[RenderableType] = []
    for endpoint in report.endpoints:
        parts += _endpoint(endpoint, report.seconds)
    if not report.endpoints:
        parts.append(Text("DMA: no device is behind an IOMMU, so there is nothing to see"))
    return Group(*parts)


def _endpoint(endpoint: EndpointReport, seconds: float) -> list[RenderableType]:
    head = f"DMA of {endpoint.name} behind {endpoint.iommu}: "
    if endpoint.known == "not translated":
        return [Text(f"{head}not translated, so nothing is known of mappings"), *map(_finding, endpoint.findings)]
    totals = endpoint.totals
    found: list[RenderableType] = [
        Text(f"{head}{totals.mapped:,} mappings, {size(totals.mapped_bytes)}", style="bold"),
        Padding(Text(", ".join(_counts(endpoint, seconds))), (0, 0, 0, 2)),
    ]
    if not endpoint.findings:
        found.append(Padding(Text("nothing is wrong with them"), (0, 0, 0, 2)))
    return found + [_finding(finding) for finding in endpoint.findings]


def _counts(endpoint: EndpointReport, seconds: float) -> list[str]:
    totals = endpoint.totals
    counts = [_KNOWN[endpoint.known], f"{totals.mapped / max(seconds, 1e-9):,.0f} a second", f"{totals.live:,} live"]
    if totals.ended:
        counts.append(f"{totals.flushes / totals.ended:.2f} invalidations per unmap")
    if totals.reused:
        counts.append(f"{totals.reused:,} where another had ended within 10 ms")
    for count, what in (
        (totals.unrecorded, "not recorded, as there were too many at a time"),
        (totals.unwalked, "changes of tables too large to be followed"),
        (totals.other_incidents, "refused accesses that a mapping allowed"),
    ):
        if count:
            counts.append(f"{count:,} {what}")
    return counts


def _finding(finding: DmaFinding) -> RenderableType:
    kind = finding.kind
    sure = "" if finding.sure.value == "certain" else f" ({finding.sure})"
    head = Text.assemble(
        (f"{finding.severity}: ", _STYLES[finding.severity]), (finding.sign, "bold"), f"{sure}: {finding.text}"
    )
    lines = [Text(f"{one.iova:#x}, {size(one.size)}: {one.text}") for one in finding.examples[:_EXAMPLES]]
    if len(finding.examples) > _EXAMPLES or finding.count > len(finding.examples):
        lines.append(Text(f"and {finding.count - min(len(finding.examples), _EXAMPLES):,} more", style="dim"))
    lines.append(Text(kind.advice, style="italic"))
    return Padding(Group(head, *(Padding(line, (0, 0, 0, 4)) for line in lines)), (0, 0, 0, 2))
