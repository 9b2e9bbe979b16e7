"""What a page's script shows of code: instructions by function and lines by file, packed and of bounded size."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from vmodel.coverage.comparison import Comparison, FunctionRow
from vmodel.coverage.line_table import Place
from vmodel.coverage.listing import shown
from vmodel.coverage.sources import Sources

#: The most instructions, which take 10 bytes each in a page, and characters of source, which take about one in four.
_INSTRUCTIONS, _SOURCE = 300_000, 8 << 20


def packed_code(
    comparison: Comparison, functions: Sequence[FunctionRow], listed: Sequence[str], sources: Sources
) -> str:
    """The code of `functions` and the source of the files `listed`, as JSON in zlib's format in base64.

    That is a fifth of its size, and no text that HTML would take for tags.  Functions that ran come first; those that
    would make the page too large are left out, and files' text is null.

    {"files": [[path, source's lines or null, {line: reach}]], "functions": {"MODULE/ADDRESS": [name, file or null,
    first line, last line, [[address, text, reach, file or -1, line]]]}, "faults": whether there are any}
    """
    numbers = {file: n for n, file in enumerate(listed)}
    known: dict[str, Any] = {}
    left = _INSTRUCTIONS
    for row in sorted(functions, key=lambda row: not row.instructions.reached):
        if len(row.function.instructions) <= left:
            left -= len(row.function.instructions)
            known[f"{row.module}/{row.function.address:x}"] = _function(comparison, row, numbers)
    found = {"files": _files(comparison, listed, sources), "functions": known, "faults": bool(comparison.faults)}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("utf-8", "replace"), 9)).decode()


def _function(comparison: Comparison, row: FunctionRow, numbers: dict[str, int]) -> list[Any]:
    program, places = comparison.programs[row.module], comparison.places(row.module)
    nowhere: Place = ("", 0)
    home = places.get(row.function.address, nowhere)[0]
    lines = set()
    rows = []
    for instruction in row.function.instructions:
        file, line = places.get(instruction.address, nowhere)
        if file == home:
            lines.add(line)
        reach = int(comparison.reach(row.module, instruction.address))
        rows.append([instruction.address, shown(program, instruction), reach, numbers.get(file, -1), line])
    extent = (min(lines), max(lines)) if lines and home else (0, 0)
    return [row.name, numbers.get(home), *extent, rows]


def _files(comparison: Comparison, listed: Sequence[str], sources: Sources) -> list[list[Any]]:
    left = _SOURCE
    found: list[list[Any]] = []
    for file in listed:
        text = sources.text(file) if left > 0 else None
        if text is not None:
            size = sum(len(line) + 4 for line in text)
            text, left = (text, left - size) if size <= left else (None, left)
        found.append([file, text, {line: int(reach) for line, reach in comparison.lines[file].items()}])
    return found
