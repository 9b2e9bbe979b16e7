"""vmodel kernels."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from vmodel.cli.output import AsJson, console, show
from vmodel.errors import ConfigError
from vmodel.guest import artifacts, get_qemu
from vmodel.guest.headers import find_headers

app = typer.Typer(
    add_completion=False,
    help="List and fetch the kernels of guests.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _has_headers(kernel: artifacts.Kernel) -> bool:
    try:
        find_headers(kernel)
    except artifacts.ArtifactError:
        return False
    return True


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the kernels in the cache, the oldest first.

    With headers, `vmodel build` needs to fetch nothing for a kernel.  The debug kernel is listed once it is built.
    """
    found = artifacts.find_kernels()
    if as_json:
        rows = {
            name: {"release": kernel.release, "image": str(kernel.image), "headers": _has_headers(kernel)}
            for name, kernel in found.items()
        }
        print(json.dumps(rows, indent=1))
        return
    if not found:
        raise artifacts.ArtifactError(f"no kernels in the cache; run {artifacts.FETCH_COMMAND}")
    table = Table("name", "release", "headers", box=None)
    for name, kernel in found.items():
        table.add_row(name, kernel.release, "yes" if _has_headers(kernel) else "no")
    show(table, console())


@app.command()
def add(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="stable, backports, cloud, or a version.", show_default=False)
    ],
    refresh: Annotated[bool, typer.Option("--refresh", help="Also fetch what is newer in Debian's archive.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be fetched, and its size.")] = False,
) -> None:
    """Fetch kernels and their headers from Debian's archive.

    The headers come with the compiler that built the kernel.
    """
    for name in names:
        if not artifacts.KERNEL_NAME.fullmatch(name):
            roles = ", ".join(artifacts.ROLES)
            raise ConfigError(f"{name!r}: must be {roles}, or a version such as 6.12")
    get_qemu.fetch(names, headers=names, refresh=refresh, dry_run=dry_run)
    if not dry_run:
        for name in names:
            print(f"{name} {artifacts.find_kernel(name).release}")
