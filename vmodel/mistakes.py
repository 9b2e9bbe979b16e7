"""Mistakes in a user's files, one line each: pydantic's errors, misspelt keys, exceptions in the user's own code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from vmodel.errors import ConfigError

Location = Sequence[int | str]


def where(location: Location) -> str:
    """The key at `location`, written as `device[0].params.lanes`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = part if re.fullmatch(r"[\w-]+", part) else short(part)
            text += f".{bare}" if text else bare
    return text


def short(value: object, limit: int = 60) -> str:
    """A value as text on one line, about as the user wrote it; cut at `limit` characters."""
    text = repr(value) if isinstance(value, str | int | float | dict | list) else str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def one_line(text: object) -> str:
    """A text on one line: each run of spaces and line ends becomes one space."""
    return " ".join(str(text).split())


def gist(text: object, limit: int = 300) -> str:
    """A text of a guest on one line, cut at `limit` characters, for a list in which each entry is a line or a few."""
    line = one_line(text)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _schema_at(location: Location, root: type[BaseModel]) -> type[BaseModel] | None:
    """The schema of the table that contains the key at `location`; None: there is no schema for it."""
    schema: type[BaseModel] = root
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = schema.model_fields.get(part)
        if field is None:
            return None
        # list[DeviceTable] and Table | None hold their schema as an argument.
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return None
        schema = inner
    return schema


def guess(word: str, known: Sequence[str]) -> str | None:
    """The known word most similar to `word`; None: none is similar."""
    return next(iter(difflib.get_close_matches(word, known, 1)), None)


def _as_example(location: Location, root: type[BaseModel]) -> str:
    schema = _schema_at(location, root)
    field = schema.model_fields.get(str(location[-1])) if schema else None
    if field is None:
        return ""
    if field.examples:
        return f", as {location[-1]} = {field.examples[0]}"
    return f" ({field.description})" if field.description else ""


#: Messages for pydantic's type errors, with TOML's names of the types.
_WANTED = {
    "string_type": "must be text in quotes",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "list_type": "must be an array",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
}


def _keys(location: Location, root: type[BaseModel]) -> set[str]:
    """The keys of the table at `location`; empty: it is not a table."""
    schema = _schema_at((*location, ""), root)
    return set() if schema is None else {field.alias or name for name, field in schema.model_fields.items()}


def _message(detail: Mapping[str, Any], root: type[BaseModel]) -> str:
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    if kind == "extra_forbidden":
        schema = _schema_at(location, root)
        known = sorted(field.alias or name for name, field in schema.model_fields.items()) if schema else []
        close = guess(str(location[-1]), known)
        return (
            f"unknown key: did you mean {close!r}?" if close else f"unknown key: known are {', '.join(known) or 'none'}"
        )
    if root.__name__ == "MachineFile" and location == ("machine",):
        wrong = "is missing" if kind == "missing" else short(value)
        return f'{wrong}: a machine file needs a [machine] table with name = "edu-demo"'
    if kind in ("list_type", "tuple_type") and len(location) == 1:
        return f"{short(value)}: must be written [[{location[0]}]], in two brackets, as there may be several"
    if kind == "missing":
        return f"is missing{_as_example(location, root)}"
    if kind in _WANTED:
        return f"{short(value)}: {_WANTED[kind]}{_as_example(location, root)}"
    text = one_line(detail["msg"].removeprefix("Value error, ")) or "is wrong"
    return f"{short(value)}: {text[0].lower()}{text[1:]}"


def explain(error: ValidationError, file: Path | str, root: type[BaseModel], prefix: str = "") -> Iterator[ConfigError]:
    """Yields a ConfigError for each mistake that pydantic found; `root`: the schema, `prefix`: the key of its table."""
    details = error.errors(include_url=False)
    guesses = set()
    for detail in details:
        if detail["type"] == "extra_forbidden" and (schema := _schema_at(detail["loc"], root)):
            guesses.add((*detail["loc"][:-1], guess(str(detail["loc"][-1]), list(schema.model_fields))))
    for detail in details:
        location = detail["loc"]
        if detail["type"] == "missing" and location in guesses:
            continue  # the key is there, but misspelt, which is reported already
        key, message = ".".join(part for part in (prefix, where(location)) if part), _message(detail, root)
        inner, colon, rest = one_line(detail["msg"].removeprefix("Value error, ")).partition(": ")
        if colon and detail["type"] == "value_error" and inner.partition("[")[0] in _keys(location, root):
            # A check of a whole table begins its message with the key concerned.
            key, message = f"{key}.{inner}" if key else inner, rest
        yield ConfigError(message, file=file, key=key)


def exception_line(error: BaseException) -> str:
    """An exception of the user's code as one line of text, with file name and line number."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        # Frames of importlib and of vmodel itself do not help the user.
        if file.is_file() and not file.is_relative_to(Path(__file__).parent):
            place = f" ({file.name} line {trace.tb_lineno})"
        trace = trace.tb_next
    try:
        said = one_line(error)
    except Exception:
        said = "its __str__ failed, too"
    return f"{type(error).__name__}: {said}{'' if isinstance(error, SyntaxError) else place}"
