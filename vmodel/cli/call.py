"""vmodel call: calls a method of a running device's model."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vmodel import control
from vmodel.calls import LONGEST
from vmodel.cli.inject import server_of
from vmodel.cli.output import console, show
from vmodel.cli.serve import MachinePath, RunDir
from vmodel.device.outside import TIMEOUT
from vmodel.errors import ConfigError
from vmodel.patience import patience

#: Seconds that an answer may take beyond the call's own.
_ANSWER = 5.0
_NAMED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def call(
    path: MachinePath,
    method: Annotated[
        str, typer.Argument(metavar="[DEVICE.METHOD]", help="As uart0.feed; by default all are listed.")
    ] = "",
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[JSON...]", help="Its arguments, as '\"x\"', 5 or count=5.")
    ] = None,
    run_dir: RunDir = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Seconds that it may take.", min=0.001, max=LONGEST)
    ] = TIMEOUT,
) -> None:
    """Call a method of a model in a running server.

    It must be one that the model marks with @outside, and runs on the device's thread.  The result is printed as JSON,
    unless it is null.  The exit status is 1 if the model raises an exception or does not return in time.  Arguments
    that begin with a minus come after "--".
    """
    positional, named = _parsed(arguments or [])
    server = server_of(path, run_dir)
    if not method:
        table = Table("method", "what it does", box=None)
        for found in control.ask(server, "call.list"):
            table.add_row(escape(found["call"]), escape(found["doc"]))
        show(table, console())
        return
    request = {"method": method, "arguments": positional, "named": named, "seconds": min(patience(timeout), LONGEST)}
    answer = control.ask(server, "call", within=timeout + _ANSWER, **request)
    if "failed" in answer:
        print(f"vmodel: {answer['failed']}", file=sys.stderr)
        raise typer.Exit(1)
    if answer["json"] != "null":
        print(answer["json"])


def _parsed(words: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments.  ConfigError: one is not JSON."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for word in words:
        match = _NAMED.fullmatch(word)
        text = match[2] if match else word
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError(f"{text!r} is not JSON: text needs quotes of its own, as '\"{text}\"'") from None
        if match is None:
            positional.append(value)
        elif match[1] in named:
            raise ConfigError(f"{match[1]} is given twice")
        else:
            named[match[1]] = value
    return positional, named
