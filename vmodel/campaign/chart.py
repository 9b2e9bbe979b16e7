"""Charts of the report, as inline SVG.  Colours are the page's CSS variables, so they follow its dark or light mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from vmodel.campaign.statistics import Rate, quantile

_LEFT, _RIGHT, _WIDTH = 250, 70, 900
_ROW, _HISTOGRAM, _BINS = 20, 70, 24


def interval(rate: Rate, colour: str) -> Markup:
    """A rate as SVG, on a scale from 0 to 1: a line for its 95 % interval, a dot for its share.  Empty if `of` is 0."""
    if not rate.of:
        return Markup("")
    low, high = rate.interval
    width = 120
    return Markup(
        '<svg class="rate" viewBox="0 0 {w} 12" width="{w}" height="12" role="img" aria-label="{said}">'
        '<line x1="0" y1="6" x2="{w}" y2="6" stroke="var(--grid)"/>'
        '<line x1="{low:.1f}" y1="6" x2="{high:.1f}" y2="6" stroke="var({c})" stroke-width="5" stroke-opacity=".45"/>'
        '<circle cx="{at:.1f}" cy="6" r="4" fill="var({c})"/></svg>'
    ).format(
        w=width,
        said=str(rate),
        low=low * (width - 8) + 4,
        high=high * (width - 8) + 4,
        at=rate.share * (width - 8) + 4,
        c=colour,
    )


@dataclass(frozen=True)
class _Axis:
    """Seconds to pixels.  The scale is logarithmic if the values spread over more than a decade."""

    first: float
    last: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> _Axis:
        low, high = max(min(values), 1e-4), max(*values, 1e-3)
        if high / low > 12:
            return cls(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), True)
        step = _step(high)
        return cls(0.0, step * math.ceil(high / step), False)

    def share(self, value: float) -> float:
        if self.log:
            top = math.log10(self.last / self.first)
            return min(max(math.log10(max(value, self.first) / self.first) / top, 0.0), 1.0)
        return min(max(value / self.last, 0.0), 1.0)

    def x(self, value: float) -> float:
        return _LEFT + self.share(value) * (_WIDTH - _LEFT - _RIGHT)

    def ticks(self) -> list[float]:
        if self.log:
            count = round(math.log10(self.last / self.first))
            return [self.first * 10**n for n in range(count + 1)]
        step = _step(self.last)
        return [step * n for n in range(round(self.last / step) + 1)]


def _step(high: float) -> float:
    """A round step that divides `high` into three to eight parts."""
    power: float = 10.0 ** math.floor(math.log10(high))
    return next(power * m for m in (0.2, 0.25, 0.5, 1, 2) if high / (power * m) <= 8)


def seconds(value: float) -> str:
    """A time for people, from seconds: "2.5 ms", "12 s"."""
    if value == 0:
        return "0"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def times(rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """The distribution of times as SVG: a histogram of all values, then for each row its runs and their median.

    `rows`: (name, times in seconds).  Rows without times are left out.
    """
    rows = [row for row in rows if row[1]]
    every = [value for _, values in rows for value in values]
    if not every:
        return Markup("")
    axis = _Axis.of(every)
    height = _HISTOGRAM + 12 + _ROW * len(rows) + 24
    said = f"Time to recover of {len(every)} runs"
    out = [f'<svg class="times" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{said}">']
    foot = height - 24
    for tick in axis.ticks():
        x = axis.x(tick)
        out.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{foot}" stroke="var(--grid)"/>')
        out.append(f'<text x="{x:.1f}" y="{foot + 16}" text-anchor="middle">{seconds(tick)}</text>')
    out += _histogram(axis, every)
    for n, (name, values) in enumerate(rows):
        out += _strip(axis, _HISTOGRAM + 12 + _ROW * n + _ROW / 2, name, values)
    return Markup("".join([*out, "</svg>"]))


def _histogram(axis: _Axis, values: Sequence[float]) -> list[str]:
    bins = [0] * _BINS
    for value in values:
        bins[min(int(axis.share(value) * _BINS), _BINS - 1)] += 1
    width = (_WIDTH - _LEFT - _RIGHT) / _BINS
    out = [f'<text x="{_LEFT - 10}" y="{_HISTOGRAM - 4}" text-anchor="end">all, {len(values)} runs</text>']
    for n, count in enumerate(bins):
        tall = (_HISTOGRAM - 14) * count / max(bins)
        if count:
            x, y = _LEFT + n * width, _HISTOGRAM - tall
            out.append(
                f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{tall:.1f}"'
                f' fill="var(--recovered)"><title>{count} runs</title></rect>'
            )
            out.append(f'<text x="{x + width / 2:.1f}" y="{y - 3:.1f}" text-anchor="middle">{count}</text>')
    out.append(f'<line x1="{_LEFT}" y1="{_HISTOGRAM}" x2="{_WIDTH - _RIGHT}" y2="{_HISTOGRAM}" stroke="var(--muted)"/>')
    return out


def _strip(axis: _Axis, y: float, name: str, values: Sequence[float]) -> list[str]:
    shown = name if len(name) <= 38 else f"{name[:37]}…"
    middle = quantile(values, 0.5)
    x = axis.x(middle)
    out = [
        f'<text x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(shown)}<title>{escape(name)}</title></text>',
        f'<line x1="{axis.x(min(values)):.1f}" y1="{y}" x2="{axis.x(max(values)):.1f}" y2="{y}"'
        ' stroke="var(--muted)"/>',
    ]
    out += [
        f'<circle cx="{axis.x(value):.1f}" cy="{y}" r="4" fill="var(--recovered)" fill-opacity=".55">'
        f"<title>{seconds(value)}</title></circle>"
        for value in values
    ]
    out.append(f'<line x1="{x:.1f}" y1="{y - 7}" x2="{x:.1f}" y2="{y + 7}" stroke="var(--ink)" stroke-width="2"/>')
    out.append(f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 4:.1f}">{seconds(middle)}</text>')
    return out
