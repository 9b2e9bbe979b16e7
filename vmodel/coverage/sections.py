"""Coverage as sections of an HTML page: bars by function, faults, growth, branches, source, instructions.

A page has `VIEW` and each `asset` once, and any number of sections with different prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from vmodel.coverage.comparison import Comparison, FaultRow, FunctionRow, Tally
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.frontier import Untaken
from vmodel.coverage.growth import growth
from vmodel.coverage.line_table import Place
from vmodel.coverage.listing import place
from vmodel.coverage.page_code import packed_code
from vmodel.coverage.sources import Sources
from vmodel.coverage.table import percent

#: The most rows of tables, and names in a row; JSON has all.
_FUNCTIONS, _BRANCHES, _FILES, _FAULTS, _NAMES = 3000, 1000, 1000, 200, 60
#: Faults that reached nothing alone are shown as long as there are no more rows than this.
_FEW_FAULTS = 12
#: The most characters of a name.
_NAME = 200


def asset(name: str) -> Markup:
    """A file as text of a page: "base.css" is for any, then "sections.css"; "sections.js" is last; "sort.js" sorts."""
    return Markup(files("vmodel.coverage").joinpath(name).read_text(encoding="utf-8"))


#: Where the script shows code.
VIEW = Markup(
    '<dialog id="view" aria-labelledby="view-title">\n<header><h3 id="view-title"></h3>'
    '<button type="button" class="plain" id="as-source">source</button>'
    '<button type="button" class="plain" id="as-instructions">instructions</button>'
    '<button type="button" class="plain" id="close">close</button></header>\n'
    '<pre class="code" id="code"></pre>\n</dialog>'
)


@dataclass(frozen=True)
class Sections:
    """Parts of a page: links to the sections, the numbers on top, and the sections."""

    nav: Markup
    summary: Markup
    body: Markup


def sections(
    comparison: Comparison,
    sources: Sources | None = None,
    *,
    prefix: str = "",
    level: int = 2,
    box: str = "wide",
    rules: Mapping[str, Sequence[str]] | None = None,
    first: Mapping[str, Coverage] | None = None,
    facts: Mapping[str, int] | None = None,
) -> Sections:
    """A comparison as sections.

    `prefix`: of ids, "" or "c1-" and so on; `level`: of headings; `box`: the class of what is around long tables;
    `rules`: of each fault; `first`: of each fault, what no run before had reached; `facts`: more
    numbers for the summary, with what they count.
    """
    every = _sum([module.instructions for module in comparison.modules])
    functions = _functions(comparison)
    files_ = sorted(comparison.lines, key=lambda file: (-len(comparison.lines[file]), file))
    branches, faults = _branches(comparison.untaken), _faults(comparison.by_fault, first or {})
    shown = {row.name for row in faults}
    left = functions[_FUNCTIONS:]
    context: dict[str, Any] = {
        "comparison": comparison,
        "prefix": prefix,
        "level": level,
        "box": box,
        "rules": rules or {},
        "first": first,
        "facts": facts or {},
        "every": every,
        "lines": _sum([module.lines for module in comparison.modules if module.lines]),
        "with_lines": any(module.lines for module in comparison.modules),
        "growth": growth(comparison.growth),
        "function_rows": sorted(functions[:_FUNCTIONS], key=lambda row: (row.module, row.function.address)),
        "functions_left": len(left),
        "functions_left_ran": any(row.instructions.reached for row in left),
        "branches": [(b, _place(comparison, b.module, b.to)) for b in branches],
        "branches_left": len(comparison.untaken) - len(branches),
        "errors": sum(1 for branch in comparison.untaken if branch.signs),
        "fault_rows": faults,
        "faults_left": len(comparison.by_fault) - len(faults),
        "only_left": any(
            row.only or (first or {}).get(row.name) for row in comparison.by_fault if row.name not in shown
        ),
        "file_rows": [(file, comparison.lines[file]) for file in files_[:_FILES]],
        "files_left": len(files_[_FILES:]),
        "most_names": _NAMES,
        "inside": place,
        "data": packed_code(comparison, functions[:_FUNCTIONS], files_[:_FILES], sources or Sources()),
    }
    # Names are from the files of modules and campaigns: autoescape.  StrictUndefined: a misspelt name is an error.
    engine = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {
        "bar": bar,
        "percent": percent,
        "base": lambda path: PurePosixPath(path).name,
        "short": lambda text: text if len(text) <= _NAME else f"{text[: _NAME - 1]}…",
        "anchor": lambda name: quote(name, safe=":,"),
    }
    parts = ("sections_nav.html.jinja", "summary.html.jinja", "sections.html.jinja")
    return Sections(*(Markup(engine.get_template(name).render(context)) for name in parts))


def _functions(comparison: Comparison) -> list[FunctionRow]:
    """By module and address; if they are too many, those that ran come first."""
    rows = [row for module in comparison.modules for row in module.functions]
    return rows if len(rows) <= _FUNCTIONS else sorted(rows, key=lambda row: not row.instructions.reached)


def _branches(every: Sequence[Untaken]) -> list[Untaken]:
    """The most code behind them first; if they are too many, those that handle errors stay."""
    kept = sorted(every, key=lambda branch: not branch.signs)[:_BRANCHES] if len(every) > _BRANCHES else every
    return sorted(kept, key=lambda branch: (-branch.behind, branch.module, branch.address))


def _faults(every: Sequence[FaultRow], first: Mapping[str, Coverage]) -> list[FaultRow]:
    """Those that reached something alone or first, the most first, and the others as long as they are few."""
    ordered = sorted(every, key=lambda row: (-len(row.only), -len(first.get(row.name, ()))))
    telling = sum(1 for row in every if row.only or first.get(row.name))
    return ordered[: min(max(telling, _FEW_FAULTS), _FAULTS)]


def _sum(tallies: Sequence[Tally]) -> Tally:
    return Tally(sum(t.total for t in tallies), sum(t.clean for t in tallies), sum(t.faults for t in tallies))


def _place(comparison: Comparison, module: str, address: int) -> Place | None:
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
    return Markup('<span class="reach" title="{}">{}</span>').format(said, Markup(parts))
