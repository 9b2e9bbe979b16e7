"""Running tasks in parallel: the interface that local processes and a Dask cluster have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmodel.experiment.case import Case, Result


@dataclass(frozen=True)
class Task:
    """A case to run; its artefacts end up in `folder`."""

    id: int
    case: Case
    folder: Path


@dataclass(frozen=True)
class Answer:
    """The result of a task, or how its worker died."""

    task: Task
    result: Result | None
    #: The rig that ran the task: an id, unique among the rigs of a campaign.
    rig: str = ""
    #: How the worker died, for people.
    died: str = ""
    #: Whether a task whose worker died may be tried again.
    retry: bool = True


class Executor(Protocol):
    """Takes tasks, and returns answers in any order."""

    @property
    def free(self) -> int:
        """How many more tasks can be submitted now."""
        ...

    def submit(self, task: Task) -> None:
        """Starts a task."""
        ...

    def wait(self) -> Sequence[Answer]:
        """Blocks until at least one answer has arrived or a worker has changed state; returns the new answers.

        ConfigError: a rig found a mistake of the user's.  OSError: the disk of this host is full.
        """
        ...

    def close(self) -> None:
        """Ends the tasks that are running, as far as they can be reached."""
        ...
