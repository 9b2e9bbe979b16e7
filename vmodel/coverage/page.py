"""A coverage as one self-contained HTML page: bars by function, faults, growth, branches, source, instructions."""

from __future__ import annotations

from importlib.resources import files

import jinja2

from vmodel.coverage.comparison import Comparison
from vmodel.coverage.sections import VIEW, asset, sections
from vmodel.coverage.sources import Sources


def html(comparison: Comparison, sources: Sources | None = None) -> str:
    """The page.  `sources`: where source files are found; by default only where debug information says."""
    text = files("vmodel.coverage").joinpath("page.html.jinja").read_text(encoding="utf-8")
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return engine.from_string(text).render(
        title=comparison.title,
        shown=sections(comparison, sources),
        style=asset("base.css") + asset("sections.css"),
        view=VIEW,
        sort=asset("sort.js"),
        script=asset("sections.js"),
    )
