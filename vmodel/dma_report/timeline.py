"""The timeline of a report's mappings: bars in lanes, as few as hold them without an overlap."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vmodel.dma_report.report import DmaMapping, EndpointReport

#: Of the drawing, in pixels: its width, a lane's height, and most lanes.
WIDTH, LANE, LANES = 1000, 7, 60
#: The least width of a bar that is still seen.
_LEAST = 0.8


@dataclass(frozen=True)
class MappingBar:
    """A mapping: its box, the part of it from first to last use, its class for colour, and what a pointer shows."""

    x: float
    y: float
    width: float
    used_x: float
    used_width: float
    look: str
    wrong: bool
    title: str


@dataclass(frozen=True)
class Timeline:
    """The drawing: bars, times at the axis, and spans in which bus mastering was off."""

    bars: Sequence[MappingBar]
    height: int
    ticks: Sequence[tuple[float, str]]
    off: Sequence[tuple[float, float]]
    #: Mappings that found no lane, and the first second that is drawn.
    left_out: int
    first: float
    last: float


def timeline(endpoint: EndpointReport, seconds: float) -> Timeline:
    """Draws the mappings of an endpoint, up to the end of its report."""
    mappings = sorted(endpoint.mappings, key=lambda one: one.mapped)
    first = mappings[0].mapped if mappings else 0.0
    last = max([first + 1e-6, *(one.ended if one.ended is not None else seconds for one in mappings)])
    scale = WIDTH / (last - first)
    wrong = {(one.iova, round(one.at, 9)) for finding in endpoint.findings for one in finding.examples}
    bars: list[MappingBar] = []
    free: list[int] = []  # lanes that were in use before, lowest first
    busy: list[tuple[float, int]] = []  # (end, lane)
    lanes = left_out = 0
    for one in mappings:
        end = last if one.ended is None else one.ended
        x, width = (one.mapped - first) * scale, max((end - one.mapped) * scale, _LEAST)
        while busy and busy[0][0] <= x:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        elif lanes < LANES:
            lane, lanes = lanes, lanes + 1
        else:
            left_out += 1
            continue
        heapq.heappush(busy, (x + width, lane))
        used = (one.first_use, one.last_use)
        start, stop = ((at - first) * scale if at is not None else x for at in used)
        bars.append(
            MappingBar(
                round(x, 1),
                lane * LANE,
                round(width, 1),
                round(start, 1),
                round(max(stop - start, _LEAST) if one.touched else 0, 1),
                one.prot,
                (one.iova, round(one.mapped, 9)) in wrong,
                _title(one),
            )
        )
    ticks = [(WIDTH * n / 5, f"{first + (last - first) * n / 5:.3f} s") for n in range(6)]
    return Timeline(bars, lanes * LANE, ticks, _off(endpoint.masters, first, last, scale), left_out, first, last)


def _title(one: DmaMapping) -> str:
    ended = "still mapped" if one.ended is None else f"unmapped {one.ended:.6f} s"
    used = f"{one.touched:,} bytes touched" if one.touched else "never touched"
    return f"{one.iova:#x}, {one.size:,} bytes, {one.prot}: mapped {one.mapped:.6f} s, {ended}, {used}"


def _off(
    masters: Iterable[tuple[float, str, bool]], first: float, last: float, scale: float
) -> list[tuple[float, float]]:
    """Where bus mastering of all endpoints was off: (x, width), from the first change that is known."""
    on: set[str] = set()
    since: float | None = None
    found: list[tuple[float, float]] = []

    def add(start: float, end: float) -> None:
        start, end = max(start, first), min(end, last)
        if end > start:
            found.append((round((start - first) * scale, 1), round((end - start) * scale, 1)))

    for at, name, is_on in masters:
        if is_on:
            on.add(name)
            if since is not None:
                add(since, at)
                since = None
        else:
            on.discard(name)
            if not on and since is None:
                since = at
    if since is not None:
        add(since, last)
    return found
