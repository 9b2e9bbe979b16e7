"""docs/injection.md has every point, key and action, and its examples work."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from vmodel.inject import ACTIONS, FaultPlan, Match, Point, Rule

TEXT = (Path(__file__).parents[2] / "docs" / "injection.md").read_text()
FIRST_CELLS = " ".join(re.findall(r"^\| (`[^|]*) \|", TEXT, re.MULTILINE))


@pytest.mark.parametrize("point", Point)
def test_points(point: Point) -> None:
    assert f"| `{point.value}` | {point.doc} |" in TEXT


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_actions(name: str) -> None:
    """With its docstring, the only place where it is described."""
    usage, docstring = ACTIONS[name].usage(), inspect.getdoc(ACTIONS[name]) or ""
    summary = " ".join(docstring.split("\n\n")[0].split()).removesuffix(".")
    assert f"| `{usage}` | {summary} | " in TEXT, usage


def test_keys() -> None:
    named = set(re.findall(r"`(\w+)`", FIRST_CELLS))
    keys = {field.alias or name for name, field in Rule.model_fields.items()} - {"point", "name", "do"}
    assert keys - named == set()
    assert {field.alias or name for name, field in Match.model_fields.items()} <= keys | {"point"}


def test_the_plan() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    plan = FaultPlan.parse(text, Path("faults.toml"))
    (python,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    space: dict[str, object] = {}
    exec(python, space)
    by_hand = space["plan"]
    assert isinstance(by_hand, FaultPlan) and plan.plain() == by_hand.plain()
