"""Repeats one run exactly: the same case, with the same plan and seed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vmodel.campaign.matrix import LARGEST, digest, functions
from vmodel.campaign.rig import GUESTS, LASTING_GUESTS, CaseRunner, perform
from vmodel.campaign.store import Row
from vmodel.config_file import parse_toml, read_text
from vmodel.devices import BUILTIN
from vmodel.errors import ConfigError
from vmodel.experiment.case import Result
from vmodel.files import regular
from vmodel.guest.modules import is_path
from vmodel.guest.options import files_in


def code(row: Row) -> Iterator[str]:
    """What a run would execute or write on this host: imported Python, files that its devices write, modules that are
    built from their source or read from a path, QEMU's arguments.

    A campaign's folder names them, and may come from somebody else.  (Workloads run only in the guest.)
    ConfigError: the machine file cannot be read.
    """
    case = row.run.case
    if row.run.rig not in (GUESTS, LASTING_GUESTS):
        yield row.run.rig
    described = _described(row)
    devices = described.get("device", ())
    for device in devices if isinstance(devices, list) else ():
        model = device.get("model") if isinstance(device, dict) else None
        if isinstance(model, str) and model not in BUILTIN:
            yield model
        yield from _written(device)
    if case.plan is not None:
        yield from map(str, functions(case.plan))
    guest = described.get("guest")
    own = [_texts(guest, key) for key in ("modules", "extra_modules", "qemu_args")]
    yield from filter(is_path, (*case.modules, *case.extra_modules, *own[0], *own[1], *case.coverage))
    # A guest reads a shared folder, and may write to it.
    yield from (f"share {text}" for text in _texts(guest, "shares"))
    for arguments in (case.qemu_args, own[2]):
        if arguments:
            yield f"QEMU {' '.join(arguments)}"


def trusting(rows: Iterable[Row]) -> set[int]:
    """The ids of the runs that are repeated only with `--trust`: they, or others in their guest, name code (`code`).

    Runs whose machine file cannot be read are not among them, nor are those beyond the first 1,000 machines.
    """
    known: dict[tuple[object, ...], bool] = {}
    found, guests = set(), set()
    rows = list(rows)
    for row in rows:
        case = row.run.case
        plan = None if case.plan is None else tuple(functions(case.plan))
        key = (row.run.rig, case.machine, plan, case.modules, case.extra_modules, case.qemu_args, case.coverage)
        if key not in known and len(known) < 1000:
            known[key] = False
            with contextlib.suppress(ConfigError):
                known[key] = any(code(row))
        if known.get(key):
            found.add(row.id)
            guests.add(row.guest)
    return found | {row.id for row in rows if row.guest and row.guest in guests}


def _described(row: Row) -> dict[str, Any]:
    """The content of the run's machine file.  ConfigError: it cannot be read."""
    try:
        return parse_toml(read_text(row.run.case.machine), row.run.case.machine)
    except ConfigError as error:
        raise ConfigError(f"{row.folder}: its file {error}") from error


def _texts(table: object, key: str) -> list[str]:
    """The texts of an array in a table; [] if it is no table or no array."""
    found = table.get(key) if isinstance(table, dict) else None
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _written(value: object) -> Iterator[str]:
    """The files that a machine file's devices write: each `path` that is not read-only."""
    left = [value]  # no recursion: a key a.b.c... is nested as deep as it is long
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if isinstance(part.get("path"), str) and part.get("read_only") is not True:
                yield part["path"]
            left += reversed(part.values())
        elif isinstance(part, list):
            left += reversed(part)


def check_files(row: Row) -> None:
    """ConfigError: a file that the run reads is missing, or is none with an end: a FIFO or a device."""
    case = row.run.case
    guest = _described(row).get("guest")
    base = case.machine.parent
    named = [path[0] if isinstance(path, tuple) else path for path in case.files]
    named += [base / text.partition(":")[0] for text in _texts(guest, "files")]
    named += map(Path, filter(is_path, case.coverage))
    kernel = case.kernel or (guest.get("kernel") if isinstance(guest, dict) else None)
    if isinstance(kernel, str) and "/" in kernel:
        named.append(Path(kernel))
    for path in named:
        for file in files_in(path):
            _readable(row, file, regular, LARGEST)


def changed_inputs(row: Row) -> Iterator[str]:
    """The run's files whose contents have changed since the run.  ConfigError: one cannot be read."""
    for name, before in row.run.inputs.items():
        if _readable(row, Path(name), digest) != before:
            yield name


def _readable(row: Row, path: Path, read: Callable[..., Any], *arguments: object) -> Any:
    """`read(path, *arguments)`.  ConfigError: the file cannot be read."""
    try:
        return read(path, *arguments)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{row.folder}: its file {path} cannot be read: {why}") from error


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
