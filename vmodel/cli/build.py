"""vmodel build."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vmodel.guest import artifacts, get_qemu, kbuild
from vmodel.guest.tools import tool

Source = Annotated[
    Path, typer.Argument(metavar="DIR", help="The module's folder, with a Kbuild or a Makefile.", show_default=False)
]
Kernels = Annotated[
    list[str] | None,
    typer.Option(
        "--kernel",
        metavar="NAME|PATH",
        help=f"A kernel to build for; by default {' and '.join(artifacts.KERNELS)}. Repeat it for more.",
    ),
]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where it is built, a folder for each kernel.")]
Variables = Annotated[
    list[str] | None,
    typer.Option("--make", metavar="NAME=VALUE", help="A variable of make's, as CONFIG_MYCARD=m; repeatable."),
]


def build(source: Source, kernel: Kernels = None, output: Output = kbuild.OUTPUT, variables: Variables = None) -> None:
    """Build a kernel module out of tree for the guest kernels.

    What it needs for that (headers, Debian's compiler) is fetched the first time.  The compiler's messages go to
    stdout, then the path of each module.  For editors there is a compile_commands.json in the output folder.
    """
    kbuild.check_source(source)
    own = [kbuild.check_variable(text) for text in variables or ()]
    for place in (source, output):
        kbuild.check_path(place)
    names = kernel or list(artifacts.KERNELS)
    fetch_for(names, builds=True)
    for name in names:
        found = artifacts.find_kernel(name)
        try:
            built = kbuild.build(source, found, output, print, own)
        except kbuild.BuildError as error:
            raise kbuild.BuildError(f"{source}: not built for {found.release}: {error.summary}") from None
        for module in built.modules:
            print(os.path.relpath(module))


def fetch_for(kernels: Sequence[str], builds: bool, tools: Sequence[str] = ()) -> None:
    """Fetches tools, "PACKAGE:PROGRAM", and these kernels with what modules for them are built with if one `builds`.

    Only what the cache has not got.
    """
    names = [name for name in kernels if builds and artifacts.KERNEL_NAME.fullmatch(name)]
    packages = [tool(text)[0] for text in tools]
    if builds or packages:
        get_qemu.fetch(names, headers=names, tools=packages)
