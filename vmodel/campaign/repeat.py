"""Repeats one run exactly: the same case, with the same plan and seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmodel.campaign.matrix import digest, functions
from vmodel.campaign.rig import GUESTS, CaseRunner, perform
from vmodel.campaign.store import Row
from vmodel.config_file import parse_toml, read_text
from vmodel.devices import BUILTIN
from vmodel.errors import ConfigError
from vmodel.experiment.case import Result


def code(row: Row) -> Iterator[str]:
    """What a run would execute or write on this host: imported Python, files that its devices write, QEMU's arguments.

    A campaign's folder names them, and may come from somebody else.  (Workloads run only in the guest.)
    ConfigError: the machine file cannot be read.
    """
    case = row.run.case
    if row.run.rig != GUESTS:
        yield row.run.rig
    try:
        described = parse_toml(read_text(case.machine), case.machine)
    except ConfigError as error:
        raise ConfigError(f"{row.folder}: its file {error}") from error
    devices = described.get("device", ())
    for device in devices if isinstance(devices, list) else ():
        model = device.get("model") if isinstance(device, dict) else None
        if isinstance(model, str) and model not in BUILTIN:
            yield model
        yield from _written(device)
    if case.plan is not None:
        yield from map(str, functions(case.plan))
    if case.qemu_args:
        yield f"QEMU {' '.join(case.qemu_args)}"


def _written(value: Any) -> Iterator[str]:
    """The files that a machine file's devices write: each `path` that is not read-only."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) and value.get("read_only") is not True:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _written(each)


def changed_inputs(row: Row) -> Iterator[str]:
    """The run's files whose contents have changed since the run.  ConfigError: one cannot be read."""
    for name, before in row.run.inputs.items():
        try:
            if digest(Path(name)) != before:
                yield name
        except OSError as error:
            raise ConfigError(f"{row.folder}: its file {name} cannot be read: {error.strerror}") from error


def free_folder(wanted: Path) -> Path:
    """Creates the folder `wanted`, or with a number appended if it exists ("a", "a-2").  ConfigError."""
    for n in range(1, 10_000):
        folder = wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}: name another folder with -o") from error
        return folder
    raise ConfigError(f"{wanted}: exists, and 9,998 numbered ones too: name another folder with -o")


def repeat(rig: CaseRunner, row: Row, folder: Path, before: list[Row]) -> Result:
    """Runs `row` again in `rig`, after the runs `before` in the same guest.  ConfigError: a mistake of the user's."""
    for other in before:
        perform(rig, other.run.case, folder / f"before-{other.id}")
    return perform(rig, row.run.case, folder)


def differences(before: Result, now: Result) -> Iterator[str]:
    """A line for each difference between two results.  Times are ignored, as they always differ."""
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
