"""A coverage as one self-contained HTML page: bars by function, faults, growth, branches, source, instructions."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

import jinja2
from markupsafe import Markup, escape

from vmodel.coverage.comparison import Comparison, Tally
from vmodel.coverage.listing import place, shown
from vmodel.coverage.sources import Sources
from vmodel.coverage.table import percent

_WIDTH, _HEIGHT, _LEFT, _FOOT = 900, 220, 60, 24
#: The most branches in the page; JSON has all.
_BRANCHES = 1000


def html(comparison: Comparison, sources: Sources | None = None) -> str:
    """The page.  `sources`: where source files are found; by default only where debug information says."""
    text = files("vmodel.coverage").joinpath("page.html.jinja").read_text(encoding="utf-8")
    # Names are from the files of modules: autoescape.  StrictUndefined: a misspelt name is an error.
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters |= {"bar": bar, "percent": percent, "base": lambda path: PurePosixPath(path).name}
    branches = [(branch, _place(comparison, branch.module, branch.to)) for branch in comparison.untaken]
    return engine.from_string(text).render(
        comparison=comparison,
        every=_sum([module.instructions for module in comparison.modules]),
        lines=_sum([module.lines for module in comparison.modules if module.lines]),
        with_lines=any(module.lines for module in comparison.modules),
        growth=_growth(comparison.growth),
        branches=branches[:_BRANCHES],
        branches_left=len(branches) - len(branches[:_BRANCHES]),
        inside=place,
        data=_packed(_data(comparison, sources or Sources())),
    )


def _sum(tallies: Sequence[Tally]) -> Tally:
    return Tally(sum(t.total for t in tallies), sum(t.clean for t in tallies), sum(t.faults for t in tallies))


def _place(comparison: Comparison, module: str, address: int) -> tuple[str, int] | None:
    return comparison.places(module).get(address)


def bar(tally: Tally) -> Markup:
    """A tally as a bar of three parts: without faults, only under faults, never."""
    if not tally.total:
        return Markup("")
    parts = "".join(
        f'<i class="{name}" style="width:{100 * count / tally.total:.2f}%"></i>'
        for name, count in (("clean", tally.clean), ("faults", tally.faults))
        if count
    )
    said = f"{tally.clean} without faults, {tally.faults} only under faults, {tally.never} never"
    return Markup('<span class="bar" title="{}">{}</span>').format(said, Markup(parts))


# ---- growth ------------------------------------------------------------------------------------------


def _growth(points: Sequence[tuple[str, int]]) -> Markup:
    """Instructions reached over runs, as SVG; empty for less than two runs."""
    if len(points) < 2:
        return Markup("")
    most = _round(max(reached for _, reached in points))
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
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(n, reached) for n, (_, reached) in enumerate(points)))
    out.append(f'<polyline points="{path}" fill="none" stroke="var(--clean)" stroke-width="2"/>')
    for n, (name, reached) in enumerate(points):
        gain = reached - (points[n - 1][1] if n else 0)
        if gain and (len(points) < 400 or gain * 200 > most):
            x, y = at(n, reached)
            said = escape(f"run {n + 1}, {name}: {gain:,} new, {reached:,} in all")
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--clean)"><title>{said}</title></circle>')
    out.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">run 1</text>')
    out.append(f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 6}" text-anchor="end">run {len(points)}</text>')
    return Markup("".join([*out, "</svg>"]))


def _round(value: int) -> int:
    """A number that five equal steps divide into round ones, and which is not less."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if 5 * factor * step >= value:
                return 5 * factor * step
        step *= 10


# ---- code --------------------------------------------------------------------------------------------


def _data(comparison: Comparison, sources: Sources) -> dict[str, Any]:
    """What the page's script shows of code: instructions by function, and lines by file.

    {"files": [[path, source's lines or null, {line: reach}]], "functions": {"MODULE/ADDRESS": [name, file or null,
    first line, last line, [[address, text, reach, file or -1, line]]]}}
    """
    numbers = {file: n for n, file in enumerate(comparison.lines)}
    functions: dict[str, Any] = {}
    for module, program in comparison.programs.items():
        places = comparison.places(module)
        for function in program.functions:
            rows = []
            home = places.get(function.address, ("", 0))[0]
            lines = set()
            for instruction in function.instructions:
                file, line = places.get(instruction.address, ("", 0))
                if file == home:
                    lines.add(line)
                reach = int(comparison.reach(module, instruction.address))
                text = shown(program, instruction)
                rows.append([instruction.address, text, reach, numbers.get(file, -1), line])
            functions[f"{module}/{function.address:x}"] = [
                function.name,
                numbers.get(home),
                *((min(lines), max(lines)) if lines and home else (0, 0)),
                rows,
            ]
    listed = [
        [file, sources.text(file), {line: int(reach) for line, reach in lines.items()}]
        for file, lines in comparison.lines.items()
    ]
    return {"files": listed, "functions": functions}


def _packed(data: dict[str, Any]) -> str:
    """JSON in zlib's format in base64: a fifth of its size, and no text that HTML would take for tags."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("utf-8", "replace"), 9)).decode()
