"""What a search has found and reached, as plain data: the content of its table and of its JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmodel.campaign.repeat import trusting
from vmodel.campaign.store import Row
from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.frontier import Untaken, untaken
from vmodel.coverage.registry import programs
from vmodel.experiment.oracle import Outcome
from vmodel.explore.against import Against
from vmodel.explore.explorer import Explorer, times
from vmodel.explore.finds import Find

#: The most branches of the frontier in a summary.
MOST_BRANCHES = 200


def document(explorer: Explorer, rows: list[Row], jobs: int, against: Against | None = None) -> dict[str, Any]:
    """The summary of a search; times in seconds.

    Plans are rules in the command line's form.  `reached` counts instructions; with `by_function` where the driver's
    code is known.
    """
    search = explorer.search
    what = explorer.what
    trust = trusting(rows)
    found: dict[str, Any] = {
        "kind": "explore",
        "machine": str(what.case.machine),
        "drivers": list(what.drivers),
        "seed": what.seed,
        "search": "feedback" if what.feedback else "random",
        "runs": len(explorer.growth),
        "all_runs": sum(row.result is not None for row in rows),
        "ended": explorer.ended,
        "harness_errors": [
            str(row.folder) for row in rows if row.result is not None and row.result.outcome is Outcome.HARNESS
        ],
        "sites": [{"site": str(site), "events": site.count} for site in explorer.sites],
        "found": [_find(find, find.shrunk.run in trust) for find in explorer.finds],
        "kept": [
            {
                "run": entry.attempt.number,
                "rules": [rule.text() for rule in entry.attempt.plan.rule],
                "how": entry.attempt.how,
                "parent": entry.attempt.parent,
                "new": len(entry.new),
            }
            for entry in (search.kept if search is not None else ())
        ],
        "reached": {
            "clean": len(explorer.clean),
            "all": len(explorer.code),
            "new": len(explorer.code - explorer.clean),
            "growth": explorer.growth,
            "last_new": max((n for n, new in enumerate(explorer.growth, 1) if new), default=0),
        },
        "time": {kind: round(seconds, 3) for kind, seconds in times(rows, explorer.elapsed, jobs).items()},
        "elapsed": round(explorer.elapsed, 3),
    }
    by_function, branches, note = _of_code(explorer, rows)
    found["reached"]["by_function"] = by_function
    found["branches"] = len(branches)
    found["frontier"] = branches[:MOST_BRANCHES]
    if note:
        found["note"] = note
    if against is not None:
        found["against"] = _against(explorer, rows, against)
    return found


def _find(find: Find, trust: bool) -> dict[str, Any]:
    """A find; `trust`: whether its run is repeated only with --trust."""
    return {
        "number": find.number,
        "outcome": find.outcome.value,
        "signature": find.signature,
        "text": find.text,
        "runs": find.runs,
        "first": str(find.first.folder),
        "rules": [rule.text() for rule in find.shrunk.plan.rule],
        "seed": find.shrunk.plan.seed,
        "minimal": find.shrunk.minimal,
        "again": sum(find.shrunk.again),
        "of": len(find.shrunk.again),
        "reproduce": str(find.first.folder.with_name(str(find.shrunk.run))),
        "trust": trust,
    }


def _against(explorer: Explorer, rows: Iterable[Row], other: Against) -> dict[str, Any]:
    """What this search and another store's runs have executed that the other has not; None: of other builds."""
    builds = other.other_builds(rows)
    lacks = {name for name, _ in explorer.code} - {name for name, _ in other.code}
    return {
        "folder": str(other.folder),
        "runs": other.runs,
        "all": len(other.code),
        "other_builds": builds,
        "lacks": sorted(lacks),
        "only_here": None if builds else len(explorer.code - other.code),
        "only_there": None if builds else len(other.code - explorer.code),
    }


def _of_code(explorer: Explorer, rows: Iterable[Row]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """What needs the driver's code: the functions with what was reached, the frontier, and why they are missing."""
    ids: dict[str, str] = {}
    for row in rows:
        if (coverage := row.coverage) is not None:
            ids.update(coverage.build_ids)
    if not ids:
        return [], [], "no coverage of a driver's code was recorded: functions and branches are unknown"
    by_function: list[dict[str, Any]] = []
    branches: list[Untaken] = []
    try:
        for module, build_id in sorted(ids.items()):
            program = programs.find(module, build_id)
            reached = {at for name, at in explorer.code if name == module and isinstance(at, int)}
            clean = {at for name, at in explorer.clean if name == module}
            for function in program.functions:
                by_function.append(
                    {
                        "module": module,
                        "function": function.name,
                        "instructions": len(function.addresses),
                        "clean": sum(address in clean for address in function.addresses),
                        "all": sum(address in reached for address in function.addresses),
                    }
                )
            branches += untaken(program, AddressSet(reached))
    except CoverageError as error:
        return [], [], str(error)
    branches.sort(key=lambda one: (-one.behind, one.module, one.address))
    return by_function, [_branch(one) for one in branches], ""


def _branch(one: Untaken) -> dict[str, Any]:
    return {
        "module": one.module,
        "function": one.function.name,
        "address": one.address,
        "to": one.to,
        "guard": one.guard,
        "behind": one.behind,
        "signs": list(one.signs),
    }
