"""The command line.

Exit statuses: 0 success; 1 something that is needed is missing, or the guest stopped before its command ended;
2 the machine file or the command line is wrong.  `run` returns QEMU's status, `guest` the command's.
Each mistake of the user's is one line on stderr.  Tracebacks are for bugs only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import cast

import typer

from vmodel.cli.doctor import doctor, mend_shim
from vmodel.cli.output import safely
from vmodel.errors import ConfigError
from vmodel.guest.artifacts import ArtifactError
from vmodel.guest.running import GuestRunError

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


def _commands() -> list[Callable[..., None]]:
    """All commands except doctor.  ImportError: the compiled shim, which they need, is missing or broken."""
    from vmodel.cli.acpi import acpi
    from vmodel.cli.campaign import campaign, sweep
    from vmodel.cli.groups import groups
    from vmodel.cli.guest import guest
    from vmodel.cli.inject import log
    from vmodel.cli.inspect import devices, regs
    from vmodel.cli.repeat import minimise, reproduce
    from vmodel.cli.report import report
    from vmodel.cli.run import run
    from vmodel.cli.serve import qemu_args, serve

    return [
        serve,
        run,
        qemu_args,
        guest,
        groups,
        acpi,
        devices,
        regs,
        log,
        sweep,
        campaign,
        reproduce,
        minimise,
        report,
    ]


def _groups() -> dict[str, typer.Typer]:
    """Commands with subcommands."""
    from vmodel.cli import bench, inject, iommu, plan

    return {"bench": bench.app, "iommu": iommu.app, "plan": plan.app, "inject": inject.app}


def _app(commands: Sequence[Callable[..., None]], groups: dict[str, typer.Typer]) -> typer.Typer:
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for command in commands:
        app.command(name=command.__name__.replace("_", "-"))(command)
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default that of this process; returns the exit status."""
    with safely():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        commands, groups = [*_commands(), doctor], _groups()
    except ImportError as error:
        if error.name != "vmodel._vmshim":
            raise
        if arguments[0] != "doctor":
            return _fail(f"the C shim cannot be loaded ({error}): {mend_shim()}", status=1)
        commands, groups = [doctor], {}
    try:
        result = _app(commands, groups)(arguments, prog_name="vmodel", standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as error:
        return _fail(_usage(error), status=2)
    except ArtifactError as error:
        return _fail(str(error), status=1)
    except ConfigError as error:
        return _fail(*str(error).splitlines(), status=2)
    except GuestRunError as error:
        return _fail(str(error), status=1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe (`vmodel regs edu | head`): avoid a second error when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return result if isinstance(result, int) else 0


def _usage(error: Exception) -> str:
    text = (
        " ".join(str(getattr(error, "format_message", lambda: error)()).split())
        .rstrip(".")
        .replace("Value error, ", "")
    )
    command = getattr(getattr(error, "ctx", None), "command_path", "vmodel")
    return f"{text[:1].lower()}{text[1:]} (see {command} --help)"


def _fail(*lines: str, status: int) -> int:
    for line in lines:
        print(f"vmodel: {line}", file=sys.stderr)
    return status
