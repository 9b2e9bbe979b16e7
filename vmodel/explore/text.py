"""The summary of a search as text for a terminal of 80 columns."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vmodel.mistakes import gist

#: The most functions and branches that are listed; the JSON has all.
_MOST_FUNCTIONS, _MOST_BRANCHES = 10, 10
_WIDTH = 80
#: Why a search ended, after "it ended: ".
_ENDS = {
    "runs": "all plans of the budget were tried",
    "time": "the time of the budget is over",
    "exhausted": "all plans that it could think of were tried",
    "interrupted": "it was interrupted: the same command continues",
}


def text_of(document: Mapping[str, Any]) -> str:
    """The summary of a search, from `summary.document`."""
    parts = (_found, _reached, _functions, _frontier, _time)
    return "\n".join(line for part in parts for line in part(document)) + "\n"


def _wrapped(text: str, indent: str = "", more: str = "") -> list[str]:
    """A text in lines of at most 80 columns; `more`: before each line but the first."""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=more or indent, break_on_hyphens=False
    ) or [indent]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _found(document: Mapping[str, Any]) -> Iterator[str]:
    found: Sequence[Mapping[str, Any]] = document["found"]
    spent = _duration(document["elapsed"])
    how = "" if document["search"] == "feedback" else " of a random search"
    yield f"{_count(len(found), 'problem')} in {_count(document['runs'], 'plan')}{how}, {spent}"
    yield f"It ended: {_ENDS[document['ended']]}."
    if failed := document["harness_errors"]:
        yield from _wrapped(
            f"The harness failed in {_count(len(failed), 'run')}, which say{'s' * (len(failed) == 1)} nothing of the"
            f" driver: {failed[0]}{' is the first' if len(failed) > 1 else ''}. --retry repeats"
            f" {'it' if len(failed) == 1 else 'them'}."
        )
    for find in found:
        yield ""
        yield from _wrapped(f"{find['number']}. {find['outcome']}: {gist(find['text'])}", more="   ")
        for rule in find["rules"]:
            yield from _wrapped(rule, "     ", "       ")
        again = f"seen again in {find['again']} of {find['of']} runs" if find["of"] else "not repeated yet"
        size = "minimal" if find["minimal"] else "perhaps not minimal"
        yield from _wrapped(f"{size}, {again}; {_count(len(find['runs']), 'run')} of the search had it", "   ")
        yield f"   vmodel reproduce {shlex.quote(find['reproduce'])}{' --trust' if find['trust'] else ''}"


def _reached(document: Mapping[str, Any]) -> Iterator[str]:
    reached = document["reached"]
    yield ""
    yield from _wrapped(
        f"Reached {_count(reached['all'], 'instruction')}: {reached['clean']:,} without faults, and"
        f" {reached['new']:,} only under faults. The last new ones: plan {reached['last_new']} of {document['runs']}."
    )
    against = document.get("against")
    if against is not None:
        if builds := against["other_builds"]:
            said = f"not compared, as it has another build of {', '.join(builds)}"
        else:
            said = f"{against['only_here']:,} only here, {against['only_there']:,} only there"
        if (lacks := against["lacks"]) and not against["other_builds"]:
            said += f"; its runs kept no coverage of {', '.join(lacks)}"
        yield from _wrapped(f"Against the {_count(against['runs'], 'run')} of {against['folder']}: {said}.")
    if "note" in document:
        yield from _wrapped(document["note"])


def _functions(document: Mapping[str, Any]) -> Iterator[str]:
    functions: Sequence[Mapping[str, Any]] = document["reached"]["by_function"]
    if not functions:
        return
    yield ""
    yield f"{'module':24}{'instructions':>14}{'without faults':>16}{'with faults':>14}"
    for module in dict.fromkeys(one["module"] for one in functions):
        own = [one for one in functions if one["module"] == module]
        total, clean, all_ = (sum(one[key] for one in own) for key in ("instructions", "clean", "all"))
        yield f"{module[:24]:24}{total:14,}{clean / total:16.0%}{all_ / total:14.0%}"
    grown = sorted((one for one in functions if one["all"] > one["clean"]), key=lambda one: one["clean"] - one["all"])
    if grown:
        yield ""
        yield "Most of what only faults reached:"
    for one in grown[:_MOST_FUNCTIONS]:
        yield f"  {one['all'] - one['clean']:6,}  {one['function'][:50]} ({one['all']:,} of {one['instructions']:,})"


def _frontier(document: Mapping[str, Any]) -> Iterator[str]:
    branches: Sequence[Mapping[str, Any]] = document["frontier"]
    if not branches:
        return
    yield ""
    yield from _wrapped(
        f"The frontier: {document['branches']:,} branches of reached code only went one way; those with the most code"
        " behind them:"
    )
    for one in branches[:_MOST_BRANCHES]:
        signs = f" ({', '.join(one['signs'])})" if one["signs"] else ""
        yield from _wrapped(f"{one['function']}: {one['guard']}{signs}", f"  {one['behind']:6,}  ", " " * 10)


def _time(document: Mapping[str, Any]) -> Iterator[str]:
    parts = {kind: seconds for kind, seconds in document["time"].items() if seconds >= 0.05}
    total = sum(parts.values())
    if total:
        yield ""
        shares = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in parts.items())
        yield from _wrapped(f"Time of all workers: {_duration(total)}: {shares}.")


def _duration(seconds: float) -> str:
    """As "45 s", "12 min 3 s" or "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
