"""Repeats one run exactly: the same case, with the same plan and seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vmodel.campaign.matrix import digest
from vmodel.campaign.rig import Rig, perform
from vmodel.campaign.store import Row
from vmodel.errors import ConfigError
from vmodel.testing.case import Result


def changed_inputs(row: Row) -> Iterator[str]:
    """The run's files that are no longer what they were.  ConfigError: one is not there any more."""
    for name, before in row.run.inputs.items():
        try:
            if digest(Path(name)) != before:
                yield name
        except OSError as error:
            raise ConfigError(f"{row.folder}: its file {name} cannot be read: {error.strerror}") from error


def free_folder(wanted: Path) -> Path:
    """`wanted`, or with a number behind it if that is there; made."""
    for n in range(1, 10_000):
        folder = wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}: name another folder with -o") from error
        return folder
    raise ConfigError(f"{wanted}: is there, and 9999 more of it: name another folder with -o")


def repeat(rig: Rig, row: Row, folder: Path, before: list[Row]) -> Result:
    """Runs it again in `rig`, in the guest of the runs `before`, which are made first.  ConfigError."""
    for other in before:
        perform(rig, other.run.case, folder / f"before-{other.id}")
    return perform(rig, row.run.case, folder)


def differences(before: Result, now: Result) -> Iterator[str]:
    """What is not as it was, a line each; times differ always."""
    if before.outcome is not now.outcome:
        yield f"outcome: {before.outcome.value} -> {now.outcome.value}"
    for name in ("status", "check_status"):
        if (was := getattr(before, name)) != (is_ := getattr(now, name)):
            yield f"{name.replace('_', ' of ')}: {_shown(was)} -> {_shown(is_)}"
    for signature in before.signatures:
        if signature not in now.signatures:
            yield f"no longer seen: {signature}"
    for signature in now.signatures:
        if signature not in before.signatures:
            yield f"new: {signature}"
    was, is_ = [[rule.get("fired", 0) for rule in result.rules] for result in (before, now)]
    if was != is_:
        yield f"faults injected, by rule: {', '.join(map(str, was))} -> {', '.join(map(str, is_))}"
    for name in sorted({*before.versions, *now.versions}):
        if (old := before.versions.get(name, "none")) != (new := now.versions.get(name, "none")):
            yield f"{name}: {old} -> {new}"


def _shown(status: int | None) -> str:
    return "none" if status is None else str(status)
