"""Writes plans in the TOML of plan files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vmodel.inject import FaultPlan


def plan_text(plan: FaultPlan, *comments: str) -> str:
    """The text of a plan file, the inverse of `FaultPlan.parse`; `comments` are at the top."""
    content = plan.plain()
    lines = [f"# {line}" for comment in comments for line in comment.splitlines()]
    if "seed" in content:
        lines.append(f"seed = {value(content['seed'])}")
    for rule in content["rule"]:
        lines += ["", "[[rule]]", *pairs(rule)]
    if "heal" in content:
        lines += ["", "[heal]", *pairs(content["heal"])]
    return "\n".join(lines) + "\n"


def pairs(table: Mapping[str, Any]) -> list[str]:
    """The lines `key = value` of a table."""
    return [f"{_key(key)} = {value(item)}" for key, item in table.items()]


def value(item: Any) -> str:
    """A value in TOML's syntax.  TypeError: TOML has no such type."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int | float):
        return repr(item)
    if isinstance(item, str):
        # A JSON string is a TOML string, except for DEL, which TOML requires to be escaped.
        return json.dumps(item).replace("\x7f", "\\u007f")
    if isinstance(item, list | tuple):
        return f"[{', '.join(map(value, item))}]"
    if isinstance(item, Mapping):
        return f"{{ {', '.join(pairs(item))} }}" if item else "{}"
    raise TypeError(f"TOML has no {type(item).__name__}")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
