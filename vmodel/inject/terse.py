"""Parses the command line's form of a rule: `dma.write device=nvme0 nth=3 do=partial(8)`."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from vmodel.errors import ConfigError
from vmodel.inject.plan import Rule
from vmodel.mistakes import explain

_SHAPE = 'must be a point and key=value pairs, as "dma.write device=edu0 nth=3 do=partial(8)"'


def parse_rule(text: str, what: str = "--fault") -> Rule:
    """The rule that a line describes; its keys are those of a plan's rules.

    `what` begins the text of errors.  ConfigError: one line for each mistake.
    """
    words = split(text)
    if not words or "=" in words[0].partition("(")[0]:
        raise ConfigError(f"{what} {text!r}: {_SHAPE}")
    raw: dict[str, Any] = {"point": words[0]}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key in raw:
            raise ConfigError(f"{what} {text!r}: {key} is given twice")
        if not equals and key != "once":
            raise ConfigError(f"{what} {text!r}: {word!r}: {_SHAPE}")
        raw[key] = value.strip("\"'") if equals else True
    try:
        return Rule.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(str(one) for one in explain(error, f"{what} {text!r}", Rule))) from error


def split(text: str) -> list[str]:
    """Splits a text at blanks outside of brackets."""
    words, word, depth = [], "", 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character.isspace() and depth <= 0:
            words.append(word)
            word = ""
        else:
            word += character
    return [word for word in [*words, word] if word]
