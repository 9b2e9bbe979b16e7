"""The chart of growth: how many instructions runs have reached so far, as inline SVG in the colours of its page."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT, _LEFT, _FOOT = 900, 220, 60, 24
#: The most points of the line, and characters of a run's name.
_MOST, _NAME = 2000, 200


def growth(points: Sequence[tuple[str, int]]) -> Markup:
    """Instructions reached over runs, as SVG; empty for less than two runs."""
    if len(points) < 2:
        return Markup("")
    most = _round(max(reached for _, reached in points))
    drawn = _changes(points)
    step = (_WIDTH - _LEFT - 10) / (len(points) - 1)
    foot = _HEIGHT - _FOOT

    def at(n: int, reached: int) -> tuple[float, float]:
        return _LEFT + n * step, foot - (foot - 16) * reached / most

    said = f"{points[-1][1]} instructions after {len(points)} runs"
    out = [f'<svg class="growth" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said}">']
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        y = at(0, round(most * share))[1]
        out.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 10}" y2="{y:.1f}" stroke="var(--grid)"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{most * share:,.0f}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(n, points[n][1]) for n in drawn))
    out.append(f'<polyline points="{path}" fill="none" stroke="var(--clean)" stroke-width="2"/>')
    for n in drawn:
        name, reached = points[n]
        gain = reached - (points[n - 1][1] if n else 0)
        if gain and (len(points) < 400 or gain * 200 > most):
            x, y = at(n, reached)
            run = name if name.startswith(f"{_run(points, n)}:") else f"run {n + 1}, {name}"
            said = escape(f"{run[:_NAME]}: {gain:,} new, {reached:,} in all")
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--clean)"><title>{said}</title></circle>')
    out.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{escape(_run(points, 0))}</text>')
    out.append(f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 6}" text-anchor="end">{escape(_run(points, -1))}</text>')
    return Markup("".join([*out, "</svg>"]))


def _run(points: Sequence[tuple[str, int]], at: int) -> str:
    """A run's number: that of its name, as in "run 17: torn", or its place."""
    number = re.match(r"run \d{1,20}(?=:)", points[at][0])
    return number[0] if number else f"run {at % len(points) + 1}"


def _changes(points: Sequence[tuple[str, int]]) -> list[int]:
    """The numbers of the points that a line needs: where it bends; of very many, some at even distances."""
    bends = [
        n
        for n, (_, reached) in enumerate(points)
        if n in (0, len(points) - 1) or reached != points[n - 1][1] or reached != points[n + 1][1]
    ]
    if len(bends) <= _MOST:
        return bends
    return [bends[round(n * (len(bends) - 1) / (_MOST - 1))] for n in range(_MOST)]


def _round(value: int) -> int:
    """A number that five equal steps divide into round ones, and which is not less."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if 5 * factor * step >= value:
                return 5 * factor * step
        step *= 10
