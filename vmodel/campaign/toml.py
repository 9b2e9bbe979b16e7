"""A plan as the text of a plan file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vmodel.inject import FaultPlan


def plan_text(plan: FaultPlan, *comments: str) -> str:
    """What `FaultPlan.parse` takes back; `comments` come first."""
    said = plan.plain()
    lines = [f"# {line}" for comment in comments for line in comment.splitlines()]
    if "seed" in said:
        lines.append(f"seed = {value(said['seed'])}")
    for rule in said["rule"]:
        lines += ["", "[[rule]]", *pairs(rule)]
    if "heal" in said:
        lines += ["", "[heal]", *pairs(said["heal"])]
    return "\n".join(lines) + "\n"


def pairs(table: Mapping[str, Any]) -> list[str]:
    """A table's lines."""
    return [f"{_key(key)} = {value(item)}" for key, item in table.items()]


def value(item: Any) -> str:
    """A value, as TOML writes it.  TypeError: it has no such."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int | float):
        return repr(item)
    if isinstance(item, str):
        # JSON's text is TOML's, but for DEL, which TOML does not have bare.
        return json.dumps(item).replace("\x7f", "\\u007f")
    if isinstance(item, list | tuple):
        return f"[{', '.join(map(value, item))}]"
    if isinstance(item, Mapping):
        return f"{{ {', '.join(pairs(item))} }}" if item else "{}"
    raise TypeError(f"TOML has no {type(item).__name__}")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
