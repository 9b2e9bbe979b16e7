"""vmodel groups."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.tree import Tree

from vmodel import control
from vmodel.cli.drawing import draw
from vmodel.cli.output import AsJson, console, log_to_stderr, show
from vmodel.cli.serve import MachinePath, RunDir, default_run_dir, loaded
from vmodel.errors import ConfigError
from vmodel.iommu import sysfs
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.sysfs_folder import Entries, SysfsFolder, checked
from vmodel.iommu.system import System
from vmodel.machine import DEFAULT_DOMAINS, Machine
from vmodel.pci.topology import Bus, Function

Svg = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw them as SVG.")]
Sysfs = Annotated[
    Path | None, typer.Option("--sysfs", metavar="DIR", help="Write them to DIR in the form of Linux's /sys/kernel.")
]
Follow = Annotated[
    bool,
    typer.Option(
        "--follow", help="With --sysfs: those of the server that runs MACHINE, and as they change, until Ctrl-C."
    ),
]
#: Seconds between two looks at a running server.
_EVERY = 0.25

DefaultDomain = Annotated[
    str,
    typer.Option(
        "--default-domain",
        metavar="identity|dma|dma-fq",
        help="As if each IOMMU without default_domain had it: Linux's iommu.passthrough=1, iommu.strict=1 or 0.",
    ),
]

#: Groups use these colours in turn, by their number.
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


def groups(
    path: MachinePath,
    as_json: AsJson = False,
    svg: Svg = None,
    sysfs_dir: Sysfs = None,
    default_domain: DefaultDomain = "identity",
    follow: Follow = False,
    run_dir: RunDir = None,
) -> None:
    """Show a machine's IOMMU groups.

    The tree has segments, bridges and devices, and the reason why each is in its group.
    """
    log_to_stderr(False)
    if default_domain not in DEFAULT_DOMAINS:
        raise ConfigError(f"--default-domain {default_domain!r}: must be {', '.join(DEFAULT_DOMAINS)}")
    if follow:
        if sysfs_dir is None or as_json or svg is not None or default_domain != "identity":
            raise ConfigError("--follow is for --sysfs DIR, without --json, --svg and --default-domain")
        with loaded(path) as machine:
            socket = control.socket_of(run_dir or default_run_dir(machine.name), machine.name)
        _follow(socket, sysfs_dir)
        return
    if run_dir is not None:
        raise ConfigError("--run-dir is for --follow: otherwise no server is asked")
    with loaded(path, DEFAULT_DOMAINS[default_domain]) as machine:
        if svg is not None:
            _save(svg, draw(machine.system))
        if sysfs_dir is not None:
            try:
                sysfs.export(machine.system, sysfs_dir)
            except OSError as error:
                raise _refused(sysfs_dir, error) from error
        if as_json:
            print(json.dumps(described(machine)))
        elif svg is None and sysfs_dir is None:
            _show(machine.system)


def _follow(socket: Path, folder: Path) -> None:
    """Writes the groups of a running server, and what changes of them; Ctrl-C removes them."""
    shown = _tree_of(socket)
    try:
        with SysfsFolder(folder) as written:
            written.update(shown)
            print(f"{folder} follows the groups of the server in {socket.parent}, until Ctrl-C", flush=True)
            while True:
                time.sleep(_EVERY)
                written.update(_tree_of(socket))
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--sysfs {folder}: {'it is not a folder' if folder.is_file() else error.strerror}")


def _tree_of(socket: Path) -> Entries:
    try:
        return checked(control.ask(socket, "sysfs"))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the server in {socket.parent} sends no groups: is it another version of vmodel?") from error


def _save(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"--svg {file}: {error.strerror}") from error


def _show(system: System) -> None:
    out = console()
    for root in system.topology.roots:
        tree = Tree(f"segment {root.segment:04x}, bus {root.number:02x}")
        _add(tree, root, {e.source: e for e in system.endpoints if isinstance(e.source, Function)})
        show(tree, out)
    used = ", ".join(f"{iommu.name} ({iommu.driver.title})" for iommu in system.iommus) or "none"
    count = len(system.groups)
    print(f"{count} group{'' if count == 1 else 's'}; IOMMUs: {used}")


def _add(tree: Tree, bus: Bus, there: dict[Any, Endpoint]) -> None:
    for function in bus.functions:
        branch = tree.add(_label(there[function]))
        if function.secondary is not None:
            secondary = function.secondary
            _add(branch.add(f"bus {secondary.number:02x}") if secondary.functions else branch, secondary, there)


def _label(endpoint: Endpoint) -> str:
    function, group = endpoint.source, endpoint.group
    assert isinstance(function, Function)
    head = f"[bold]{function.bdf}[/] {escape(function.name)}"
    if function.kind.is_bridge:
        head += f", {function.kind.value}{'' if function.has_acs else ' without ACS'}"
    if group is None:
        return f"{head}  [dim]no group: {escape(endpoint.why)}[/]"
    colour = _COLOURS[group.number % len(_COLOURS)]
    kind = group.default_domain.type.value + (", untrusted" if endpoint.untrusted else "")
    return f"{head}  [{colour}]group {group.number}[/] [dim]({kind}) {escape(endpoint.why)}[/]"


def described(machine: Machine) -> dict[str, Any]:
    """A machine's IOMMUs, groups and devices as plain data, for `--json`."""
    system = machine.system
    return {
        "machine": machine.name,
        "iommus": [
            {
                "name": iommu.name,
                "kind": iommu.driver.kind,
                "page_sizes": sorted(iommu.capabilities.page_sizes),
                "aperture": [iommu.capabilities.usable.start, iommu.capabilities.usable.last],
                "strict": iommu.capabilities.strict,
            }
            for iommu in system.iommus
        ],
        "groups": [
            {
                "number": group.number,
                "iommu": group.iommu.name,
                "type": group.default_domain.type.value,
                "devices": [endpoint.name for endpoint in group.endpoints],
                "reserved_regions": [
                    {"start": r.span.start, "last": r.span.last, "type": r.type.value} for r in group.reserved_regions
                ],
            }
            for group in system.groups
        ],
        "devices": [_device(endpoint) for endpoint in system.settle()],
    }


def _device(endpoint: Endpoint) -> dict[str, Any]:
    function = endpoint.source
    assert isinstance(function, Function)
    return {
        "name": endpoint.name,
        "address": str(function.bdf),
        "kind": function.kind.value,
        "behind": function.home.bridge.name if function.home.bridge is not None else None,
        "secondary": function.secondary.number if function.secondary is not None else None,
        "iommu": endpoint.iommu.name if endpoint.iommu is not None else None,
        "requester_id": endpoint.requester_id,
        "untrusted": endpoint.untrusted,
        "group": endpoint.group.number if endpoint.group is not None else None,
        "why": endpoint.why,
    }
