"""A report as one self-contained HTML page: findings, a timeline of mappings, and tables."""

from __future__ import annotations

from importlib.resources import files

import jinja2

from vmodel.dma_report.analysis import size
from vmodel.dma_report.drawing import STYLE, drawing
from vmodel.dma_report.finding import SIGNS
from vmodel.dma_report.report import DmaReport

#: The most mappings in the table of an endpoint, the last ones; JSON has all.
_ROWS = 200


def page(report: DmaReport) -> str:
    """The page."""
    text = files("vmodel.dma_report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters["size"] = size
    return engine.from_string(text).render(
        report=report,
        drawn=[(endpoint, drawing(endpoint, report.seconds)) for endpoint in report.endpoints],
        style=STYLE,
        signs=SIGNS,
        rows=_ROWS,
    )
