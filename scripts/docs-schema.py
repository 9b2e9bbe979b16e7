"""Prints docs/reference/machine-file.md: every key of a machine file, from the schema of `vmodel schema machine`.

    .venv/bin/python scripts/docs-schema.py > docs/reference/machine-file.md

A test compares the page with what this prints (tests/cli/test_schema.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vmodel.campaign.toml import value as toml
from vmodel.config_schema import json_schema
from vmodel.devices import BUILTIN
from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.drivers import KINDS
from vmodel.machine import load_model
from vmodel.machine.schema import CapabilitiesTable, MachineFile
from vmodel.span import UNITS, Span

HEAD = """\
# Machine files

A machine file is TOML: the devices, bridges and IOMMUs that vmodel serves for one guest, and how guests are booted with
them. Every mistake in it is one line with file, key, value, and what is expected. The smallest:

```toml
[machine]
name = "edu-demo"

[[device]]
name = "edu0"
model = "edu"
address = "0000:00:03.0"
```

`[[...]]` may be there several times. The names of devices, bridges and IOMMUs are unique. Where a type is *size*, both
a number and text such as `"4K"`, `"512M"` or `"0x4000_0000"` are right. This page is made from the schema, which is
there for editors, too:

    vmodel schema machine > machine.schema.json

With [Taplo](https://taplo.tamasfe.dev) (the TOML extension of VS Code and others) the first line of a file names it,
and the editor then completes keys, shows this page's text, and marks mistakes:

```toml
#:schema ./machine.schema.json
```

`vmodel schema plan` and `vmodel schema campaign` do the same for [plans of faults](../injection.md) and
[campaigns](../campaigns.md).
"""
SIZE = ["integer", "string"]
NAMES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false", "object": "table"}


def type_of(schema: Mapping[str, Any]) -> str:
    """The type of a key's value, for people."""
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{toml(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_of(kind) for kind in schema["anyOf"]))
    if schema.get("type") == SIZE:
        return "size"
    if schema.get("type") == "array":
        items = schema.get("items", {})
        return "tables" if "$ref" in items else f"array of {type_of(items)}"
    if "$ref" in schema:
        return "table"
    name = NAMES[schema["type"]]
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum", schema.get("exclusiveMaximum", 1) - 1)
    if least is None or not most:
        return name
    return f"{name},{' more than' if 'exclusiveMinimum' in schema else ''} {least} to {most}"


def keys(schema: Mapping[str, Any], of_kind: bool = False) -> Iterator[str]:
    """A table of a schema's keys, in Markdown.  `of_kind`: their defaults are those of the IOMMU's kind."""
    yield "| key | type | default | example | |"
    yield "|---|---|---|---|---|"
    for name, key in schema["properties"].items():
        if name in schema.get("required", ()):
            default = "required"
        else:
            default = f"`{toml(key['default'])}`" if "default" in key else "" if of_kind else "none"
        example = f"`{toml(key['examples'][0])}`" if "examples" in key else ""
        yield f"| `{name}` | {type_of(key)} | {default} | {example} | {sentence(key['description'])} |"


def sentence(text: str) -> str:
    """A description as a cell."""
    return text.replace("|", "\\|")


def table_of(root: Mapping[str, Any], key: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Of a key that is a table, or an array of tables: the form of its header, and its schema."""
    brackets = "[[{}]]" if key.get("type") == "array" else "[{}]"
    reference = key.get("items", key)["$ref"]
    return brackets, root["$defs"][reference.rpartition("/")[2]]


def example(header: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """A table with all its keys, in TOML."""
    yield "```toml"
    yield header
    for name, key in schema["properties"].items():
        if "examples" in key:
            yield f"{name} = {toml(key['examples'][0])}"
    yield "```"


def capability(value: Any) -> str:
    """A value of `Capabilities`, as a cell."""
    if isinstance(value, frozenset):
        sizes = sorted(value)
        if sizes == [sizes[0] << n for n in range(len(sizes))] and len(sizes) > 3:
            if sizes[-1] == 1 << 63:
                return f"all from {size(sizes[0])} on"
            return f"all from {size(sizes[0])} to {size(sizes[-1])}"
        return ", ".join(map(size, sizes))
    if isinstance(value, Span):
        return str(value)
    return "all of `input_bits`" if value is None else json.dumps(value)


def size(number: int) -> str:
    """A number of bytes with its unit."""
    unit, factor = next((u, f) for u, f in sorted(UNITS.items(), key=lambda item: -item[1]) if not number % f)
    return f"{number // factor}{unit}"


def capabilities() -> Iterator[str]:
    """The capabilities by kind, in Markdown."""
    yield f"| | {' | '.join(KINDS)} |"
    yield "|---|" + "---|" * len(KINDS)
    for name in CapabilitiesTable.model_fields:
        values = [getattr(driver.default, name) for driver in KINDS.values()]
        cells = [size(v) if name == "max_memory" else capability(v) for v in values]
        yield f"| `{name}` | {' | '.join(cells)} |"
    assert set(CapabilitiesTable.model_fields) | {"reserved"} == set(Capabilities.__dataclass_fields__)


def params(title: str, model: Any) -> Iterator[str]:
    """The parameters of a kind of IOMMU or of a model, and of the tables in them."""
    schema = json_schema(model)
    yield f"\n**{title}**" + ("" if schema.get("properties") else ": none.")
    if schema.get("properties"):
        yield ""
        yield from keys(schema)
    for name, key in schema.get("properties", {}).items():
        arrays = [kind for kind in [key, *key.get("anyOf", ())] if "$ref" in kind.get("items", {})]
        for kind in arrays:
            yield f"\nEach of `{name}`:\n"
            yield from keys(table_of(schema, kind)[1])


def page() -> Iterator[str]:
    """The lines of the page."""
    yield HEAD
    root = json_schema(MachineFile)
    for name, key in root["properties"].items():
        brackets, schema = table_of(root, key)
        yield f"## `{brackets.format(name)}`\n"
        yield f"{schema['description']}\n"
        yield from keys(schema)
        yield ""
        yield from example(brackets.format(name), schema)
        yield ""
        for inner, key in schema["properties"].items():
            if "$ref" in key.get("items", key):
                brackets, below = table_of(root, key)
                yield f"### `{brackets.format(f'{name}.{inner}')}`\n"
                yield f"{below['description']}\n"
                yield from keys(below, inner == "capabilities")
                yield ""
                if inner == "capabilities":
                    yield "The defaults of the kinds:\n"
                    yield from capabilities()
                    yield ""
        if name == "iommu":
            yield "### `params` of an `[[iommu]]`"
            for kind, driver in KINDS.items():
                yield from params(kind, driver.Params)
            yield ""
        elif name == "device":
            yield "### `params` of a `[[device]]`\n"
            yield "Those of the built-in models; a model of your own declares its own ([Params](device.md))."
            for model in BUILTIN:
                yield from params(model, load_model(model).Params)
            yield ""


if __name__ == "__main__":
    print("\n".join(page()).rstrip())
