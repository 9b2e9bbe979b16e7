"""vmodel inject: control the fault rules of a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vmodel import control
from vmodel.cli.output import AsJson, console, log_to_stderr, show
from vmodel.cli.serve import MachinePath, RunDir, default_run_dir, loaded

app = typer.Typer(
    add_completion=False,
    help="Control the fault rules of a running server.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RuleName = Annotated[str, typer.Argument(metavar="NAME", help="The rule's name.", show_default=False)]
AnyName = Annotated[
    str, typer.Argument(metavar="[NAME]", help="The rule's name; by default all rules.", show_default=False)
]


@app.callback()
def _inject() -> None:
    """Control the fault rules of a running server."""


def server_of(path: Path, run_dir: Path | None) -> Path:
    """The control socket of a machine's running server."""
    log_to_stderr(False)
    with loaded(path) as machine:
        return control.socket_of(run_dir or default_run_dir(machine.name), machine.name)


@app.command()
def add(
    path: MachinePath,
    rule: Annotated[str, typer.Argument(metavar="RULE", help="As 'dma.write device=edu0 nth=3 do=partial(8)'.")],
    run_dir: RunDir = None,
) -> None:
    """Arm another rule, and print its name."""
    print(control.ask(server_of(path, run_dir), "inject.add", rule=rule))


@app.command(name="list")
def list_rules(path: MachinePath, run_dir: RunDir = None, as_json: AsJson = False) -> None:
    """List the rules, with their state and counts."""
    rules = control.ask(server_of(path, run_dir), "inject.list")
    if as_json:
        print(json.dumps(rules))
        return
    table = Table("name", "state", "matched", "fired", "rule", box=None)
    for rule in rules:
        row = [rule["name"], rule["state"], f"{rule['matched']:,}", f"{rule['fired']:,}", rule["rule"]]
        table.add_row(*map(escape, row))
    show(table, console())


@app.command()
def remove(path: MachinePath, name: RuleName, run_dir: RunDir = None) -> None:
    """Disarm a rule."""
    control.ask(server_of(path, run_dir), "inject.remove", name=name)


@app.command()
def pause(path: MachinePath, name: AnyName = "", run_dir: RunDir = None) -> None:
    """Pause a rule or all rules: they neither fire nor count."""
    control.ask(server_of(path, run_dir), "inject.pause", name=name)


@app.command()
def resume(path: MachinePath, name: AnyName = "", run_dir: RunDir = None) -> None:
    """Resume a paused rule or all rules."""
    control.ask(server_of(path, run_dir), "inject.resume", name=name)
