"""Runs the pending runs of a store on an executor."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmodel.campaign.cluster import Cluster
from vmodel.campaign.executor import Answer, Executor, Task
from vmodel.campaign.progress import Reporter
from vmodel.campaign.rig import harness_error
from vmodel.campaign.store import ResultStore, Row
from vmodel.campaign.worker import Processes
from vmodel.files import append

#: How often the worker of one run may die until the run counts as a harness error.
MOST_DEATHS = 3


@contextmanager
def executor(rig: str, folder: Path, *, jobs: int = 1, scheduler: str | None = None) -> Iterator[Executor]:
    """`jobs` processes on this machine, or the Dask cluster at `scheduler`; closed on exit.  ConfigError."""
    made: Executor = Cluster(rig, scheduler) if scheduler else Processes(rig, jobs, append(folder / "workers.log"))
    try:
        yield made
    finally:
        made.close()


class Runner:
    """Runs a store's pending runs until all have ended."""

    def __init__(self, store: ResultStore, on: Executor, reporter: Reporter) -> None:
        self._store = store
        self._on = on
        self._reporter = reporter
        self._started: dict[int, float] = {}
        #: How many guests each rig has started.
        self._guests: dict[str, int] = {}

    def finish(self, on_row: Callable[[Row], None] = lambda row: None) -> None:
        """Runs all that have not ended; `on_row` is called for each as it ends.

        ConfigError: a mistake of the user's.  Runs that have ended by then are stored.
        """
        rows = self._store.rows()
        waiting = deque(row for row in rows if row.result is None)
        self._reporter.total(len(rows) - len(waiting), len(rows))
        self.feed(lambda: waiting.popleft() if waiting else None, on_row)

    def feed(self, following: Callable[[], Row | None], on_row: Callable[[Row], None] = lambda row: None) -> None:
        """Runs what `following` returns, until that is None and nothing is under way.

        `following` is called whenever a run can start; None: none can before another ends.  See `finish`.
        """
        again: deque[Row] = deque()
        under_way: dict[int, Row] = {}
        while True:
            while self._on.free > 0:
                row = again.popleft() if again else following()
                if row is None:
                    break
                under_way[row.id] = row
                self._started[row.id] = time.time()
                self._on.submit(Task(row.id, row.run.case, self._store.part(row.id)))
            if not under_way:
                return
            for answer in self._on.wait():
                row = under_way.pop(answer.task.id)
                ended = self._take(answer)
                if ended is None:
                    again.append(row)
                else:
                    self._reporter.ended(ended)
                    on_row(ended)

    def _take(self, answer: Answer) -> Row | None:
        """Stores the answer to a task; None: the task is to be tried again."""
        id, result = answer.task.id, answer.result
        if result is None:
            deaths = self._store.died(id)
            if answer.retry and deaths < MOST_DEATHS:
                self._reporter.note(f"run {id}: {answer.died}: trying again")
                return None
            result = harness_error(answer.task.case, "worker", answer.died)
        if result.nth == 1:
            self._guests[answer.rig] = self._guests.get(answer.rig, 0) + 1
        guest = f"{answer.rig}.{self._guests.get(answer.rig, 1)}" if answer.rig else ""
        return self._store.finish(id, answer.task.folder, result, guest, self._started[id])
