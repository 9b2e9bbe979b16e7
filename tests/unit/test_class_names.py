"""One class name, one meaning: each class of vmodel has a name that no other has."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import vmodel

ROOT = Path(vmodel.__file__).parent

#: Names that several classes may have, and why.
SHARED = {
    "Params": "a model's or an IOMMU kind's nested `Params` is what the framework looks for",
    "Coverage": "devices that an IOMMU covers (`vmodel.iommu`), and code that ran (`vmodel.coverage`)",
    "Domain": "`_shim.Domain` is the C object's handle (vms_domain) and is never imported by its bare name",
}


def classes() -> dict[str, list[str]]:
    """Each class name, with the files and lines that define it."""
    found = defaultdict(list)
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(f"{file.relative_to(ROOT)}:{node.lineno}")
    return found


def test_a_class_name_is_defined_once() -> None:
    twice = {name: places for name, places in classes().items() if len(places) > 1 and name not in SHARED}
    assert not twice, "\n".join(f"{name}: {', '.join(places)}" for name, places in sorted(twice.items()))


def test_the_exceptions_are_needed() -> None:
    found = classes()
    assert [name for name in SHARED if len(found[name]) < 2] == []


def test_handles_of_the_shim_are_named_with_it() -> None:
    for file in sorted(ROOT.rglob("*.py")):
        if "_shim" in file.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vmodel._shim"):
                names = {alias.name for alias in node.names}
                assert not names & set(SHARED), f"{file.relative_to(ROOT)}:{node.lineno}: _shim.{names & set(SHARED)}"
