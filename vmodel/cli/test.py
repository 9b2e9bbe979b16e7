"""vmodel test."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vmodel.cli.serve import loaded
from vmodel.config_file import parse_toml, read_text
from vmodel.errors import ConfigError
from vmodel.guest import artifacts, get_qemu, kbuild, modules
from vmodel.guest.tools import tool
from vmodel.machine.schema import GuestTable

Kernels = Annotated[
    list[str] | None,
    typer.Option(
        "--kernel",
        metavar="NAME|PATH",
        help=f"Kernel of guests, may be given more than once; by default {' and '.join(artifacts.KERNELS)}.",
    ),
]
NoGuest = Annotated[bool, typer.Option("--no-guest", help="Run only the tests that boot no guest; build nothing.")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", metavar="N", min=1, help="Tests at a time; by default one for each CPU.")
]
Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="-- ARG...", help="Arguments for pytest, such as -x or -k NAME.")
]


def test(arguments: Arguments = None, kernel: Kernels = None, no_guest: NoGuest = False, jobs: Jobs = None) -> None:
    """Build a project's kernel modules, and run its tests.

    The project is the current folder; its modules are the source folders that its machine files, *.toml, name in
    [guest].  Each test that boots a guest runs with each kernel.  What is missing is fetched first, with its size.  The
    exit status is pytest's; 2 if a machine file is wrong or a module cannot be built.
    """
    if find_spec("pytest") is None:
        raise artifacts.ArtifactError(f"pytest is missing: {sys.executable} -m pip install pytest pytest-xdist")
    kernels = kernel or list(artifacts.KERNELS)
    line = [sys.executable, "-m", "pytest", *_parallel(jobs)]
    if no_guest:
        line += ["-m", "not guest"]
    else:
        _prepare(kernels)
        for name in kernels:
            line += ["--vmodel-kernel", name]
    sys.stdout.flush()
    sys.stderr.flush()
    # In place of this process: pytest gets signals and the terminal as if the user had started it.
    os.execv(line[0], [*line, *(arguments or ())])


def _parallel(jobs: int | None) -> list[str]:
    """pytest-xdist's option, if it is there."""
    count = jobs or len(os.sched_getaffinity(0))
    if find_spec("xdist") is None:
        if jobs and jobs > 1:
            raise artifacts.ArtifactError(f"--jobs needs pytest-xdist: {sys.executable} -m pip install pytest-xdist")
        return []
    return ["-n", str(count)] if count > 1 else ["-p", "no:xdist"]


def _prepare(kernels: list[str]) -> None:
    """Fetches what guests need, and builds the current folder's modules for each kernel."""
    tables = dict(_guest_tables())
    entries = {entry for table in tables.values() for entry in (*table.modules, *table.extra_modules)}
    sources = sorted(filter(modules.is_source, entries))
    for source in sources:
        kbuild.check_source(Path(source))
        kbuild.check_path(Path(source))
    names = [name for name in kernels if artifacts.KERNEL_NAME.fullmatch(name)]
    packages = sorted({package for path, table in tables.items() for package in _packages(path, table)})
    get_qemu.fetch(names, headers=names if sources else (), tools=packages)
    for source in sources:
        for name in kernels:
            found, start = artifacts.find_kernel(name), time.monotonic()
            shown = os.path.relpath(source)
            try:
                kbuild.build(Path(shown), found, kbuild.OUTPUT, print)
            except kbuild.BuildError as error:
                raise kbuild.BuildError(f"{shown}: not built for {found.release}: {error.summary}") from None
            print(f"{shown}: built for {found.release} in {time.monotonic() - start:.1f} s")


def _packages(path: Path, table: GuestTable) -> Iterator[str]:
    """The packages of a machine file's tools.  ConfigError: one has another form."""
    for n, text in enumerate(table.tools):
        try:
            yield tool(text)[0]
        except ConfigError as error:
            raise ConfigError(str(error), file=path, key=f"guest.tools[{n}]") from None


def _guest_tables() -> Iterator[tuple[Path, GuestTable]]:
    for path in sorted(Path().glob("*.toml")):
        tables = parse_toml(read_text(path), path)
        # A campaign's file lists machine files.
        if "machine" in tables and "campaign" not in tables:
            with loaded(path) as machine:
                yield path, machine.content.guest
