"""Progress of a running campaign: a bar in a terminal, else a line for each run."""

from __future__ import annotations

import sys
from collections import Counter
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from vmodel.campaign.store import Row
from vmodel.experiment.case import Result
from vmodel.experiment.oracle import Effect, Finding, Outcome
from vmodel.mistakes import gist

#: rich's style for each outcome.
STYLES = {
    Outcome.NOT_ACTIVATED: "dim",
    Outcome.MASKED: "cyan",
    Outcome.RECOVERED: "green",
    Outcome.FAILED: "yellow",
    Outcome.CORRUPTION: "bold magenta",
    Outcome.HANG: "bold yellow",
    Outcome.CRASH: "bold red",
    Outcome.HARNESS: "reverse",
}


class Reporter(Protocol):
    """The sink of a campaign's progress."""

    def total(self, done: int, of: int | None) -> None:
        """`done` of `of` runs have ended; None: nobody knows yet how many there will be."""

    def ended(self, row: Row) -> None:
        """One more run has ended."""

    def note(self, text: str) -> None:
        """A message for the user."""


class ProgressBar:
    """Reports progress on stderr; a context manager.  See Reporter."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._outcomes: Counter[Outcome] = Counter()
        self._done = 0
        self._of: int | None = 0
        self._progress: Progress | None = None
        if out.is_terminal:
            self._progress = Progress(
                # In a narrow terminal the outcomes are cut, not the numbers.
                BarColumn(bar_width=30),
                MofNCompleteColumn(table_column=Column(min_width=7, no_wrap=True)),
                TimeElapsedColumn(table_column=Column(min_width=7, no_wrap=True)),
                TimeRemainingColumn(table_column=Column(min_width=7, no_wrap=True)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=out,
            )
            self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def total(self, done: int, of: int | None) -> None:
        """See Reporter."""
        self._done, self._of = done, of
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=of)

    def ended(self, row: Row) -> None:
        """See Reporter."""
        assert row.result is not None
        self._done += 1
        outcome = row.result.outcome
        self._outcomes[outcome] += 1
        if self._progress is None:
            of = "" if self._of is None else f"/{self._of}"
            print(f"{self._done}{of} {line(row)}", file=sys.stderr, flush=True)
            return
        counts = ", ".join(f"[{STYLES[o]}]{n} {o.value}[/]" for o, n in sorted(self._outcomes.items(), key=_severity))
        self._progress.update(self._task, completed=self._done, description=counts)
        if not row.expected and outcome is not Outcome.NOT_ACTIVATED:
            self._progress.print(f"[{STYLES[outcome]}]{escape(line(row))}[/]", highlight=False)

    def note(self, text: str) -> None:
        """See Reporter."""
        if self._progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._progress.print(escape(text), highlight=False)


#: Outcomes whose own finding says more than the first one.  A hang's, or an error's, is no more than that it was one.
_OWN = {Outcome.CRASH: Effect.CRASH, Outcome.HARNESS: Effect.HARNESS}


def _severity(item: tuple[Outcome, int]) -> int:
    return list(Outcome).index(item[0])


def line(row: Row) -> str:
    """One line about a run that has ended."""
    assert row.result is not None
    run, result = row.run, row.result
    place = " ".join(part for part in (run.machine, run.kernel, run.workload) if part)
    why = f": {gist(_telling(result).text)}" if result.evidence and not row.expected else ""
    return f"{row.folder} {place} / {run.plan} / seed {run.seed}: {result.outcome.value}{why} ({result.wall:.1f} s)"


def _telling(result: Result) -> Finding:
    """The finding that says why the run ended so: of a crash the oops, not the time-out that came before it."""
    own = [finding for finding in result.evidence if _OWN.get(result.outcome) is finding.effect]
    return (own or result.evidence)[0]
