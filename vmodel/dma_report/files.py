"""Reports as files."""

from __future__ import annotations

from pathlib import Path

from vmodel.dma_report.page import page
from vmodel.dma_report.report import DmaReport
from vmodel.errors import ConfigError
from vmodel.files import create


def check_file(path: Path, option: str) -> Path:
    """The path; ConfigError, beginning with `option`: it ends in neither .html nor .json, or its folder is missing."""
    if path.suffix not in (".html", ".json"):
        raise ConfigError(f"{option}{path}: must end in .html or .json")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}{path}: the folder {path.parent} does not exist")
    return path


def write_report(report: DmaReport, file: Path) -> None:
    """Writes a report, as HTML if the file's name ends in .html, else as JSON.  OSError."""
    content = page(report) if file.suffix == ".html" else report.model_dump_json(indent=1) + "\n"
    with create(file) as out:
        out.write(content.encode())
