"""IOMMU groups as SVG: the tree of buses from left to right, with a colour for each group."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from html import escape

from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.system import System
from vmodel.pci.topology import Bus, Function

_ROW, _COLUMN, _WIDTH, _HEIGHT = 64, 275, 235, 46
_MARGIN, _LEGEND = 24, 22
#: Hues differ by the golden angle, in degrees: neighbours differ clearly for any number of groups.
_GOLDEN = 137.508


@dataclass
class _Box:
    """A box of the drawing: a function or a root bus, and its place."""

    column: int
    row: float
    lines: tuple[str, str]
    fill: str
    title: str
    parent: _Box | None


def draw(system: System) -> str:
    """An SVG document of a system's buses, functions and IOMMU groups."""
    there = {e.source: e for e in system.endpoints if isinstance(e.source, Function)}
    boxes: list[_Box] = []
    row = 0.0
    for root in system.topology.roots:
        name = f"segment {root.segment:04x}"
        top = _Box(0, row, (name, f"bus {root.number:02x}"), "#ffffff", "host bridge", None)
        boxes.append(top)
        row = _lay(root, top, row, there, boxes)
    width = _MARGIN * 2 + _COLUMN * (max((box.column for box in boxes), default=0) + 1)
    legend = [_legend(group.number, group.iommu.name, [e.name for e in group.endpoints]) for group in system.groups]
    height = _MARGIN * 2 + _ROW * max(row, 1) + _LEGEND * len(legend)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" '
        f'viewBox="0 0 {width} {height:g}" font-family="sans-serif" font-size="12">',
        "<title>IOMMU groups</title>",
        f'<rect width="{width}" height="{height:g}" fill="#fff"/>',
    ]
    parts += [_line(box) for box in boxes if box.parent is not None]
    parts += [_rect(box) for box in boxes]
    for n, (colour, text) in enumerate(legend):
        y = _MARGIN + _ROW * row + _LEGEND * n
        parts.append(f'<rect x="{_MARGIN}" y="{y:g}" width="14" height="14" fill="{colour}" stroke="#444"/>')
        parts.append(f'<text x="{_MARGIN + 22}" y="{y + 12:g}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lay(bus: Bus, parent: _Box, row: float, there: dict[Function, Endpoint], boxes: list[_Box]) -> float:
    """Places the functions of a bus, from `row` downwards; returns the first free row after them."""
    for function in bus.functions:
        box = _function(function, there.get(function), parent, row)
        boxes.append(box)
        if function.secondary is not None and function.secondary.functions:
            row = _lay(function.secondary, box, row, there, boxes)
        else:
            row += 1
    return max(row, parent.row + 1)


def _function(function: Function, endpoint: Endpoint | None, parent: _Box, row: float) -> _Box:
    group = None if endpoint is None else endpoint.group
    what = function.kind.value if function.kind.is_bridge else "no group" if group is None else f"group {group.number}"
    if function.kind.is_bridge and group is not None:
        what += f", group {group.number}"
    why = "" if endpoint is None else endpoint.why
    fill = "#eeeeee" if group is None else _colour(group.number)
    return _Box(parent.column + 1, row, (f"{function.bdf} {function.name}", what), fill, why, parent)


def _colour(number: int) -> str:
    # As #rrggbb, since some viewers do not support hsl().
    rgb = colorsys.hls_to_rgb(number * _GOLDEN % 360 / 360, 0.85, 0.7)
    return "#" + "".join(f"{round(part * 255):02x}" for part in rgb)


def _legend(number: int, iommu: str, members: list[str]) -> tuple[str, str]:
    return _colour(number), f"group {number} ({iommu}): {', '.join(members)}"


def _at(box: _Box) -> tuple[float, float]:
    return _MARGIN + box.column * _COLUMN, _MARGIN + box.row * _ROW


def _line(box: _Box) -> str:
    assert box.parent is not None
    (x, y), (left, top) = _at(box), _at(box.parent)
    middle = left + _WIDTH + (_COLUMN - _WIDTH) / 2
    y, top = y + _HEIGHT / 2, top + _HEIGHT / 2
    return f'<path d="M{left + _WIDTH:g} {top:g}H{middle:g}V{y:g}H{x:g}" fill="none" stroke="#888"/>'


def _rect(box: _Box) -> str:
    x, y = _at(box)
    texts = "".join(
        f'<text x="{x + 8:g}" y="{y + 19 + 16 * n:g}"{style}>{escape(text[:34])}</text>'
        for n, (text, style) in enumerate(zip(box.lines, (' font-weight="bold"', ""), strict=True))
    )
    rect = f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{box.fill}" stroke="#444"/>'
    return f"<g><title>{escape(box.title)}</title>{rect}{texts}</g>"
