"""The database of a campaign's folder: its tables, and how it is opened.

A folder may come from somebody else, so nothing in its database is believed: only vmodel's own tables are accepted, in
a file without loops, and reading it is bounded.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from vmodel.errors import ConfigError
from vmodel.patience import patience

#: The version of the tables below.
FORMAT = "1"
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE run (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    run TEXT NOT NULL,        -- JSON of `Run`
    deaths INTEGER NOT NULL DEFAULT 0,
    outcome TEXT,             -- null until it has ended
    result TEXT,              -- JSON of `Result`
    guest TEXT,               -- runs with the same value shared a guest, in the order of result.nth
    started REAL,
    ended REAL
);
"""
#: Steps of SQLite's machine for reading a database: a fixed number, and some for each byte.  A run takes about 30, and
#: more than 500 bytes.
_STEPS, _STEPS_PER_BYTE = 20_000_000, 1
#: How many steps SQLite makes between two calls of the handler.
_STRIDE = 100_000
#: The limit of a text in the database, in bytes.
_LONGEST = 1 << 28
#: The end of a rollback journal that names a second file, which SQLite deletes (SQLite's file format, 3: "The Rollback
#: Journal", super-journal).  vmodel's transactions have one file, so its journals never name another.
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")


def make(path: Path, definition: Mapping[str, Any]) -> None:
    """Creates a database under another name and renames it: it is complete, or does not exist."""
    new = _unfinished(path)
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    with closing(sqlite3.connect(new)) as database, database:
        database.executescript(_TABLES)
        database.execute("INSERT INTO meta VALUES ('format', ?)", (FORMAT,))
        database.execute("INSERT INTO meta VALUES ('definition', ?)", (json.dumps(dict(definition)),))
    new.rename(path)


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".new")


def leftovers(path: Path) -> set[str]:
    """The names of files that `make` leaves in a folder if it is interrupted, or the disk is full."""
    new = _unfinished(path)
    return {new.name, f"{new.name}-journal"}


def connect(path: Path, *, write: bool) -> sqlite3.Connection:
    """Opens a database.  If it is only read, all reading together is bounded; see `_STEPS`.

    ConfigError: it cannot be read, is damaged, or was not made by this version of vmodel.
    """
    _check_journal(path)
    try:
        # For reading, "ro": SQLite would otherwise follow what a journal says, and write to or delete files.
        mode = "rw" if write else "ro"
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=patience(30))
    except sqlite3.Error as error:
        raise ConfigError(unreadable(path, error)) from error
    try:
        _limit(database, path)
        _check(database, path)
    except BaseException as error:
        database.close()
        if isinstance(error, sqlite3.Error):
            raise ConfigError(unreadable(path, error)) from error
        raise
    if write:
        database.set_progress_handler(None, 0)
    return database


def unreadable(path: Path, error: sqlite3.Error) -> str:
    """The message for an error of SQLite."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_ROLLBACK:
        return f"{path}: cannot be read: a process died while it wrote there: continue the campaign first"
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
        return f"{path}: cannot be read: that takes more steps than a database of this size needs"
    return f"{path}: cannot be read: {error}"


def _check_journal(path: Path) -> None:
    """ConfigError: files beside the database are none of vmodel's; SQLite would wait for a FIFO, or delete a file."""
    journal = path.with_name(f"{path.name}-journal")
    try:
        if path.with_name(f"{path.name}-wal").exists():
            raise ConfigError(f"{path}-wal: is not a file of vmodel's")
        if journal.exists():
            if not journal.is_file():
                raise ConfigError(f"{journal}: is not a regular file")
            with journal.open("rb") as file:
                file.seek(-min(len(_SUPER_JOURNAL), journal.stat().st_size), 2)
                if file.read() == _SUPER_JOURNAL:
                    raise ConfigError(f"{journal}: is not a file of vmodel's: it names another file")
    except FileNotFoundError:  # another process has just ended its transaction
        pass
    except OSError as error:
        raise ConfigError(f"{journal}: cannot be read: {error.strerror}") from error


def _limit(database: sqlite3.Connection, path: Path) -> None:
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
    left = (_STEPS + _STEPS_PER_BYTE * path.stat().st_size) // _STRIDE

    def step() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    database.set_progress_handler(step, _STRIDE)


def _check(database: sqlite3.Connection, path: Path) -> None:
    """ConfigError: it has other tables, views or triggers than vmodel's, or is damaged."""
    if _schema(database) != _own_schema():
        raise ConfigError(f"{path}: was written by another program, or another version of vmodel")
    # It also finds pages that are used twice: with those, a small file has any number of rows.
    (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise ConfigError(f"{path}: is damaged: {' '.join(str(state).split())}")
    found = database.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    if found is None or found[0] != FORMAT:
        raise ConfigError(f"{path}: was written by another version of vmodel")


def _own_schema() -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(_TABLES)
        return _schema(database)


def _schema(database: sqlite3.Connection) -> list[tuple[object, ...]]:
    """All tables, indices, views and triggers (only the first ten), without comments and line ends."""
    found = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 10").fetchall()
    return sorted(
        (
            (*names, " ".join(re.sub(r"--[^\n]*", "", sql).split()) if isinstance(sql, str) else sql)
            for *names, sql in found
        ),
        key=repr,
    )
