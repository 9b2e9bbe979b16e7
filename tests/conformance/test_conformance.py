"""What specifications ask of us, sentence by sentence, and the test of each.

One TOML file a specification: `title` and `source` (edition and where to read it), then rows:

    [[row]]
    section = "5.13.6.3.2"                                # a section of the specification
    says = "An unknown endpoint in ATTACH: NOENT"         # the sentence, in own words
    test = "tests/virtio/test_viommu.py::test_attach"     # or a list of them; Class::name for a method
    # or: not_applicable = "why no test of ours can look at it"

Test files are parsed, not imported: a table needs nothing built, and a row whose test was renamed is an error.
"""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLES = sorted(HERE.glob("*.toml"))


@cache
def names_in(path: Path) -> frozenset[str]:
    """Every `name` and `Class::name` that pytest collects from `path`."""
    return frozenset(names_of(ast.parse(path.read_text())))


def names_of(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if is_test(inner)}  # type: ignore[attr-defined]
        elif is_test(node):
            found.add(node.name)  # type: ignore[attr-defined]
        elif isinstance(node, ast.Assign):
            # A Hypothesis state machine: TestTree = Tree.TestCase.
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= {f"{name}::runTest" for name in names if name.startswith("Test")}
    return found


def is_test(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with one row, a line each."""
    found = []
    if unknown := set(row) - {"section", "says", "test", "not_applicable"}:
        found.append(f"unknown key {', '.join(sorted(unknown))}")
    if not re.fullmatch(r"[\w.]+", str(row.get("section", ""))):
        found.append("section is not like 5.13.6.3")
    if not isinstance(row.get("says"), str) or len(row["says"]) < 10:
        found.append("says what?")
    if ("test" in row) == ("not_applicable" in row):
        found.append("either test or not_applicable")
    elif "not_applicable" in row:
        if not isinstance(row["not_applicable"], str) or len(row["not_applicable"]) < 10:
            found.append("not_applicable needs a reason")
    else:
        tests = row["test"] if isinstance(row["test"], list) else [row["test"]]
        found += [] if tests else ["no test"]
        found += [line for test in tests for line in problems_of_test(test)]
    return found


def problems_of_test(test: object) -> list[str]:
    file, _, name = str(test).partition("::")
    if not file.startswith("tests/") or not (ROOT / file).is_file():
        return [f"{test}: no such file"]
    return [] if name in names_in(ROOT / file) else [f"{test}: no such test"]


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_each_row_has_its_test(table: Path) -> None:
    document = tomllib.loads(table.read_text())
    assert set(document) == {"title", "source", "row"}
    found = [
        f"row {number} ({row.get('section')}): {line}"
        for number, row in enumerate(document["row"], start=1)
        for line in problems(row)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_a_sentence_stands_once(table: Path) -> None:
    rows = [(row["section"], row["says"]) for row in tomllib.loads(table.read_text())["row"]]
    assert not {row for row in rows if rows.count(row) > 1}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({"test": ["tests/conformance/test_conformance.py::test_what_is_wrong_is_said"]}, None),
        ({"test": "tests/conformance/test_conformance.py::test_gone"}, "no such test"),
        ({"test": "tests/conformance/test_conformance.py::names_of"}, "no such test"),
        ({"test": "tests/conformance/test_gone.py::test_gone"}, "no such file"),
        ({"test": "pyproject.toml::test_gone"}, "no such file"),
        ({"test": []}, "no test"),
        ({"not_applicable": "there is a test, so which is it?"}, "either"),
        ({"section": "see above"}, "section"),
        ({"says": ""}, "says what"),
        ({"tests": "x"}, "unknown key tests"),
    ],
)
def test_what_is_wrong_is_said(changed: dict[str, Any], problem: str | None) -> None:
    row = {
        "section": "1.2.3",
        "says": "A sentence of it",
        "test": "tests/conformance/test_conformance.py::test_each_row_has_its_test",
    } | changed
    assert (problems(row) == []) if problem is None else (problem in "\n".join(problems(row)))


def test_a_reason_is_given() -> None:
    row = {"section": "1.2.3", "says": "A sentence of it", "not_applicable": "it is of drivers"}
    assert problems(row) == []
    assert problems(row | {"not_applicable": "no"}) == ["not_applicable needs a reason"]


def test_names_are_collected_as_pytest_does() -> None:
    source = "def test_a(): ...\nasync def test_b(): ...\nclass TestC:\n    def test_d(self): ...\n    x = 1\n"
    source += "class Other:\n    def test_e(self): ...\ndef helper(): ...\nTestTree = Tree.TestCase\n"
    assert names_of(ast.parse(source)) == {"test_a", "test_b", "TestC::test_d", "TestTree::runTest"}
