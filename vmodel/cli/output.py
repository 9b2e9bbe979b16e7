"""How commands print: for people in a terminal, and plainly for whatever else reads it.

What a command prints may have come from a guest or a file of somebody's.  In `safely()` all of it passes `printable()`:
prints by the streams, tables and logs by a hook of rich's, whose own colours are not foreign.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any, TextIO, cast

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.logging import RichHandler
from rich.segment import Segment
from rich.table import Table

from vmodel.printable import printable

AsJson = Annotated[bool, typer.Option("--json", help="For tools.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what devices and clients do.")]


class _Printable:
    """A text stream whose text is printable.  `buffer` and `fileno()` are for bytes that are meant as they are."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        self.raw.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextlib.contextmanager
def safely() -> Iterator[None]:
    """Meanwhile, what is printed on stdout and stderr is printable."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Printable(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _PrintableSegments:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class _PrintableHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_PrintableSegments(each) for each in renderables]


def console(stream: TextIO | None = None) -> Console:
    """A console on `stream` (stdout).  Outside a terminal it neither colours nor folds lines.

    With NO_COLOR set it has no attributes at all: rich would still print bold.
    """
    stream = stream or sys.stdout
    stream = stream.raw if isinstance(stream, _Printable) else stream
    if stream.isatty():
        made = Console(file=stream, color_system=None if os.environ.get("NO_COLOR") else "auto")
    else:
        made = Console(file=stream, width=10_000, no_color=True, soft_wrap=True)
    made.push_render_hook(_PrintableHook())
    return made


def show(table: Table, out: Console) -> None:
    """Prints a table; outside a terminal without the blanks that fill its lines."""
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as text:
        out.print(table)
    for line in text.get().splitlines():
        print(line.rstrip(), file=out.file)


def log_to_stderr(verbose: bool, stream: TextIO | None = None) -> None:
    """Warnings, and with `verbose` all that vmodel says, on stderr, or on a `stream` in its place."""
    stream = stream or sys.stderr
    handler: logging.Handler
    if stream.isatty():
        handler = RichHandler(console=console(stream), show_path=False, omit_repeated_times=False)
        form = "%(message)s"
    else:
        handler = logging.StreamHandler(cast(TextIO, _Printable(stream)))
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=form, datefmt="%H:%M:%S", handlers=[handler], force=True)
    logging.getLogger("vmodel").setLevel(logging.DEBUG if verbose else logging.WARNING)
