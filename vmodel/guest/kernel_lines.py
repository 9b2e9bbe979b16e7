"""The lines of a guest kernel's log, from a console or from `dmesg -r`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LINE = re.compile(r"^(?:<(\d+)>)?\[ *(\d+\.\d+)\](?:\[ *[CT]\d+\])? ?(.*)$")


@dataclass(frozen=True)
class Line:
    """A line of the log."""

    text: str
    #: The kernel's time stamp, as text; it distinguishes equal lines.
    stamp: str = ""
    #: 0 (emergency) to 7 (debug); None: unknown, as on a console.
    level: int | None = None
    #: The time of its arrival in seconds; None: unknown.
    at: float | None = None
    #: Its source: "console" or "kernel log".
    oracle: str = "console"
    #: Whether a program has written it to /dev/kmsg, and not the kernel.
    foreign: bool = False


def lines_of(text: str, oracle: str = "console") -> list[Line]:
    """The kernel's lines in the text of a console or of `dmesg -r`: those with a time stamp."""
    found = []
    for raw in text.replace("\r", "").split("\n"):
        if match := _LINE.match(raw):
            number = int(match[1]) if match[1] else None
            level = None if number is None else number & 7
            found.append(Line(match[3], match[2], level, None, oracle, number is not None and number >= 8))
    return found


def merged(console: Sequence[Line], log: Iterable[Line]) -> list[Line]:
    """The lines of a console, which have a time of arrival, and of the log, which have a level: merged, each line once.

    They are in the order of the kernel's time stamps.
    """
    lines = {(line.stamp, line.text): line for line in log}
    for line in console:
        known = lines.get((line.stamp, line.text))
        lines[line.stamp, line.text] = (
            line if known is None else Line(line.text, line.stamp, known.level, line.at, known.oracle, known.foreign)
        )
    return sorted(lines.values(), key=lambda line: float(line.stamp or 0))
