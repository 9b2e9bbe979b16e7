"""The timeline of a report's mappings as a part of a page."""

from __future__ import annotations

from importlib.resources import files

import jinja2
from markupsafe import Markup

from vmodel.dma_report.report import EndpointReport
from vmodel.dma_report.timeline import LANE, WIDTH, timeline


def _file(name: str) -> str:
    return files("vmodel.dma_report").joinpath(name).read_text(encoding="utf-8")


#: The style sheet of drawings.
STYLE = Markup(_file("timeline.css"))


def drawing(endpoint: EndpointReport, seconds: float) -> Markup:
    """The mappings of an endpoint up to the end of its report, drawn with a key; "": there are none."""
    made = timeline(endpoint, seconds)
    if not made.bars:
        return Markup()
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = engine.from_string(_file("timeline.html.jinja"))
    return Markup(template.render(drawing=made, endpoint=endpoint, width=WIDTH, lane=LANE))
