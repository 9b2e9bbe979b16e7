"""How commands print: for people in a terminal, and plainly for whatever else reads it."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="For tools.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what devices and clients do.")]


def console(stream: TextIO | None = None) -> Console:
    """A console on `stream` (stdout).  Outside a terminal it neither colours nor folds lines."""
    stream = stream or sys.stdout
    if stream.isatty():
        return Console(file=stream)
    return Console(file=stream, width=10_000, no_color=True, soft_wrap=True)


def show(table: Table, out: Console) -> None:
    """Prints a table; outside a terminal without the blanks that fill its lines."""
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as text:
        out.print(table)
    for line in text.get().splitlines():
        print(line.rstrip(), file=out.file)


def log_to_stderr(verbose: bool) -> None:
    """Warnings, and with `verbose` all that vmodel says, on stderr."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console(sys.stderr), show_path=False, omit_repeated_times=False)
        form = "%(message)s"
    else:
        handler = logging.StreamHandler()
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=form, datefmt="%H:%M:%S", handlers=[handler], force=True)
    logging.getLogger("vmodel").setLevel(logging.DEBUG if verbose else logging.WARNING)
