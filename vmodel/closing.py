"""Context managers that end by `close`, as in contextlib.closing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Self


def call_all(calls: Iterable[Callable[[], object]]) -> None:
    """Makes all calls, also after one that fails.  Its error is raised at the end, several as an ExceptionGroup."""
    errors: list[Exception] = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(error)
    try:
        if len(errors) > 1:
            raise ExceptionGroup(f"{len(errors)} calls failed", errors)
        if errors:
            raise errors[0]
    finally:
        errors = []  # no cycle of this frame and the errors


class Closing(ABC):
    """A context manager that is closed at the end of the block."""

    @abstractmethod
    def close(self) -> None:
        """Releases what the object holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Starting(Closing):
    """A context manager that is started at the beginning of the block, and closed at its end or if the start fails."""

    @abstractmethod
    def start(self) -> None:
        """Starts what the object stands for."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self
