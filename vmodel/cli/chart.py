"""Line charts as SVG: the x axis has powers of two, the y axis powers of ten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 460, 300, 70, 40, 46, 16
_LEGEND = 22
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


@dataclass(frozen=True)
class Series:
    """A line of a chart; `points` are (x, y), both above 0."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """One chart, with the labels of its axes; both scales are logarithmic."""

    title: str
    x: str
    y: str
    lines: Sequence[Series]


def draw(title: str, charts: Sequence[Chart]) -> str:
    """An SVG document with the charts side by side; lines of the same name have the same colour."""
    names = list(dict.fromkeys(line.name for chart in charts for line in chart.lines))
    colours = {name: _COLOURS[n % len(_COLOURS)] for n, name in enumerate(names)}
    width, height = _WIDTH * len(charts), _HEIGHT + _LEGEND * len(names) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for n, chart in enumerate(charts):
        parts.append(f'<g transform="translate({n * _WIDTH} 0)">')
        parts += _chart(chart, colours)
        parts.append("</g>")
    for n, name in enumerate(names):
        y = _HEIGHT + _LEGEND * n
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="14" height="14" fill="{colours[name]}"/>')
        parts.append(f'<text x="{_LEFT + 22}" y="{y + 12}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _chart(chart: Chart, colours: dict[str, str]) -> list[str]:
    points = [point for line in chart.lines for point in line.points]
    xs, ys = [math.log2(x) for x, _ in points], [math.log10(y) for _, y in points]
    # Both scales begin and end at a whole power.
    left, right = math.floor(min(xs)), max(math.ceil(max(xs)), math.floor(min(xs)) + 1)
    low, high = math.floor(min(ys)), max(math.ceil(max(ys)), math.floor(min(ys)) + 1)
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> str:
        across = _LEFT + wide * (math.log2(x) - left) / (right - left)
        down = _TOP + tall * (high - math.log10(y)) / (high - low)
        return f"{across:.1f} {down:.1f}"

    parts = [f'<text x="{_LEFT}" y="22" font-weight="bold">{escape(chart.title)}</text>']
    for power in range(left, right + 1):
        x = _LEFT + wide * (power - left) / (right - left)
        parts.append(f'<path d="M{x:.1f} {_TOP}v{tall}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{_TOP + tall + 16}" text-anchor="middle">{2**power:g}</text>')
    for power in range(low, high + 1):
        y = _TOP + tall * (high - power) / (high - low)
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{wide}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10**power:,g}</text>')
    middle = _LEFT + wide / 2
    parts.append(f'<text x="{middle:g}" y="{_TOP + tall + 34}" text-anchor="middle">{escape(chart.x)}</text>')
    across = _TOP + tall / 2
    parts.append(
        f'<text transform="translate(14 {across:g}) rotate(-90)" text-anchor="middle">{escape(chart.y)}</text>'
    )
    for line in chart.lines:
        colour = colours[line.name]
        path = "L".join(at(x, y) for x, y in line.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
            for x, y in (at(*point).split() for point in line.points)
        ]
    return parts
