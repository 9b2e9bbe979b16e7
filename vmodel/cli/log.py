"""vmodel log: prints the injections of a running server, and what its devices do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vmodel import control, trace
from vmodel.cli.inject import server_of
from vmodel.cli.output import AsJson
from vmodel.cli.serve import Devices, MachinePath, Registers, RunDir
from vmodel.control import NoServer
from vmodel.errors import ConfigError

#: Seconds between two requests.
_PAUSE = 0.1


def log(
    path: MachinePath,
    run_dir: RunDir = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print what the devices do, until Ctrl-C or the server ends.")
    ] = False,
    device: Devices = None,
    register: Registers = None,
    point: Annotated[
        list[str] | None,
        typer.Option("--point", metavar="POINT", help="With -f, only these, as irq, dma or mmio.write; repeatable."),
    ] = None,
    injections: Annotated[bool, typer.Option("--injections", help="With -f, only injections.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a running server's injections; with -f, all events.

    Injections are printed oldest first.  With -f, accesses by register and field (fields that are 0 are left out), DMA,
    interrupts, resets, and clients that come and go follow as they happen.
    """
    for name, given in (
        ("--device", device),
        ("--register", register),
        ("--point", point),
        ("--injections", injections),
    ):
        if given and not follow:
            raise ConfigError(f"{name}: only with --follow")
    if injections and (register or point):
        raise ConfigError("--injections: not together with --register or --point")
    server = server_of(path, run_dir)
    wanted = {"devices": device or [], "registers": register or [], "points": point or [], "events": not injections}
    records = _followed(server, wanted) if follow else _injections(server)
    for record in records:
        print(json.dumps(record) if as_json else line(record), flush=True)


def _injections(server: Path) -> Iterator[dict[str, Any]]:
    last = 0
    while records := control.ask(server, "log", since=last):
        yield from records
        last = records[-1]["n"]


def _followed(server: Path, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Injections so far, then all records, until the server ends."""
    number = control.ask(server, "trace.follow", **wanted)
    last = 0
    try:
        for record in _injections(server):
            last = record["n"]
            yield record
        while True:
            records = control.ask(server, "trace.take", follower=number)
            if records is None:
                print(
                    f"vmodel: stopped for more than {trace.LEASE:g} s: events meanwhile were not recorded",
                    file=sys.stderr,
                )
                number = control.ask(server, "trace.follow", **wanted)
                continue
            # Injections that came between the two first requests are in both answers.
            yield from (record for record in records if record.get("n", last + 1) > last)
            time.sleep(_PAUSE)
    except NoServer:
        return  # it has ended
    finally:
        _leave(server, number)


def _leave(server: Path, number: int) -> None:
    try:
        control.ask(server, "trace.leave", follower=number)
    except ConfigError:
        return  # it has ended, or the lease ends the follower


def line(record: dict[str, Any]) -> str:
    """One line about a record, for people."""
    if "more" in record:
        return f"({record['more']} more, not kept: follow fewer with --device, --register or --point)"
    if "rule" in record:
        return injection(record)
    return f"{record['t']:.6f} {record['device']} {trace.what(record)}"


def injection(record: dict[str, Any]) -> str:
    """One line about an injection, for people."""
    where = f" {record['address']}+{record['size']}" if record["address"] is not None else ""
    changed = f": {record['before']} -> {record['after']}" if record["after"] is not None else ""
    result = "" if record["result"] == "ok" else f" [{record['result']}]"
    late = " (late)" if record.get("late") else ""
    return (
        f"{record['t']:.6f} {record['rule']} #{record['count']}{late} {record['point']} "
        f"{record['device']}{where} {record['do']}{changed}{result}"
    )
