"""A coverage as tables for a terminal of 80 columns; what is too long is cut, and says by how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmodel.coverage.comparison import Comparison, FunctionRow, ModuleRow, Tally

#: Functions in the table of a module, and characters of the list of its functions that did not run.
_FUNCTIONS, _NAMES = 20, 6 * 76


def table(comparison: Comparison, limit: int = _FUNCTIONS) -> RenderableType:
    """For rich's console: all modules, then by module the functions that ran in part, and those that did not run.

    `limit`: the most functions of a module in its table, those with the most left to run first.  CoverageError: the
    coverages are of different builds.
    """
    parts: list[RenderableType] = [_modules(comparison)]
    for module in comparison.modules:
        if module.note:
            parts.append(Text(module.note))
        else:
            parts += [Text(note) for note in module.notes]
            parts += _functions(module, bool(comparison.faults), limit)
    return Group(*parts)


def _plain(*heads: str) -> Table:
    """A table without lines: its first column is text, which is cut if need be, the others are numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold", width=80)
    for n, head in enumerate(heads):
        if n == 0:
            made.add_column(head, overflow="ellipsis", no_wrap=True, ratio=1)
        else:
            made.add_column(head, justify="right", no_wrap=True)
    return made


def _modules(comparison: Comparison) -> Table:
    lines = any(module.lines for module in comparison.modules)
    heads = ["Module", "Functions", "Instructions reached"]
    made = _plain(*heads, *(["Lines"] if lines else []), *(["Faults only"] if comparison.faults else []))
    for module in comparison.modules:
        if module.note:
            continue
        row = [
            module.name,
            f"{module.functions_reached} of {len(module.functions)}",
            _of(module.instructions),
            *([_of(module.lines)] if lines else []),
            *([f"{module.instructions.faults:,}"] if comparison.faults else []),
        ]
        made.add_row(*map(Text, row))
    return made


def _of(tally: Tally | None) -> str:
    if tally is None:
        return "unknown"
    return f"{tally.reached:,} of {tally.total:,} {percent(tally)}"


def percent(tally: Tally) -> str:
    """The share that ran, as " 33 %"; 100 means all, and 0 none."""
    if not tally.reached:
        return "  0 %"
    return f"{max(int(tally.percent), 1):3} %"


def _functions(module: ModuleRow, faults: bool, limit: int) -> Iterator[RenderableType]:
    part = [row for row in module.functions if 0 < row.instructions.reached < row.instructions.total]
    part.sort(key=lambda row: (-row.instructions.never, row.name))
    none = [row for row in module.functions if not row.instructions.reached]
    whole = len(module.functions) - len(part) - len(none)
    if part:
        yield Text(f"\n{module.name}: functions that ran in part", style="bold")
        yield _in_part(part[:limit], bool(module.lines), faults)
        if len(part) > limit:
            yield Text(f"and {len(part) - limit} more", style="dim")
    if whole:
        yield Text(f"\n{module.name}: {_count(whole, 'function')} ran as a whole")
    if none:
        yield Text(f"\n{module.name}: {_count(len(none), 'function')} did not run", style="bold")
        yield Text(_names(sorted({row.name for row in none})))


def _in_part(rows: Sequence[FunctionRow], lines: bool, faults: bool) -> Table:
    heads = ["Function", "Instructions"]
    made = _plain(*heads, *(["Lines"] if lines else []), *(["Faults only"] if faults else []))
    for row in rows:
        file = f"  {PurePosixPath(row.place[0]).name}:{row.place[1]}" if row.place else ""
        cells = [
            _of(row.instructions),
            *([_of(row.lines)] if lines else []),
            *([f"{row.instructions.faults:,}"] if faults else []),
        ]
        made.add_row(Text.assemble(row.name, (file, "dim")), *map(Text, cells))
    return made


def _names(names: Sequence[str]) -> str:
    """As many names as fit, with how many are left."""
    shown: list[str] = []
    length = 0
    for name in names:
        if length + len(name) > _NAMES:
            return f"{', '.join(shown)} and {len(names) - len(shown)} more"
        shown.append(name)
        length += len(name) + 2
    return ", ".join(shown)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
