"""The command line.  Mistakes of the user's are one line each on stderr and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from vmodel.cli import inspect, run
from vmodel.errors import ConfigError
from vmodel.testing.artifacts import ArtifactError
from vmodel.testing.guest import GuestError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Emulated PCI devices in Python for stock QEMU, over vfio-user.",
)
for command in (run.serve, run.run, run.qemu_args, run.guest, inspect.devices, inspect.regs, inspect.doctor):
    app.command(name=command.__name__.replace("_", "-"))(command)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"vmodel {version('vmodel')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; its exit status."""
    try:
        app(list(sys.argv[1:] if argv is None else argv), prog_name="vmodel")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except ConfigError as error:
        return _fail(str(error), 2)
    except (ArtifactError, GuestError) as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        # The reader of our output has gone (`vmodel regs edu | head`): so be it, and quietly at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _fail(text: str, status: int) -> int:
    for line in text.splitlines():
        print(f"vmodel: {line}", file=sys.stderr)
    return status
