"""vmodel inject and log: control the fault rules of a running server, and print its injections."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vmodel import control
from vmodel.cli.output import AsJson, console, log_to_stderr, show
from vmodel.cli.serve import MachinePath, RunDir, default_run_dir, loaded
from vmodel.errors import ConfigError

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


def _socket(path: Path, run_dir: Path | None) -> Path:
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
    print(control.ask(_socket(path, run_dir), "inject.add", rule=rule))


@app.command(name="list")
def list_rules(path: MachinePath, run_dir: RunDir = None, as_json: AsJson = False) -> None:
    """List the rules, with their state and counts."""
    rules = control.ask(_socket(path, run_dir), "inject.list")
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
    control.ask(_socket(path, run_dir), "inject.remove", name=name)


@app.command()
def pause(path: MachinePath, name: AnyName = "", run_dir: RunDir = None) -> None:
    """Pause a rule or all rules: they neither fire nor count."""
    control.ask(_socket(path, run_dir), "inject.pause", name=name)


@app.command()
def resume(path: MachinePath, name: AnyName = "", run_dir: RunDir = None) -> None:
    """Resume a paused rule or all rules."""
    control.ask(_socket(path, run_dir), "inject.resume", name=name)


def log(
    path: MachinePath,
    run_dir: RunDir = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow until Ctrl-C or the server ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the injections of a running server, oldest first."""
    socket, last = _socket(path, run_dir), 0
    records = control.ask(socket, "log", since=0)
    while records or follow:
        for record in records:
            print(json.dumps(record) if as_json else line(record), flush=True)
            last = record["n"]
        if not records:
            time.sleep(0.25)
        try:
            records = control.ask(socket, "log", since=last)
        except ConfigError:
            if not follow:
                raise
            return  # the server has ended


def line(record: dict[str, Any]) -> str:
    """One line about an injection, for people."""
    where = f" {record['address']}+{record['size']}" if record["address"] is not None else ""
    changed = f": {record['before']} -> {record['after']}" if record["after"] is not None else ""
    result = "" if record["result"] == "ok" else f" [{record['result']}]"
    late = " (late)" if record.get("late") else ""
    return (
        f"{record['t']:.6f} {record['rule']} #{record['count']}{late} {record['point']} "
        f"{record['device']}{where} {record['do']}{changed}{result}"
    )
