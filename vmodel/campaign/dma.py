"""What is wrong with the DMA of the drivers in a campaign's runs: tables by workload and kernel, and drawings."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from pydantic import ValidationError

from vmodel.campaign.summary import Ended, Summary
from vmodel.dma_report.drawing import STYLE, drawing
from vmodel.dma_report.finding import SIGNS, DmaFinding, FindingKind
from vmodel.dma_report.report import DmaReport

#: The most drawings on a page, and bytes of a report.
_DRAWINGS = 4
_LARGEST = 64 << 20


@dataclass(frozen=True)
class SignCount:
    """The runs with one kernel that have a sign, of those whose DMA was recorded, and the first such finding."""

    runs: Sequence[Ended]
    of: int
    first: DmaFinding | None


@dataclass(frozen=True)
class DmaTable:
    """The findings of one workload on one machine: by sign, the gravest first, and kernel."""

    machine: str
    workload: str
    #: Runs whose DMA was recorded, by kernel.
    recorded: dict[str, int]
    rows: Sequence[tuple[str, FindingKind, dict[str, SignCount]]]


@dataclass(frozen=True)
class DmaPart:
    """What the page of a campaign gets."""

    tables: Sequence[DmaTable]
    #: A run, its endpoint's name and the timeline of that's mappings.
    drawings: Sequence[tuple[Ended, str, Markup]]
    notes: Sequence[str]
    style: Markup


def tables(summary: Summary) -> list[DmaTable]:
    """The tables, in the order of the runs; none if no run has recorded the DMA."""
    cells: dict[tuple[str, str], list[Ended]] = {}
    for run in summary.runs:
        if "dma" in run.result.artefacts:
            cells.setdefault((run.row.run.machine, run.row.run.workload), []).append(run)
    return [_table(*place, runs) for place, runs in cells.items()]


def _table(machine: str, workload: str, runs: Sequence[Ended]) -> DmaTable:
    recorded: dict[str, int] = {}
    for run in runs:
        recorded[run.kernel] = recorded.get(run.kernel, 0) + 1
    found = []
    for sign, kind in SIGNS.items():
        counts = {kernel: _count(sign, kernel, runs, of) for kernel, of in recorded.items()}
        if any(count.runs for count in counts.values()):
            found.append((sign, kind, counts))
    return DmaTable(machine, workload, recorded, found)


def _count(sign: str, kernel: str, runs: Sequence[Ended], of: int) -> SignCount:
    having = [run for run in runs if run.kernel == kernel and sign in run.result.signs]
    first = next((one for run in having for one in run.result.findings if one.sign == sign), None)
    return SignCount(having, of, first)


def dma_part(summary: Summary) -> DmaPart | None:
    """The part; None: no run has recorded the DMA."""
    made = tables(summary)
    if not made:
        return None
    drawings: list[tuple[Ended, str, Markup]] = []
    notes: list[str] = []
    for run in _shown(summary)[:_DRAWINGS]:
        try:
            report = read_dma(run)
        except ValueError as error:
            notes.append(f"run {run.row.id}: {error}")
            continue
        for endpoint in report.endpoints:
            if picture := drawing(endpoint, report.seconds):
                drawings.append((run, endpoint.name, picture))
    return DmaPart(made, drawings, notes, STYLE)


def _shown(summary: Summary) -> list[Ended]:
    """For each machine, workload and kernel the run whose findings are the gravest, the first of them."""
    order = list(SIGNS)
    best: dict[tuple[str, str, str], tuple[int, Ended]] = {}
    for run in summary.runs:
        if "dma" not in run.result.artefacts:
            continue
        rank = min((order.index(sign) for sign in run.result.signs if sign in order), default=len(order))
        place = (run.row.run.machine, run.row.run.workload, run.kernel)
        if place not in best or rank < best[place][0]:
            best[place] = (rank, run)
    return [run for _, run in best.values()]


def read_dma(run: Ended) -> DmaReport:
    """What a run has recorded.  ValueError: the file is missing or damaged."""
    file = run.row.folder / run.result.artefacts["dma"]
    try:
        with gzip.open(file) as content:
            data = content.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError(f"{file.name} is damaged: it is too large")
        return DmaReport.model_validate_json(data)
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error, ValidationError):
        raise ValueError(f"{file.name} is damaged") from None
