"""vmodel report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmodel.campaign.report import FORMATS, html
from vmodel.campaign.store import ResultStore
from vmodel.campaign.summary import Summary
from vmodel.errors import ConfigError
from vmodel.mistakes import guess


def report(
    path: Annotated[
        Path, typer.Argument(metavar="CAMPAIGN", help="The campaign's folder, as edu.runs.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to FILE instead of stdout.")
    ] = None,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help=f"{', '.join(FORMATS)}.")] = "html",
    coverage_source: Annotated[
        list[Path] | None,
        typer.Option(
            "--coverage-source", metavar="DIR", help="Find source files in DIR, as a tree of Linux; repeatable."
        ),
    ] = None,
) -> None:
    """Report the results of a campaign or sweep on one page.

    This works while the campaign is running, too.
    """
    if form not in FORMATS:
        close = guess(form, list(FORMATS))
        raise ConfigError(
            f"--format {form}: {f'did you mean {close}? ' if close else ''}formats are {', '.join(FORMATS)}"
        )
    for place in coverage_source or ():
        if form != "html":
            raise ConfigError(f"--coverage-source: --format {form} shows no source, only html does")
        if not place.is_dir():
            raise ConfigError(f"--coverage-source {place}: is no folder")
    with ResultStore.open(path) as store:
        summary = Summary(store, (output or Path("report")).absolute().parent)
        text = html(summary, coverage_source or ()) if form == "html" else FORMATS[form](summary)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from error
