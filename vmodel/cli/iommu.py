"""vmodel iommu show: the state of the IOMMUs of a running server."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from vmodel import control
from vmodel.cli.output import AsJson, console, log_to_stderr, show
from vmodel.cli.serve import MachinePath, RunDir, default_run_dir, loaded

_SHOWN_MAPPINGS = 4

app = typer.Typer(
    add_completion=False,
    help="Show the IOMMUs of a running server.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _iommu() -> None:
    """Show the IOMMUs of a running server."""


@app.command(name="show")
def show_iommus(
    path: MachinePath,
    run_dir: RunDir = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh once a second, until Ctrl-C.")] = False,
) -> None:
    """Show the IOMMUs of the server that runs MACHINE.

    The output has groups, domains, mappings, IOTLB hit rates and faults.
    """
    log_to_stderr(False)
    with loaded(path) as machine:
        socket = control.socket_of(run_dir or default_run_dir(machine.name), machine.name)
    if as_json:
        while True:  # with --watch until Ctrl-C, or the server has ended: ask() then fails
            print(json.dumps(control.ask(socket, "iommu")), flush=True)
            if not watch:
                return
            time.sleep(1)
    out = console()
    if not watch:
        shown = control.ask(socket, "iommu")
        show(_table(shown), out)
        for line in _faults(shown):
            print(line)
        return
    try:
        with Live(_table(control.ask(socket, "iommu")), console=out, auto_refresh=False) as live:
            while True:  # as above
                time.sleep(1)
                live.update(_table(control.ask(socket, "iommu")), refresh=True)
    finally:
        out.show_cursor(True)  # Ctrl-C while Live starts leaves the cursor hidden


def _table(shown: dict[str, Any]) -> Table:
    # Uses of stale translations: a column only if an IOMMU reports them.
    watched = {iommu["name"] for iommu in shown["iommus"] if iommu["report_stale"]}
    columns = [
        "group",
        "IOMMU",
        "devices",
        "domain",
        "mappings",
        "IOTLB hits",
        "faults",
        *(["stale"] if watched else []),
    ]
    table = Table(*columns, box=None)
    for group in shown["groups"]:
        counters = [shown["devices"][name] for name in group["devices"] if name in shown["devices"]]
        keys = ("iotlb_hits", "iotlb_misses", "faults", "stale")
        hits, misses, faults, stale = (sum(c[key] for c in counters) for key in keys)
        rate = f"{100 * hits / (hits + misses):.1f} %" if hits + misses else "-"
        count = group.get("mapping_count")
        mappings = "" if count is None else f"{count:,}"
        if count:
            some = [f"{m['iova']:#x}..{m['last']:#x} -> {m['gpa']:#x}" for m in group["mappings"][:_SHOWN_MAPPINGS]]
            mappings += ": " + ", ".join([*some, "..."] if count > len(some) else some)
        domain = group["type"] if group["type"] == group["domain"] else f"{group['domain']} ({group['type']})"
        domain += "".join(f"; pasid {pasid}: {name}" for pasid, name in group["pasids"].items())
        row = [str(group["number"]), group["iommu"], ", ".join(group["devices"]), domain, mappings, rate, f"{faults:,}"]
        if watched:
            row.append(f"{stale:,}" if group["iommu"] in watched else "-")
        table.add_row(*row)
    return table


def _faults(shown: dict[str, Any]) -> list[str]:
    lines = []
    for iommu in shown["iommus"]:
        lost = f", {iommu['lost']:,} lost" if iommu["lost"] else ""
        lines.append(f"{iommu['name']}: {iommu['faults']:,} faults{lost}")
        lines += [f"  {text}" for text in iommu["last_faults"]]
    return lines
