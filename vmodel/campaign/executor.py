"""What runs tasks side by side: what the processes of this machine and a Dask cluster have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmodel.experiment.case import Case, Result


@dataclass(frozen=True)
class Task:
    """A case to run; `folder` is where its artefacts are to be in the end."""

    id: int
    case: Case
    folder: Path


@dataclass(frozen=True)
class Answer:
    """What came of a task: a result, or how its worker died."""

    task: Task
    result: Result | None
    #: Which rig it was: unique, as long as that rig lives.
    rig: str = ""
    died: str = ""
    #: Whether it is worth another try.
    again: bool = True


class Executor(Protocol):
    """Takes tasks, gives answers in any order."""

    @property
    def free(self) -> int:
        """How many tasks it would take now."""
        ...

    def submit(self, task: Task) -> None:
        """Begins a task."""
        ...

    def wait(self) -> Sequence[Answer]:
        """Sleeps until something has happened; the answers that have come.

        ConfigError: a rig has found the user's mistake.
        """
        ...

    def close(self) -> None:
        """Ends what is under way, as far as it can be reached."""
        ...
