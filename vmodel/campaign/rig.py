"""What carries out cases: guests (`vmodel.experiment.Rig`), or whatever a campaign's `rig` names."""

from __future__ import annotations

import platform
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from vmodel.errors import ConfigError
from vmodel.experiment.case import Case, Result
from vmodel.experiment.oracle import Effect, Finding, Outcome
from vmodel.machine.models import load_source
from vmodel.mistakes import exception_line, one_line

#: Cases run in stock guests.
GUESTS = "vmodel.experiment:Rig"


class Rig(Protocol):
    """Runs cases one after the other; a context manager that leaves nothing behind.

    What a case leaves in `folder`, which is there and empty, belongs to its run.  ConfigError: what the user wrote, or
    a file, is wrong, and no other case would fare better.  All else that goes wrong is a `Result`.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, case: Case, folder: Path) -> Result:
        """Runs one case."""
        ...


def absolute(name: str, base: Path) -> str:
    """A rig's name that means the same in every folder: "path/file.py:Class" counts from `base`."""
    source, _, kind = name.rpartition(":")
    return f"{(base / source).resolve()}:{kind}" if source.endswith(".py") else name


def load_rig(name: str) -> Callable[[], Rig]:
    """What makes the rig that "path/file.py:Class" or "package.module:Class" names.  ConfigError."""
    source, _, kind = name.rpartition(":")
    if not source or not kind.isidentifier():
        raise ConfigError(f'rig {name!r}: must be "path/file.py:Class" or "package.module:Class"')
    made: Callable[[], Rig] | None = getattr(load_source(f"rig {name!r}", source), kind, None)
    if not isinstance(made, type) or not callable(getattr(made, "run", None)):
        raise ConfigError(f"rig {name!r}: {kind} must be a class with a method run(case, folder) -> Result")
    return made


def perform(rig: Rig, case: Case, folder: Path) -> Result:
    """Runs a case, whatever the rig's own code does: its bugs are harness errors.  ConfigError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return rig.run(case, folder)
    except ConfigError:
        raise
    except Exception as error:
        text = traceback.format_exc()
        (folder / "traceback.txt").write_text(text)
        found = harness_error(case, "rig", exception_line(error))
        return found.model_copy(update={"artefacts": {"traceback": "traceback.txt"}})


def harness_error(case: Case, oracle: str, text: str) -> Result:
    """What there is to say of a case that no rig has brought to its end."""
    finding = Finding(
        oracle=oracle, effect=Effect.HARNESS, sign=oracle, text=one_line(text), signature=f"{oracle}: {one_line(text)}"
    )
    return Result(
        outcome=Outcome.HARNESS,
        evidence=(finding,),
        signatures=(finding.signature,),
        status=None,
        check_status=None,
        injected=0,
        injections=(),
        rules=(),
        time_to_detect=None,
        time_to_recover=None,
        workload_time=None,
        wall=0.0,
        artefacts={},
        versions=host_versions(),
        seed=case.seed,
    )


def host_versions() -> dict[str, str]:
    """Of vmodel and Python, here."""
    try:
        mine = version("vmodel")
    except PackageNotFoundError:
        mine = "from its source folder"
    return {"vmodel": mine, "python": platform.python_version()}


def plain(case: Case) -> dict[str, Any]:
    """A case as JSON has it; `Case.model_validate` takes it back."""
    return case.model_dump(mode="json", exclude_defaults=True)
