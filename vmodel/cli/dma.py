"""vmodel dma show: what is wrong with the DMA of the drivers of a running server's devices."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from vmodel import control
from vmodel.cli.inject import server_of
from vmodel.cli.output import AsJson, console, show
from vmodel.cli.serve import MachinePath, RunDir
from vmodel.dma_report.files import check_file, write_report
from vmodel.dma_report.report import DmaReport
from vmodel.dma_report.text import text
from vmodel.errors import ConfigError

app = typer.Typer(
    add_completion=False,
    help="Show what is wrong with the DMA of drivers.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _dma() -> None:
    """Show what is wrong with the DMA of drivers."""


@app.command(name="show")
def show_dma(
    path: MachinePath,
    run_dir: RunDir = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh once a second, until Ctrl-C.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin a new record first.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the report, as .html or .json, with all mappings."),
    ] = None,
) -> None:
    """Show what is wrong with the DMA at the server that runs MACHINE.

    The first call begins the record: what happened before is not known.  docs/dma-sanitizer.md explains the findings.
    """
    if watch and output:
        raise ConfigError("--output: not together with --watch")
    file = None if output is None else check_file(output, "--output ")
    server = server_of(path, run_dir)
    # An answer with all mappings may be large.
    report, began = _ask(server, restart=restart, mappings=bool(as_json or file))
    if file is not None:
        write_report(report, file)
        print(f"vmodel: {file} has the report", file=sys.stderr)
        return
    if as_json:
        while True:  # with --watch until Ctrl-C, or the server has ended: the request then fails
            print(report.model_dump_json(), flush=True)
            if not watch:
                return
            time.sleep(1)
            report, _ = _ask(server, mappings=True)
    out = console()
    if not watch:
        show(_shown(report, began), out)
        return
    try:
        with Live(_shown(report, began), console=out, auto_refresh=False) as live:
            while True:  # as above
                time.sleep(1)
                live.update(_shown(_ask(server)[0], False), refresh=True)
    finally:
        out.show_cursor(True)  # Ctrl-C while Live starts leaves the cursor hidden


def _shown(report: DmaReport, began: bool) -> RenderableType:
    if not began:
        return Group(Text(f"recorded for {report.seconds:.0f} s"), text(report))
    return Text("the record begins now: the next `vmodel dma show` has what happens from now on")


def _ask(server: Path, **how: Any) -> tuple[DmaReport, bool]:
    """The report so far, and whether the record has just begun."""
    answer = control.ask(server, "dma", **how)
    try:
        return DmaReport.model_validate(answer["report"]), answer["began"] is True
    except (KeyError, TypeError, ValidationError):
        raise ConfigError(f"{server}: the server's answer is not this version's") from None
