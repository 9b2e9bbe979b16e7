"""A sanitizer for DMA: what a driver maps, what its device does with it, and what is wrong with that.

`DmaWatch` records, `DmaReport` is what was recorded, with the findings; docs/dma-sanitizer.md explains each of them.
"""

from vmodel.dma_report.finding import SIGNS, DmaFinding, FindingKind, Severity, SpanShown, Sure
from vmodel.dma_report.report import DmaReport, EndpointReport
from vmodel.dma_report.watch import DmaWatch

__all__ = [
    "SIGNS",
    "DmaFinding",
    "DmaReport",
    "DmaWatch",
    "EndpointReport",
    "FindingKind",
    "Severity",
    "SpanShown",
    "Sure",
]
