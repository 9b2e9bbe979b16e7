"""A rig runs cases: stock guests (`vmodel.experiment.Rig`), or the class that a campaign's `rig` names."""

from __future__ import annotations

import errno
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
#: The same, in guests that last longer.
LASTING_GUESTS = "vmodel.experiment:LastingRig"


class CaseRunner(Protocol):
    """Runs cases one after the other; a context manager that frees all resources on exit.

    `folder` exists and is empty; the files that a case writes there are the artefacts of its run.  ConfigError: the
    user's input or a file is wrong, so that all other cases would fail, too.  Every other failure is a `Result`.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, case: Case, folder: Path) -> Result:
        """Runs one case; its artefacts go to `folder`."""
        ...


def absolute(name: str, base: Path) -> str:
    """A rig's name with an absolute path: "path/file.py:Class" is relative to `base`."""
    source, _, kind = name.rpartition(":")
    return f"{(base / source).resolve()}:{kind}" if source.endswith(".py") else name


def load_rig(name: str) -> Callable[[], CaseRunner]:
    """The class that "path/file.py:Class" or "package.module:Class" names.  ConfigError: there is none, or no rig."""
    source, _, kind = name.rpartition(":")
    if not source or not kind.isidentifier():
        raise ConfigError(f'rig {name!r}: must be "path/file.py:Class" or "package.module:Class"')
    made: Callable[[], CaseRunner] | None = getattr(load_source(f"rig {name!r}", source), kind, None)
    if not isinstance(made, type) or not callable(getattr(made, "run", None)):
        raise ConfigError(f"rig {name!r}: {kind} must be a class with a method run(case, folder) -> Result")
    if not hasattr(made, "__enter__") or not hasattr(made, "__exit__"):
        raise ConfigError(f"rig {name!r}: {kind} must be a context manager, with __enter__ and __exit__")
    return made


def perform(rig: CaseRunner, case: Case, folder: Path) -> Result:
    """Runs a case in `rig`.  An exception of the rig is a harness error, with its traceback as an artefact.

    ConfigError: a mistake of the user's, as the rig reports it.  OSError: the disk is full, and so it would be for all
    other cases.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return rig.run(case, folder)
    except ConfigError:
        raise
    except Exception as error:
        if is_full(error):
            raise
        text = traceback.format_exc()
        (folder / "traceback.txt").write_text(text)
        found = harness_error(case, "rig", exception_line(error))
        return found.model_copy(update={"artefacts": {"traceback": "traceback.txt"}})


def is_full(error: Exception) -> bool:
    """Whether it says that a disk of this host is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def harness_error(case: Case, oracle: str, text: str) -> Result:
    """The result of a case that no rig could finish; `oracle` names the part that failed."""
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
    """The versions of vmodel and Python on this host."""
    try:
        mine = version("vmodel")
    except PackageNotFoundError:
        mine = "not installed (source folder)"
    return {"vmodel": mine, "python": platform.python_version()}


def plain(case: Case) -> dict[str, Any]:
    """A case as plain data for JSON; the inverse is `Case.model_validate`."""
    return case.model_dump(mode="json", exclude_defaults=True)
