"""`vmodel schema`, and the page of keys that is made from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.cli.commands import ROOT, vmodel
from vmodel.cli.schema import SCHEMAS, FileKind
from vmodel.config_schema import json_schema
from vmodel.patience import patience

PAGE = ROOT / "docs" / "reference" / "machine-file.md"
BLOCK = re.compile(r"^```toml\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Fragments in documents need not have what a whole file needs.
WHOLE: dict[str, Any] = {
    "machine": {"machine": {"name": "x"}},
    "plan": {},
    "campaign": {"campaign": {"name": "x"}},
}


def kind_of(content: dict[str, Any]) -> FileKind | None:
    """What kind of file this is; None: none of vmodel's."""
    if "campaign" in content or "workload" in content:
        return FileKind.CAMPAIGN
    if "rule" in content or "heal" in content:
        return FileKind.PLAN
    return None if "project" in content or "tool" in content else FileKind.MACHINE


def texts() -> Iterator[tuple[str, str]]:
    for file in sorted((ROOT / "examples").rglob("*.toml")):
        yield str(file.relative_to(ROOT)), file.read_text()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for match in BLOCK.finditer(page.read_text()):
            line = page.read_text().count("\n", 0, match.start()) + 2
            yield f"{page.relative_to(ROOT)}:{line}", match[1]


def test_the_schemas_accept_all_examples() -> None:
    validators = {kind: Draft202012Validator(json_schema(root)) for kind, root in SCHEMAS.items()}
    seen = dict.fromkeys(SCHEMAS, 0)
    for place, text in texts():
        content = tomllib.loads(text)
        kind = kind_of(content)
        if kind is not None:
            seen[kind] += 1
            errors = [error.message for error in validators[kind].iter_errors({**WHOLE[kind], **content})]
            assert not errors, (place, errors)
    assert all(count >= 3 for count in seen.values()), seen


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("machine", '[machine]\nname = "a"\nmemroy = "1G"', "'memroy' was unexpected"),
        ("machine", '[machine]\nname = "1"', "does not match"),
        ("machine", "[machine]\nname = 1", "is not of type 'string'"),
        ("machine", "", "'machine' is a required property"),
        ("machine", '[machine]\nname = "a"\n[[device]]\nname = "b"\nmodel = "edu"', "'address' is a required property"),
        ("machine", '[machine]\nname = "a"\n[guest]\ncpus = 0', "less than the minimum"),
        ("plan", '[[rule]]\npoint = "dma"\ndo = "drop"', "is not one of"),
        ("plan", '[[rule]]\npoint = "irq"', "'do' is a required property"),
        ("campaign", "[[workload]]\nrun = 1", "is not of type 'string'"),
    ],
)
def test_the_schemas_refuse_mistakes(kind: str, text: str, said: str) -> None:
    validator = Draft202012Validator(json_schema(SCHEMAS[FileKind(kind)]))
    assert any(said in error.message for error in validator.iter_errors(tomllib.loads(text)))


@pytest.mark.parametrize("kind", FileKind)
def test_the_command_prints_a_schema(kind: str) -> None:
    done = vmodel("schema", kind)
    assert done.returncode == 0, done.stderr
    schema = json.loads(done.stdout)
    Draft202012Validator.check_schema(schema)
    for table in [schema, *schema["$defs"].values()]:
        for name, key in table.get("properties", {}).items():
            whole = table is schema and ("$ref" in key or "$ref" in key.get("items", {}))  # a table says it itself
            of_action = "action" in table["properties"]
            assert whole or of_action or "description" in key, (table.get("title"), name)
    # Examples are values, and right for their keys.
    for table in schema["$defs"].values():
        for name, key in table.get("properties", {}).items():
            validator = Draft202012Validator({**key, "$defs": schema["$defs"]})
            for example in key.get("examples", ()):
                assert validator.is_valid(example), (table.get("title"), name, example)


def test_another_kind_is_refused() -> None:
    done = vmodel("schema", "machin")
    assert done.returncode == 2 and "'machin' is not one of 'machine', 'plan', 'campaign'" in done.stderr


def test_the_page_of_keys_is_that_of_the_schema() -> None:
    script = Path("scripts") / "docs-schema.py"
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=patience(60), check=True
    )
    assert PAGE.read_text() == done.stdout, f"run: .venv/bin/python {script} > {PAGE.relative_to(ROOT)}"
