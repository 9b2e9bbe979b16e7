"""vmodel devices, regs, doctor."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vmodel.device import hooked_registers
from vmodel.devices import BUILTIN
from vmodel.machine import load_model
from vmodel.testing import artifacts

AsJson = Annotated[bool, typer.Option("--json", help="For tools.")]


def _console() -> Console:
    # Not in a terminal: never fold lines, whatever reads them wants them whole.
    return Console() if sys.stdout.isatty() else Console(width=200, no_color=True)


def devices(as_json: AsJson = False) -> None:
    """List the built-in models."""
    models = {name: load_model(name) for name in BUILTIN}
    if as_json:
        print(json.dumps({name: {**_identity(model), "class": BUILTIN[name]} for name, model in models.items()}))
        return
    table = Table("model", "PCI id", "what it is", box=None)
    for name, model in models.items():
        table.add_row(name, f"{model.vendor_id:04x}:{model.device_id:04x}", model.describe()["doc"])
    _console().print(table)


def _identity(model: object) -> dict[str, object]:
    return {key: getattr(model, key) for key in ("vendor_id", "device_id", "class_code")}


def regs(
    model: Annotated[str, typer.Argument(help='A built-in, or "path/file.py:Class".')], as_json: AsJson = False
) -> None:
    """Show a model's register map."""
    cls = load_model(model)
    described = cls.describe()
    hooks = {(r.bank.__name__ if r.bank else "", r.name): kinds for r, kinds in hooked_registers(cls).items()}
    for bar in described["bars"]:
        for bank in bar["banks"]:
            for register in bank["registers"]:
                register["hooks"] = sorted(hooks.get((bank["name"], register["name"]), ()))
    if as_json:
        print(json.dumps(described))
        return
    console = _console()
    console.print(f"{cls.vendor_id:04x}:{cls.device_id:04x} {described['doc']}", highlight=False)
    for bar in described["bars"]:
        console.print(f"\nBAR{bar['index']}, {bar['size']:#x} bytes, {bar['kind']}", highlight=False)
        for bank in bar["banks"]:
            table = Table("offset", "bits", "name", "mode", "reset", "hooks", "", box=None, title=bank["name"])
            table.title_justify = "left"
            for r in bank["registers"]:
                width = r["width"] // 4
                table.add_row(
                    f"{bank['offset'] + r['offset']:#06x}",
                    str(r["width"]),
                    r["name"],
                    r["mode"],
                    f"{r['reset']:#0{width + 2}x}",
                    ",".join(r["hooks"]),
                    r["doc"],
                )
                for f in r["fields"]:
                    bits = str(f["lo"]) if f["lo"] == f["hi"] else f"{f['hi']}:{f['lo']}"
                    table.add_row("", bits, f"  .{f['name']}", f["mode"], "", "", f["doc"], style="dim")
            console.print(table)
        for ram in bar["ram"]:
            mapped = ", mappable" if ram["mappable"] else ""
            console.print(f"  RAM at {ram['offset']:#x}, {ram['size']:#x} bytes{mapped}", highlight=False)


# ---- doctor ------------------------------------------------------------------------------------------


def _shim() -> str:
    importlib.import_module("vmodel._shim")
    return "loaded"


def _memory() -> str:
    fd = os.memfd_create("vmodel-doctor")
    try:
        os.ftruncate(fd, 4096)
    finally:
        os.close(fd)
    return "memfd works"


def _compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        raise artifacts.ArtifactError("no C compiler: apt-get install gcc")
    return found


def _kernels() -> str:
    found = artifacts.find_kernels()
    missing = [short for short in artifacts.KERNELS if short not in found]
    if missing:
        raise artifacts.ArtifactError(f"no kernel {' and '.join(missing)}: run scripts/get-qemu")
    return ", ".join(kernel.release for kernel in found.values())


_CHECKS: dict[str, Callable[[], object]] = {
    "C shim": _shim,
    "QEMU with vfio-user-pci": artifacts.find_qemu,
    "guest kernels": _kernels,
    "static busybox": artifacts.find_busybox,
    "shared memory": _memory,
    "C compiler": _compiler,
}


def doctor(as_json: AsJson = False) -> None:
    """Check what vmodel needs; exit status 1 if something is missing."""
    results = {}
    for name, check in _CHECKS.items():
        try:
            results[name] = (True, str(check()))
        except (artifacts.ArtifactError, OSError, ImportError) as error:
            results[name] = (False, str(error))
    healthy = all(good for good, _ in results.values())
    if as_json:
        print(json.dumps({name: {"ok": good, "detail": text} for name, (good, text) in results.items()}))
        raise typer.Exit(0 if healthy else 1)
    table = Table(box=None, show_header=False)
    for name, (good, text) in results.items():
        mark = "[green]ok[/green]" if good else "[red]missing[/red]"
        table.add_row(mark, name, text.replace(str(Path.home()), "~"))
    _console().print(table)
    raise typer.Exit(0 if healthy else 1)
