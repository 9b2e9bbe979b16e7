"""vmodel plan: checks plan files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from vmodel.cli.output import log_to_stderr
from vmodel.cli.serve import loaded
from vmodel.errors import ConfigError
from vmodel.inject import Engine, FaultPlan
from vmodel.inject.plan import automatic_name
from vmodel.machine import Machine

app = typer.Typer(
    add_completion=False,
    help="Check plans of faults.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _plan() -> None:
    """Check plans of faults."""


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(metavar="PLAN.toml", help="The plan files.", show_default=False)],
    machine: Annotated[
        Path | None,
        typer.Option("--machine", metavar="MACHINE.toml", help="Also check that devices and registers exist."),
    ] = None,
) -> None:
    """Check plans, and print their rules in normal form.

    Each mistake is one line on stderr; the exit status is then 2.
    """
    log_to_stderr(False)
    mistakes = []
    with contextlib.nullcontext() if machine is None else loaded(machine) as made:
        for path in paths:
            try:
                _check(path, made)
            except ConfigError as error:
                mistakes += [_with_file(path, line) for line in str(error).splitlines()]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _check(path: Path, machine: Machine | None) -> None:
    plan = FaultPlan.load(path)
    if machine is not None:
        Engine(plan, machine.devices).close()
    for n, rule in enumerate(plan.rule):
        print(f"{rule.name or automatic_name(n)}: {rule.text()}")
    print(f"{path}: {len(plan.rule)} rule{'' if len(plan.rule) == 1 else 's'}, seed {plan.seed}")


def _with_file(path: Path, line: str) -> str:
    return line if line.startswith(f"{path}: ") else f"{path}: {line}"
