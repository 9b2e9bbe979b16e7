"""Output of commands: with colours and tables for a terminal, plain text for other programs.

Output may contain text from a guest or from somebody else's file.  Within `safely()` all of it passes `printable()`:
prints through the replaced streams, tables and logs through a hook of rich, which leaves rich's own colours alone.
So only rich styles text: what it has rendered is never printed through a replaced stream, and click's styles are off.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any, TextIO, cast

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.logging import RichHandler
from rich.segment import Segment
from rich.table import Table

from vmodel.printable import printable

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log what devices and clients do, each access included.")
]


def open_streams() -> None:
    """Opens those of stdin, stdout and stderr that were closed when the process started, as in `vmodel devices >&-`.

    So no other file gets their numbers.  As gnulib's stdopen does, stdin is opened for writing and stdout for reading:
    use of them fails, with EBADF.  What is written to stderr is lost.
    """
    for name, flags, mode in (
        ("stdin", os.O_WRONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)  # the lowest free number, which is the stream's
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for an encoding such as ASCII


class StdoutError(Exception):
    """stdout cannot be written, for the OSError that is its cause.  Libraries would handle that one by themselves."""


class _Stdout:
    """stdout, with StdoutErrors."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        try:
            return self.raw.write(text)
        except OSError as error:
            raise StdoutError from error

    def flush(self) -> None:
        try:
            self.raw.flush()
        except OSError as error:
            raise StdoutError from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class _Printable:
    """A text stream that escapes unprintable text.  Bytes written to `buffer` or `fileno()` stay unchanged."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        self.raw.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextlib.contextmanager
def safely() -> Iterator[None]:
    """Within this context, unprintable text on stdout and stderr is escaped, and writing stdout raises StdoutErrors."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, _Printable(stream)) for stream in (cast(TextIO, _Stdout(before[0])), before[1])
    )
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
    """A console on `stream`, by default stdout.  Outside a terminal it neither colours nor folds lines.

    With NO_COLOR set it uses no attributes at all, whereas rich would still print bold text.
    """
    stream = stream or sys.stdout
    stream = stream.raw if isinstance(stream, _Printable) else stream
    if stream.isatty():
        made = Console(file=stream, color_system=None if os.environ.get("NO_COLOR") else "auto")
    else:
        made = Console(file=stream, width=10_000, no_color=True, soft_wrap=True)
    made.push_render_hook(_PrintableHook())
    return made


def _keep_figures(table: Table) -> None:
    """In a narrow terminal, columns of text fold into lines; rich would cut figures and names, too."""
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = not any(" " in str(cell).strip() for cell in column.cells)


def show(shown: RenderableType, out: Console) -> None:
    """Prints a table or a tree; outside a terminal without trailing blanks."""
    if out.is_terminal:
        if isinstance(shown, Table):
            _keep_figures(shown)
        out.print(shown, highlight=False)
        return
    with out.capture() as text:
        out.print(shown, highlight=False)
    for line in text.get().splitlines():
        print(line.rstrip(), file=out.file)


def log_to_stderr(verbose: bool, stream: TextIO | None = None) -> None:
    """Sends vmodel's log to `stream`, by default stderr: warnings, and with `verbose` everything."""
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
