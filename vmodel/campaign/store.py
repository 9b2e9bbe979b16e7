"""The store of a campaign's results: a folder with `campaign.db` (SQLite, one row for each run) and a folder per run.

A run's result and its folder are stored together when the run has ended.  If the process is killed before, neither is
there, and the run is repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeGuard

from pydantic import BaseModel, ValidationError

from vmodel.campaign import database
from vmodel.campaign.matrix import Run
from vmodel.campaign.rig import plain
from vmodel.closing import Closing
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.coverage_file import read_coverage
from vmodel.errors import ConfigError
from vmodel.experiment.case import Result
from vmodel.experiment.oracle import Outcome
from vmodel.mistakes import short

DATABASE = "campaign.db"
_LOCK = "lock"
#: The latest time that a row may have, in seconds since the epoch: the end of the year 9999.
_LATEST = 253402300799


class Definition(BaseModel):
    """What a campaign's folder says about itself."""

    kind: str
    name: str
    #: The text of the campaign's file.
    file: str = ""


@dataclass(frozen=True)
class Row:
    """One run, and its result if it has ended; `started` and `ended` are in seconds since the epoch."""

    id: int
    run: Run
    folder: Path
    deaths: int = 0
    result: Result | None = None
    guest: str = ""
    started: float | None = None
    ended: float | None = None

    @property
    def expected(self) -> bool:
        """Whether the run has ended with one of the acceptable outcomes, and with no DMA that is a failure."""
        if self.result is None or any(finding.oracle == "dma" for finding in self.result.evidence):
            return False
        return self.result.outcome in self.run.expect

    @property
    def injected(self) -> bool:
        """Whether a fault was injected; rules that only watch change nothing, and are none."""
        if self.result is None or not self.result.injected:
            return False
        rules = () if self.run.case.plan is None else self.run.case.plan.rule
        fired = [rule.get("fired", 0) for rule in self.result.rules]
        if len(fired) != len(rules):  # it is not known which rules did it
            return not rules or any(rule.do.name != "watch" for rule in rules)
        return any(count and rule.do.name != "watch" for rule, count in zip(rules, fired, strict=True))

    @property
    def coverage(self) -> Coverage | None:
        """What ran of the kernel code that its case names; each use reads the file.  None: nothing was kept.

        ConfigError: it is damaged.
        """
        name = self.result.artefacts.get("coverage") if self.result is not None else None
        return None if name is None else read_coverage(self.folder / name)


class ResultStore(Closing):
    """A campaign's folder; a context manager that closes it."""

    def __init__(self, folder: Path, opened: sqlite3.Connection, lock: int | None) -> None:
        self.folder = folder
        self._db = opened
        self._lock = lock

    # ---- opening ---------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, definition: Mapping[str, Any]) -> Self:
        """Opens a campaign's folder for writing; it is created if it does not exist.

        `definition`: plain data that describes the campaign; its "name" and "kind" must match the folder's.
        ConfigError: another process uses the folder, it belongs to another campaign, or it cannot be written.
        """
        path = folder / DATABASE
        try:
            begun = {_LOCK, *database.leftovers(path)}
            if folder.is_dir() and not path.exists() and any(f.name not in begun for f in folder.iterdir()):
                raise ConfigError(f"{folder}: is not a campaign's folder, and not empty: name another one with -o")
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(folder)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}: name another folder with -o") from error
        try:
            if not path.exists():
                database.make(path, definition)
            store = cls(folder, database.connect(path, write=True), lock)
            have = store.definition
            if [have.kind, have.name] != [definition["kind"], definition["name"]]:
                what = "search" if have.kind == "explore" else have.kind
                raise ConfigError(f"{folder}: belongs to the {what} {have.name!r}: name another folder with -o")
            store._put_meta("definition", dict(definition))
            store._update_keys()
        except BaseException:
            os.close(lock)
            raise
        store._remove_parts()  # of a process that was killed
        return store

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens a campaign's folder for reading, also while another process writes to it.

        ConfigError: it is not a campaign's folder, or was not made by this version of vmodel.
        """
        path = folder / DATABASE
        try:
            there = path.is_file()
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be read: {error.strerror}") from error
        if not there:
            raise ConfigError(f"{folder}: is not a campaign's folder: it has no {DATABASE}")
        return cls(folder, database.connect(path, write=False), None)

    def close(self) -> None:
        """Closes the database; after writing, removes what unfinished runs left, and releases the folder's lock."""
        self._db.close()
        if self._lock is not None:
            self._remove_parts()
            os.close(self._lock)
            self._lock = None

    # ---- definition ------------------------------------------------------------------------

    @property
    def definition(self) -> Definition:
        """The `definition` that was given to `create`.  ConfigError: it is damaged."""
        found = self._read("SELECT value FROM meta WHERE key = 'definition'")
        try:
            return Definition.model_validate_json(found[0][0] if found else "{}")
        except (ValidationError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.folder / DATABASE}: has no sound definition of the campaign") from error

    def _put_meta(self, key: str, value: Any) -> None:
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def _update_keys(self) -> None:
        """Recomputes the keys of all runs: an older vmodel may have written other ones, for a rig that was renamed."""
        with self._db:
            keys = [(row.run.key, row.id) for row in self.rows()]
            self._db.executemany("UPDATE OR IGNORE run SET key = ? WHERE id = ?", keys)

    # ---- runs ------------------------------------------------------------------------------

    def keep_only(self, runs: Sequence[Run]) -> None:
        """Deletes all runs that are not among `runs`.  ConfigError: one of them has ended, and would be lost."""
        keys = {run.key for run in runs}
        strangers = [row for row in self.rows() if row.run.key not in keys]
        if ended := [row for row in strangers if row.result is not None]:
            text = f"contains {len(ended)} run{'s' * (len(ended) != 1)} of another version of this campaign"
            raise ConfigError(
                f"{self.folder}: {text} (its file, a plan, a machine or a program has changed): name another folder"
                " with -o"
            )
        with self._db:
            self._db.executemany("DELETE FROM run WHERE id = ?", [(row.id,) for row in strangers])

    def reset_errors(self) -> None:
        """Marks runs that ended with a harness error as pending again."""
        with self._db:
            self._db.execute(
                "UPDATE run SET outcome = NULL, result = NULL, deaths = 0 WHERE outcome = ?", (Outcome.HARNESS.value,)
            )

    def add(self, runs: Sequence[Run]) -> list[int]:
        """Adds the runs that the store does not have yet; returns the ids of all of `runs`, in their order."""
        ids = []
        with self._db:
            for run in runs:
                self._db.execute("INSERT OR IGNORE INTO run (key, run) VALUES (?, ?)", (run.key, _text(run)))
                ids += self._db.execute("SELECT id FROM run WHERE key = ?", (run.key,)).fetchone()
        return ids

    def rows(self) -> list[Row]:
        """All runs, in the order in which they were added.  ConfigError: one is damaged, or from another version."""
        return [self._row(*values) for values in self._read(f"SELECT {_COLUMNS} FROM run ORDER BY id")]

    def row(self, id: int) -> Row:
        """One run.  ConfigError: there is no run of that number, or it is damaged."""
        values = self._read(f"SELECT {_COLUMNS} FROM run WHERE id = ?", id) if id < 1 << 63 else ()
        if not values:
            raise ConfigError(f"{self.folder}: has no run {short(id)}")
        return self._row(*values[0])

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of a query.  ConfigError: the database cannot be read."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise ConfigError(database.unreadable(self.folder / DATABASE, error)) from error

    def _row(
        self, id: object, run: object, deaths: object, result: object, guest: object, started: object, ended: object
    ) -> Row:
        # SQLite's columns take values of any type.
        if type(id) is not int or id < 1:
            raise ConfigError(f"{self.folder / DATABASE}: run {short(id)}: its number must be positive")
        if not (
            type(run) is str
            and type(deaths) is int
            and isinstance(result, str | None)
            and isinstance(guest, str | None)
            and _is_time(started)
            and _is_time(ended)
        ):
            raise ConfigError(f"{self.folder / DATABASE}: run {id} is damaged")
        try:
            what = Run.model_validate_json(run)
            came = None if result is None else Result.model_validate_json(result)
        except (ValidationError, ConfigError) as error:
            text = f"run {id} is damaged, or was written by another version of vmodel"
            raise ConfigError(f"{self.folder / DATABASE}: {text}") from error
        folder = self.folder / str(id)
        if came is not None:
            kept = {name: path for name, path in came.artefacts.items() if _is_inside(path, folder)}
            came = came.model_copy(update={"artefacts": kept})
        return Row(id, what, folder, deaths, came, guest or "", started, ended)

    def part(self, id: int) -> Path:
        """The path of a temporary folder for a run that starts; `finish` renames it."""
        return self.folder / f".part-{id}-{uuid.uuid4().hex[:8]}"

    def _remove_parts(self) -> None:
        """Deletes the folders of runs that did not finish."""
        for left in self.folder.glob(".part-*"):
            shutil.rmtree(left, ignore_errors=True)

    def died(self, id: int) -> int:
        """Counts the death of a worker during this run; returns the new count."""
        with self._db:
            self._db.execute("UPDATE run SET deaths = deaths + 1 WHERE id = ?", (id,))
        return int(self._db.execute("SELECT deaths FROM run WHERE id = ?", (id,)).fetchone()[0])

    def finish(self, id: int, part: Path, result: Result, guest: str, started: float) -> Row:
        """Stores a run's result, and renames `part` to the run's folder.

        `guest` identifies the guest that it ran in; `started` is in seconds since the epoch.
        """
        folder = self.folder / str(id)
        part.mkdir(exist_ok=True)
        if folder.exists():  # left by a process that was killed before it wrote the row
            shutil.rmtree(folder)
        part.rename(folder)
        artefacts = {name: _inside(path, part) for name, path in result.artefacts.items()}
        result = result.model_copy(update={"artefacts": artefacts})
        with self._db:
            self._db.execute(
                "UPDATE run SET outcome = ?, result = ?, guest = ?, started = ?, ended = ? WHERE id = ?",
                (result.outcome.value, result.model_dump_json(), guest, started, time.time(), id),
            )
        return self.row(id)


_COLUMNS = "id, run, deaths, result, guest, started, ended"


def find_run(path: Path) -> tuple[ResultStore, Row]:
    """The campaign and the run that the path FOLDER/NUMBER names; the caller closes the store.  ConfigError."""
    if not re.fullmatch("[0-9]{1,20}", path.name):
        example = "edu.runs/17"
        with contextlib.suppress(OSError):  # a name that is too long
            example = str(path / "17") if path.is_dir() else example
        raise ConfigError(f"{path}: must be a run's folder, as {example}")
    store = ResultStore.open(path.parent)
    with contextlib.ExitStack() as undo:
        undo.callback(store.close)
        row = store.row(int(path.name))
        undo.pop_all()
    return store, row


def history(rows: Sequence[Row], row: Row) -> Iterator[Row]:
    """The runs that were in the same guest before `row`, oldest first."""
    assert row.result is not None
    same = [r for r in rows if r.guest and r.guest == row.guest and r.result is not None]
    for other in sorted(same, key=lambda r: r.result.nth if r.result else 0):
        if other.result is not None and other.result.nth < row.result.nth:
            yield other


def _text(run: Run) -> str:
    return json.dumps({**run.model_dump(mode="json", exclude={"case"}), "case": plain(run.case)})


def _inside(path: str, folder: Path) -> str:
    """An artefact's path, relative to its run's folder if it is inside."""
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(folder))
    return path


def _is_time(value: object) -> TypeGuard[float | None]:
    return value is None or (type(value) is float and math.isfinite(value) and 0 <= value <= _LATEST)


def _is_inside(path: str, folder: Path) -> bool:
    """Whether an artefact is in its run's folder: a database from somebody else may name any path."""
    return ".." not in Path(path).parts and (folder / path).is_relative_to(folder)


def _locked(folder: Path) -> int:
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        process = os.pread(lock, 20, 0).decode(errors="replace").strip()
        os.close(lock)
        raise ConfigError(
            f"{folder}: process {process} is using it: wait for that process, or name another folder with -o"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock
