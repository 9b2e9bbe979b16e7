"""Reports as files."""

from __future__ import annotations

from pathlib import Path

from vmodel.dma_report.page import page
from vmodel.dma_report.report import DmaReport
from vmodel.files import create


def write_report(report: DmaReport, file: Path) -> None:
    """Writes a report, as HTML if the file's name ends in .html, else as JSON.  OSError."""
    content = page(report) if file.suffix == ".html" else report.model_dump_json(indent=1) + "\n"
    with create(file) as out:
        out.write(content.encode())
