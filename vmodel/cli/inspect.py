"""vmodel devices and regs."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
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
    """Show a model's registers, capabilities and parameters.

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
    described = cls.declaration.describe() | {"params": cls.Params.model_json_schema().get("properties", {})}
    if as_json:
        print(json.dumps(described))
        return
    out = console()
    _show_function(described, out)
    for bar in described["bars"]:
        out.print(f"\nBAR{bar['index']}, {bar['size']:#x} bytes, {bar['kind']}", highlight=False)
        for bank in bar["banks"]:
            show(_registers(bank["name"], bank["offset"], bank["registers"]), out)
        for ram in bar["ram"]:
            mapped = ", mappable" if ram["mappable"] else ""
            out.print(f"  RAM at {ram['offset']:#x}, {ram['size']:#x} bytes{mapped}", highlight=False)


def _show_function(described: dict[str, Any], out: Console) -> None:
    """Shows what the function is besides its BARs: identity, interrupts, capabilities, parameters."""
    d = described
    out.print(f"{d['vendor_id']:04x}:{d['device_id']:04x} {d['doc']}", highlight=False, markup=False)
    facts = [f"class {d['class_code']:06x}", f"revision {d['revision']:02x}"]
    facts.append(f"subsystem {d['subsystem_vendor_id']:04x}:{d['subsystem_id']:04x}")
    facts += [f"interrupt pin INT{'ABCD'[d['interrupt_pin'] - 1]}"] if d["interrupt_pin"] else []
    facts += [f"expansion ROM of {d['rom']:#x} bytes"] if d["rom"] else []
    out.print(", ".join(facts), highlight=False)
    if d["capabilities"]:
        table = Table("capability", "kind", "id", "", box=None)
        for c in d["capabilities"]:
            width = 6 if c["extended"] else 4
            vectors = c.get("vectors")
            said = "" if vectors is None else "1 vector" if vectors == 1 else f"{vectors} vectors"
            if "table" in c:
                said += f"; table in BAR{c['bar']} at {c['table']:#x}, PBA at {c['pba']:#x}"
            table.add_row(c["name"], c["kind"], f"{c['id']:#0{width}x}", said)
        out.print()
        show(table, out)
    for c in d["capabilities"]:
        if c["kind"] == "VendorSpecific":  # the other kinds have the registers of their specification
            out.print()
            show(_registers(f"Registers of {c['name']}, offsets in the capability", 0, c["registers"]), out)
    if d["params"]:
        table = Table("parameter", "type", "default", "", box=None)
        for name, schema in d["params"].items():
            default = json.dumps(schema["default"]) if "default" in schema else "(required)"
            table.add_row(name, _type(schema), escape(default), escape(schema.get("description", "")))
        out.print()
        show(table, out)


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema's type in a word or two."""
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    kind = schema.get("type", "table")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _registers(title: str, at: int, registers: list[dict[str, Any]]) -> Table:
    """Registers with their fields; `at` is added to their offsets."""
    table = Table("offset", "bits", "name", "mode", "reset", "hooks", "", box=None, title=title)
    table.title_justify = "left"
    for r in registers:
        table.add_row(
            f"{at + r['offset']:#06x}",
            str(r["width"]),
            r["name"],
            "" if r["fields"] else r["mode"],  # with fields: that of bits without one
            f"{r['reset']:#0{r['width'] // 4 + 2}x}",
            ",".join(r["hooks"]),
            escape(r["doc"]),
        )
        for f in r["fields"]:
            bits = str(f["lo"]) if f["lo"] == f["hi"] else f"{f['hi']}:{f['lo']}"
            table.add_row("", bits, f"  .{f['name']}", f["mode"], "", "", escape(f["doc"]), style="dim")
            for v in f["values"]:
                said = f"{v['value']} {v['name']}" + (f": {v['doc']}" if v["doc"] else "")
                table.add_row("", "", "", "", "", "", escape(f"  {said}"), style="dim")
    return table
