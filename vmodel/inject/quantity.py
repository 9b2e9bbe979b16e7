"""Parses numbers in plans: times, counts, and spans of addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from vmodel.span import Span, number

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(us|ms|s|min)")


def seconds(value: object) -> float:
    """A time in seconds: 1.5, "1.5s", "250ms", "10us", "2min".  ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    elif isinstance(value, str) and (match := _TIME.fullmatch(value.strip())):
        found = float(match[1]) * _UNITS[match[2]]
    elif isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value.strip()):
        found = float(value)
    else:
        raise ValueError('must be a time, as 1.5 (seconds), "1.5s", "250ms", "10us" or "2min"')
    if not 0 <= found < 1e9:
        raise ValueError("must be at least 0 and less than 1e9 seconds")
    return found


def span(value: object) -> Span:
    """A span of numbers, the last one inclusive: "0x1000-0x1fff", "0x1000+4K", [4096, 8191], or one number.

    ValueError.
    """
    if isinstance(value, Span):
        return value
    try:
        if isinstance(value, list | tuple) and len(value) == 2:
            first, last = number(value[0]), number(value[1])
        elif isinstance(value, str) and "-" in value:
            low, _, high = value.partition("-")
            first, last = number(low), number(high)
        elif isinstance(value, str) and "+" in value:
            low, _, size = value.partition("+")
            first = number(low)
            last = first + number(size) - 1
        else:
            first = last = number(value)
        return Span(first, last)
    except ValueError:
        text = 'must be a number, "0x1000-0x1fff" (the last one included), "0x1000+4K", or [first, last]'
        raise ValueError(text) from None


def numbers(value: object) -> tuple[int, ...]:
    """One number or several: 3, "0x10", [1, 2], "1,2".  ValueError."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        value = [value]
    if not value:
        raise ValueError("must be a number, or several as [1, 2]")
    return tuple(number(part) for part in value)


def words(value: object) -> tuple[str, ...]:
    """One name or several: "edu0", ["edu0", "edu1"], "edu0,edu1".  ValueError."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError('must be a name, or several as ["edu0", "edu1"]')
    return tuple(v.strip() for v in value)


def flag(value: object) -> object:
    """Converts "true", "false" and "" (a key without value, which is true) to bool; other values are unchanged."""
    return {"true": True, "false": False, "": True}.get(value, value) if isinstance(value, str) else value


def _one_or_many(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def _span_text(found: Span) -> Any:
    return found.start if found.start == found.last else f"{found.start:#x}-{found.last:#x}"


def _schema(text: str, *types: str) -> WithJsonSchema:
    return WithJsonSchema({"type": list(types), "description": text})


def _from(read: Callable[[object], object]) -> BeforeValidator:
    return BeforeValidator(read)


Seconds = Annotated[float, _from(seconds), _schema("seconds, or text with us, ms, s or min", "number", "string")]
Number = Annotated[int, _from(number), _schema("a number, or text as 0x10 or 4K", "integer", "string")]
SpanOf = Annotated[
    Span,
    _from(span),
    PlainSerializer(_span_text),
    _schema('a number, "0x1000-0x1fff", "0x1000+4K" or [first, last]', "integer", "string", "array"),
]
Numbers = Annotated[
    tuple[int, ...],
    _from(numbers),
    PlainSerializer(_one_or_many),
    _schema("a number, or an array of numbers", "integer", "string", "array"),
]
Words = Annotated[
    tuple[str, ...],
    _from(words),
    PlainSerializer(_one_or_many),
    _schema('a name, with "*" for anything, or an array of names', "string", "array"),
]
Flag = Annotated[bool, _from(flag)]
