"""A coverage as JSON for tools; docs/coverage.md has the keys.  `VERSION` changes when a key changes its meaning."""

from __future__ import annotations

import json
from typing import Any

from vmodel.coverage.comparison import Comparison, FunctionRow, ModuleRow, Tally
from vmodel.coverage.frontier import Untaken

VERSION = 1


def document(comparison: Comparison) -> dict[str, Any]:
    """The content, as plain data: counts by module and function, faults, branches, and the exact sets."""
    return {
        "kind": "coverage",
        "version": VERSION,
        "title": comparison.title,
        "modules": [_module(module) for module in comparison.modules],
        "faults": [
            {
                "name": row.name,
                "reached": row.reached,
                "only": len(row.only),
                "functions": [{"module": m, "name": name, "only": count} for m, name, count in row.functions],
                "coverage": comparison.faults[row.name].to_json(),
            }
            for row in comparison.by_fault
        ],
        "growth": [{"run": name, "reached": reached} for name, reached in comparison.growth],
        "never_taken": [_untaken(branch, comparison) for branch in comparison.untaken],
        "coverage": comparison.clean.to_json(),
    }


def as_json(comparison: Comparison) -> str:
    """The same as text."""
    return json.dumps(document(comparison), indent=1, ensure_ascii=False) + "\n"


def _module(module: ModuleRow) -> dict[str, Any]:
    return {
        "name": module.name,
        "build_id": module.build_id,
        "notes": [*([module.note] if module.note else []), *module.notes],
        "instructions": _tally(module.instructions),
        "lines": _tally(module.lines),
        "functions": [_function(row) for row in module.functions],
    }


def _function(row: FunctionRow) -> dict[str, Any]:
    file, line = row.place or (None, None)
    return {
        "name": row.name,
        "section": row.function.section,
        "address": row.function.address,
        "file": file,
        "line": line,
        "instructions": _tally(row.instructions),
        "lines": _tally(row.lines),
    }


def _tally(tally: Tally | None) -> dict[str, int] | None:
    if tally is None:
        return None
    return {"total": tally.total, "clean": tally.clean, "only_faults": tally.faults, "never": tally.never}


def _untaken(branch: Untaken, comparison: Comparison) -> dict[str, Any]:
    file, line = comparison.places(branch.module).get(branch.to, (None, None))
    return {
        "module": branch.module,
        "function": branch.function.name,
        "address": branch.address,
        "to": branch.to,
        "taken": branch.taken,
        "guard": branch.guard,
        "behind": branch.behind,
        "signs": list(branch.signs),
        "file": file,
        "line": line,
    }
