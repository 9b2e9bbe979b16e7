"""vmodel report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmodel.campaign.report import FORMATS
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
) -> None:
    """Report the results of a campaign or sweep on one page.

    This works while the campaign is running, too.
    """
    if form not in FORMATS:
        close = guess(form, list(FORMATS))
        raise ConfigError(
            f"--format {form}: {f'did you mean {close}? ' if close else ''}Formats are {', '.join(FORMATS)}"
        )
    with ResultStore.open(path) as store:
        text = FORMATS[form](Summary(store, (output or Path("report")).absolute().parent))
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from error
