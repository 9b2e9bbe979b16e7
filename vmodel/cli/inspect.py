"""vmodel devices and regs."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vmodel.cli.complete import models
from vmodel.cli.output import AsJson, console, show
from vmodel.devices import BUILTIN
from vmodel.errors import ConfigError
from vmodel.machine import load_model
from vmodel.spec import load_path
from vmodel.spec.header import c_header
from vmodel.spec.rdl_text import rdl_text
from vmodel.spec.source import python_source
from vmodel.spec.svd_text import svd_text
from vmodel.spec.tables import html_page, markdown


def devices(as_json: AsJson = False) -> None:
    """List the built-in device models."""
    models = {name: load_model(name) for name in BUILTIN}
    if as_json:
        print(json.dumps({name: {**_identity(model), "class": BUILTIN[name]} for name, model in models.items()}))
        return
    table = Table("model", "PCI id", "what it is", box=None)
    for name, model in models.items():
        table.add_row(name, f"{model.vendor_id:04x}:{model.device_id:04x}", escape(model.declaration.describe()["doc"]))
    show(table, console())


def _identity(model: object) -> dict[str, object]:
    return {key: getattr(model, key) for key in ("vendor_id", "device_id", "class_code")}


class Format(enum.StrEnum):
    """What `vmodel regs --format` writes."""

    C = "c"
    RDL = "rdl"
    SVD = "svd"
    HTML = "html"
    MD = "md"


def regs(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help='A built-in, or "path/file.py:Class"; or "import" and a FILE.', autocompletion=models
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="For import: a .rdl, .xml (IP-XACT) or .svd file.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="For import: the address map or peripheral; else the last one.")
    ] = None,
    to: Annotated[
        Format | None, typer.Option("--format", help="Print a C header for a driver, SystemRDL, CMSIS-SVD, or tables.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's register map.

    `vmodel regs import FILE` prints a specification's registers as Python.
    """
    if model == "import":
        if file is None:
            raise ConfigError("regs import needs a file: vmodel regs import card.rdl > card_regs.py")
        print(python_source(load_path(file, name), file.name), end="")
        return
    if file is not None or name is not None:
        raise ConfigError("a FILE and --name are for vmodel regs import")
    cls = load_model(model)
    if to is not None:
        slots = sorted(cls.declaration.banks.values(), key=lambda slot: (slot.bar.index, slot.at))
        if not slots:
            raise ConfigError(f"{cls.__name__} has no registers in a BAR")
        places = [(slot.bar.index, slot.at, slot.bank) for slot in slots]
        doc = cls.declaration.doc
        match to:
            case Format.C:
                text = c_header(cls.__name__, places)
            case Format.RDL:
                text = "\n".join(rdl_text(slot.bank) for slot in slots)
            case Format.SVD:
                # Each BAR has addresses of its own.
                text = svd_text(cls.__name__, doc, [(bar << 32 | at, bank) for bar, at, bank in places])
            case Format.HTML:
                text = html_page(cls.__name__, doc, places)
            case Format.MD:
                text = markdown(cls.__name__, doc, places)
        print(text, end="")
        return
    described = cls.declaration.describe()
    hooks: dict[tuple[str, str], set[str]] = {}
    for hook in cls.declaration.hooks:
        bank_name = hook.register.bank.__name__ if hook.register.bank else ""
        hooks.setdefault((bank_name, hook.register.name), set()).add(hook.kind)
    for bar in described["bars"]:
        for bank in bar["banks"]:
            for register in bank["registers"]:
                register["hooks"] = sorted(hooks.get((bank["name"], register["name"]), ()))
    if as_json:
        print(json.dumps(described))
        return
    out = console()
    out.print(f"{cls.vendor_id:04x}:{cls.device_id:04x} {described['doc']}", highlight=False, markup=False)
    for bar in described["bars"]:
        out.print(f"\nBAR{bar['index']}, {bar['size']:#x} bytes, {bar['kind']}", highlight=False)
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
                    escape(r["doc"]),
                )
                for f in r["fields"]:
                    bits = str(f["lo"]) if f["lo"] == f["hi"] else f"{f['hi']}:{f['lo']}"
                    table.add_row("", bits, f"  .{f['name']}", f["mode"], "", "", escape(f["doc"]), style="dim")
                    for v in f["values"]:
                        said = f"{v['value']} {v['name']}" + (f": {v['doc']}" if v["doc"] else "")
                        table.add_row("", "", "", "", "", "", escape(f"  {said}"), style="dim")
            show(table, out)
        for ram in bar["ram"]:
            mapped = ", mappable" if ram["mappable"] else ""
            out.print(f"  RAM at {ram['offset']:#x}, {ram['size']:#x} bytes{mapped}", highlight=False)
