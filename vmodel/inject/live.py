"""Commands of a running server's control socket for rules and injections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmodel.control import Command
from vmodel.errors import ConfigError
from vmodel.inject.engine import Engine
from vmodel.inject.terse import parse_rule


def commands(engine: Engine) -> dict[str, Command]:
    """The commands by name.  Each may raise ConfigError, whose text is for the user."""

    def add(request: Mapping[str, Any]) -> str:
        return engine.add(parse_rule(_text(request, "rule"), "rule"))

    def remove(request: Mapping[str, Any]) -> None:
        engine.remove(_text(request, "name"))

    def pause(request: Mapping[str, Any]) -> None:
        engine.pause(_text(request, "name") or None)

    def resume(request: Mapping[str, Any]) -> None:
        engine.pause(_text(request, "name") or None, False)

    def log(request: Mapping[str, Any]) -> list[dict[str, Any]]:
        since = request.get("since", 0)
        if not isinstance(since, int):
            raise ConfigError(f"since must be a number, not {since!r}")
        return engine.journal.since(since)

    return {
        "inject.add": add,
        "inject.list": lambda _: engine.describe(),
        "inject.remove": remove,
        "inject.pause": pause,
        "inject.resume": resume,
        "log": log,
    }


def _text(request: Mapping[str, Any], key: str) -> str:
    found = request.get(key, "")
    if not isinstance(found, str):
        raise ConfigError(f"{key} must be text, not {found!r}")
    return found
