"""vmodel acpi."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vmodel.cli.output import log_to_stderr
from vmodel.cli.serve import MachinePath, loaded
from vmodel.errors import ConfigError


def acpi(
    path: MachinePath,
    table: Annotated[Literal["viot", "dmar"], typer.Option("--table", help="The table to write.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to FILE instead of stdout.")
    ] = None,
) -> None:
    """Write the ACPI table of a machine's IOMMUs.

    The table describes the IOMMUs to the guest.  Pass it to QEMU with -acpitable.
    """
    log_to_stderr(False)
    with loaded(path) as machine:
        tables = machine.acpi_tables()
    content = tables.get(table.upper())
    if content is None:
        kind = "virtio-iommu" if table == "viot" else "vt-d"
        raise ConfigError(f'has no [[iommu]] of kind "{kind}" with an address: there is no {table.upper()}', file=path)
    if output is None:
        if sys.stdout.isatty():
            raise ConfigError("the table is binary: name a file with -o, or redirect stdout")
        sys.stdout.buffer.write(content)
        return
    try:
        output.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"-o {output}: {error.strerror}") from error
