"""The lines of a guest kernel's log, as they come on a console or by `dmesg -r`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LINE = re.compile(r"^(?:<(\d+)>)?\[ *(\d+\.\d+)\](?:\[ *[CT]\d+\])? ?(.*)$")


@dataclass(frozen=True)
class Line:
    """A line of the log."""

    text: str
    #: The kernel's time, as it is written there; it tells equal lines apart.
    stamp: str = ""
    #: 0 (emergency) to 7 (debug); None where it is not known, as on a console.
    level: int | None = None
    #: When it came, in seconds.
    at: float | None = None
    #: "console" or "kernel log".
    oracle: str = "console"
    #: Whether a program has written it, and not the kernel.
    foreign: bool = False


def lines_of(text: str, oracle: str = "console") -> list[Line]:
    """The lines of a console or of `dmesg -r`; what has no time in front is no kernel's."""
    found = []
    for raw in text.replace("\r", "").split("\n"):
        if match := _LINE.match(raw):
            number = int(match[1]) if match[1] else None
            level = None if number is None else number & 7
            found.append(Line(match[3], match[2], level, None, oracle, number is not None and number >= 8))
    return found


def merged(console: Sequence[Line], log: Iterable[Line]) -> list[Line]:
    """A console's lines, whose arrival is known, and the log's, whose level is; each once, by the kernel's time."""
    lines = {(line.stamp, line.text): line for line in log}
    for line in console:
        known = lines.get((line.stamp, line.text))
        lines[line.stamp, line.text] = (
            line if known is None else Line(line.text, line.stamp, known.level, line.at, known.oracle, known.foreign)
        )
    return sorted(lines.values(), key=lambda line: float(line.stamp or 0))
