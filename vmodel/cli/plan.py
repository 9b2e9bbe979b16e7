"""vmodel plan: files of faults; and the options of the commands that take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vmodel.cli.output import log_to_stderr
from vmodel.cli.serve import loaded
from vmodel.inject import Engine, FaultPlan

app = typer.Typer(
    add_completion=False,
    help="Plans of faults.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _plan() -> None:
    """Plans of faults."""


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="PLAN.toml", help="The plan.", show_default=False)],
    machine: Annotated[
        Path | None,
        typer.Option("--machine", metavar="MACHINE.toml", help="Also look for devices and registers that it names."),
    ] = None,
) -> None:
    """Check a plan: one line for each mistake, or each rule as it is understood."""
    log_to_stderr(False)
    plan = FaultPlan.load(path)
    if machine is not None:
        with loaded(machine) as made, Engine(plan, made.devices):
            pass
    for n, rule in enumerate(plan.rule, 1):
        print(f"{rule.name or f'rule{n}'}: {rule.text()}")
    print(f"{path}: {len(plan.rule)} rule{'' if len(plan.rule) == 1 else 's'}, seed {plan.seed}")


@app.command()
def schema() -> None:
    """Print the JSON schema of plans, for editors."""
    print(json.dumps(FaultPlan.model_json_schema(), indent=2))
