"""An action as plans write it: "flip(bits=2)", or a table."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from vmodel.inject.action import Action
from vmodel.inject.actions import ACTIONS
from vmodel.mistakes import guess, one_line

_CALL = re.compile(r"([a-z][a-z0-9_-]*)(?:\((.*)\))?", re.DOTALL)


def parse(value: object) -> Action:
    """An action from "flip(2)", "flip(bits=2)", "drop", or a table { action = "flip", bits = 2 }.  ValueError."""
    if isinstance(value, Action):
        return value
    if isinstance(value, dict):
        given = {str(key): item for key, item in value.items()}
        name = given.pop("action", None)
        if not isinstance(name, str):
            raise ValueError('a table must name the action, as { action = "flip", bits = 2 }')
        kind = _kind(name)
    else:
        match = _CALL.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError('must be an action, as "drop", "flip(2)" or "partial(bytes=8)"')
        kind = _kind(match[1])
        given = _arguments(kind, match[2] or "")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            raise ValueError(f"{kind.name} has no {key!r}: write {kind.usage()}") from None
        if detail["type"] == "missing":
            raise ValueError(f"{kind.name} needs {key!r}: write {kind.usage()}") from None
        text = one_line(detail["msg"].removeprefix("Value error, ")).replace("Input should", "must")
        place = f"{kind.name}'s {key}" if key else kind.name
        raise ValueError(f"{place}: {text[:1].lower()}{text[1:]}") from None


def _kind(name: str) -> type[Action]:
    name = name.replace("_", "-")
    if name not in ACTIONS:
        close = guess(name, list(ACTIONS))
        hint = f"did you mean {close!r}? " if close else ""
        raise ValueError(f"there is no action {name!r}: {hint}Actions are {', '.join(sorted(ACTIONS))}")
    return ACTIONS[name]


def _arguments(kind: type[Action], text: str) -> dict[str, Any]:
    """The arguments in "8, ms=2", by position or by name."""
    given: dict[str, Any] = {}
    names = list(kind.model_fields)
    for n, part in enumerate(part for part in text.split(",") if part.strip()):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if n >= len(names):
                raise ValueError(f"{kind.name} takes at most {len(names)} arguments: write {kind.usage()}")
            key, value = names[n], key
        if key in given:
            raise ValueError(f"{kind.name} is given {key!r} twice")
        given[key] = value.strip("\"'")
    return given
