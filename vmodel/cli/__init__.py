"""The command line.

Exit statuses: 0 success; 1 something that is needed is missing, or the host failed (a full disk, no memory); 2 the
machine file or the command line is wrong.  A command whose 1 says something else (a run is not as expected, a test
failed, the guest's command) has 125 for what is missing and for failures of the host: `_STATUS_OF_ITS_OWN`.  Each
mistake of the user's, and each failure of the host, is one line on stderr.  Tracebacks are for bugs only.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO, cast

import typer

from vmodel.cli.doctor import shim_command
from vmodel.cli.output import StdoutError, open_streams, safely
from vmodel.errors import ConfigError, VmodelError
from vmodel.guest.artifacts import ArtifactError
from vmodel.interrupts import Interrupts, interruptible

log = logging.getLogger(__name__)

#: click's UsageError.  Some versions of typer contain a copy of click, so this takes the class that typer uses.
_UsageError = cast(type[Exception], typer.BadParameter.__base__)


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"vmodel {version('vmodel')}")
        except PackageNotFoundError:
            typer.echo("vmodel (not installed: imported from its source folder)")
        raise typer.Exit


def _options(
    asked: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Emulated PCI devices in Python for stock QEMU, over vfio-user."""


#: Each command's module in this folder.  All but doctor need the compiled shim.
_COMMANDS = {
    "new": "new",
    "test": "test",
    "serve": "serve",
    "run": "run",
    "qemu-args": "serve",
    "guest": "guest",
    "groups": "groups",
    "acpi": "acpi",
    "build": "build",
    "devices": "inspect",
    "regs": "inspect",
    "schema": "schema",
    "log": "log",
    "call": "call",
    "sweep": "campaign",
    "explore": "explore",
    "campaign": "campaign",
    "reproduce": "repeat",
    "minimise": "repeat",
    "report": "report",
    "doctor": "doctor",
}
#: Commands with subcommands: their module's `app`.
_GROUPS = ("bench", "dma", "iommu", "kernels", "plan", "inject")
#: Commands whose status 1 is a result: that of a program, of a test, or of runs that are not as expected.
_STATUS_OF_ITS_OWN = ("guest", "run", "test", "sweep", "explore", "campaign", "reproduce", "minimise")
#: Options whose value may be left out, by command.
_VALUE_OPTIONAL = {"guest": ("--dma-report",)}
#: Set by the shell's completion, which asks for any command.
_COMPLETE = "_VMODEL_COMPLETE"


def _load(names: Collection[str]) -> tuple[dict[str, Callable[..., None]], dict[str, typer.Typer]]:
    """These commands, and those with subcommands; loading only what is called makes the start a third shorter.

    ImportError: the compiled shim is missing or broken.
    """
    commands = {
        name: getattr(import_module(f"vmodel.cli.{module}"), name.replace("-", "_"))
        for name, module in _COMMANDS.items()
        if name in names
    }
    return commands, {name: import_module(f"vmodel.cli.{name}").app for name in _GROUPS if name in names}


def _app(commands: dict[str, Callable[..., None]], groups: dict[str, typer.Typer]) -> typer.Typer:
    app = typer.Typer(
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        # Styled text would pass the escaping streams of `safely`: see output.py.
        context_settings={"help_option_names": ["-h", "--help"], "color": False},
    )
    app.callback()(_options)
    for name, command in commands.items():
        app.command(name=name)(command)
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default that of this process; returns the exit status."""
    if argv is None:
        open_streams()
    with safely():
        status = _main(argv)
        if (serve := sys.modules.get("vmodel.cli.serve")) is not None and serve.abandoned.is_set():
            serve.leave(status)
        return status


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    arguments = _with_values(arguments)
    everything = {*_COMMANDS, *_GROUPS}
    failure = 125 if arguments[0] in _STATUS_OF_ITS_OWN else 1
    interrupts = Interrupts()
    try:
        one = arguments[0] in everything and _COMPLETE not in os.environ
        try:
            app = _app(*_load(arguments[:1] if one else everything))
        except ImportError as error:
            if error.name != "vmodel._vmshim":
                raise
            return _fail(f"the C shim cannot be loaded ({error}): {shim_command()}", status=failure)
        with interruptible() as interrupts:
            result = app(arguments, prog_name="vmodel", standalone_mode=False)
            sys.stdout.flush()
    except _UsageError as error:
        return _fail(_usage(error), status=2)
    except ArtifactError as error:
        return _fail(str(error), status=failure)
    except ConfigError as error:
        return _fail(*str(error).splitlines(), status=2)
    except (KeyboardInterrupt, typer.Abort):
        return 128 + (interrupts.number or signal.SIGINT)
    except StdoutError as error:
        _abandon(sys.stdout)
        assert error.__cause__ is not None
        if isinstance(error.__cause__, BrokenPipeError):  # the reader has closed the pipe: `vmodel regs edu | head`
            return failure
        return _fail(f"stdout: {_failure(error.__cause__)}", status=failure)
    except Exception as error:
        what = _failure(error)
        if not what:
            raise
        log.debug("the host failed", exc_info=True)
        return _fail(what, status=failure)
    return result if isinstance(result, int) else 0


def _with_values(arguments: list[str]) -> list[str]:
    """The same, with "=-" behind options whose value was left out: click would take the word that follows."""
    names = _VALUE_OPTIONAL.get(arguments[0], ())
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [f"{word}=-" if word in names and n < end else word for n, word in enumerate(arguments)]


def _failure(error: BaseException) -> str:
    """What failed, if it was the host and not vmodel: a full disk, no memory.  Empty: the error is a bug."""
    import sqlite3  # only campaigns use it otherwise

    if isinstance(error, OSError) and not isinstance(error, VmodelError):
        what = error.strerror or str(error) or type(error).__name__
        return what if error.filename is None else f"{os.fsdecode(error.filename)}: {what}"
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return "the host allows no more threads, or no memory for them"
    if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
        return f"the campaign's database: {error}"
    return ""


def _usage(error: Exception) -> str:
    text = (
        " ".join(str(getattr(error, "format_message", lambda: error)()).split())
        .rstrip(".")
        .replace("Value error, ", "")
    )
    command = getattr(getattr(error, "ctx", None), "command_path", "vmodel")
    return f"{text[:1].lower()}{text[1:]} (see {command} --help)"


def _fail(*lines: str, status: int) -> int:
    try:
        for line in lines:
            print(f"vmodel: {line}", file=sys.stderr)
    except OSError:  # the status still says it
        _abandon(sys.stderr)
    return status


def _abandon(stream: TextIO) -> None:
    """What this stream still holds is lost: else Python tries to write it when it exits, and prints a second error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
