"""Reads TOML files that a user wrote: machines, plans, campaigns.  Each mistake is a ConfigError of one line."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from vmodel.errors import ConfigError
from vmodel.mistakes import one_line, short

#: The largest file, in bytes: a larger one is no file that somebody wrote.
MAX_SIZE = 4 << 20
#: The largest integer, in bits.  Python neither reads nor prints one of more than 4300 digits.
_MAX_BITS = 128


#: A key of more parts than anybody writes.  tomllib's memory grows with the square of their number.
_DEEP_KEY = re.compile(
    r"""(?:^|[\[{,])[ \t]*(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){400}""", re.MULTILINE | re.ASCII
)


def read_text(path: Path) -> str:
    """The text of a regular file of at most `MAX_SIZE` bytes of UTF-8; each line ends with "\\n".  ConfigError."""
    try:
        with open(path, "rb", opener=_opener) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError("cannot be read: is not a regular file", file=path)
            data = file.read(MAX_SIZE + 1)
        if len(data) > MAX_SIZE:
            raise ConfigError(f"cannot be read: is larger than {MAX_SIZE >> 20} MiB", file=path)
        # Some editors begin a file with a byte order mark.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line}: is not UTF-8 text: save the file as UTF-8", file=path) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=path) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _opener(path: str, flags: int) -> int:
    # Without O_NONBLOCK a FIFO that has no writer would block here.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def parse_toml(text: str, file: Path) -> dict[str, Any]:
    """The tables of a TOML text; `file` is for messages.  ConfigError."""
    if _DEEP_KEY.search(text):
        raise ConfigError("is nested too deeply", file=file)
    try:
        tables = tomllib.loads(text)
        _check_integers(tables)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax(str(error), text), file=file) from error
    except RecursionError as error:
        raise ConfigError("is nested too deeply", file=file) from error
    except ValueError as error:  # an integer that Python does not read
        raise ConfigError(f"has an integer of more than {_MAX_BITS} bits", file=file) from error
    return tables


def _check_integers(value: object) -> None:
    """ValueError: there is an integer of more than `_MAX_BITS` bits."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_integers(inner)
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError


def _syntax(message: str, text: str) -> str:
    """tomllib's message, preceded by the line number and the text of that line."""
    message = one_line(message)
    at = re.fullmatch(r"(.*) \(at (?:line ([0-9]+), column ([0-9]+)|end of document)\)", message)
    if at is None:
        return f"is not valid TOML: {message}"
    lines = text.splitlines() or [""]
    line = int(at[2] or len(lines))
    written = lines[line - 1].strip() if line <= len(lines) else ""
    return f"line {line}: {short(written)}: is not valid TOML: {at[1][0].lower()}{at[1][1:]}"
