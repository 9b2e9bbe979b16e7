"""A campaign's folder that comes from somebody else: whatever it says, the answer is one line, in bounded time.

Each test would otherwise have no end, a traceback, or an effect on this host.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import refused, vmodel
from vmodel.campaign.database import connect
from vmodel.campaign.matrix import Run
from vmodel.campaign.repeat import changed_inputs, check_files, code, trusting
from vmodel.campaign.report import FORMATS
from vmodel.campaign.rig import harness_error
from vmodel.campaign.store import ResultStore, Row, find_run
from vmodel.campaign.summary import Summary
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case
from vmodel.patience import patience

#: Time for what takes milliseconds, and must not be without end.
_LIMIT = 30.0


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """Ends this process if a test has no end: it may be in a call that nothing interrupts."""
    watchdog = threading.Timer(patience(_LIMIT), os._exit, (1,))
    watchdog.start()
    yield
    watchdog.cancel()


def made(folder: Path, *, inputs: Mapping[str, str] = {}, machine: str | Path = "m.toml", **case: Any) -> Path:
    """A campaign's folder with one run."""
    (folder / "m.toml").write_text('[machine]\nname = "m"\n[[device]]\nname = "a"\nmodel = "edu"\n')
    what = Case(machine=folder / machine, workload="true", name="c", **case)
    with ResultStore.create(folder / "x.runs", {"kind": "campaign", "name": "n", "file": ""}) as store:
        (id,) = store.add([Run(machine="m", kernel="", workload="w", plan="p", seed=0, case=what, inputs=dict(inputs))])
        store.finish(id, store.part(id), harness_error(what, "x", "x"), "", 1.0)
    return folder / "x.runs"


def changed(folder: Path, *statements: str) -> Path:
    """The same, after these statements."""
    made(folder)
    with closing(sqlite3.connect(folder / "x.runs" / "campaign.db")) as database:
        database.executescript(";".join(statements))
    return folder / "x.runs"


def reported(folder: Path) -> None:
    with ResultStore.open(folder) as store:
        for make in FORMATS.values():
            make(Summary(store, folder.parent))


def one_line(error: ConfigError, *parts: str) -> None:
    assert "\n" not in str(error) and all(part in str(error) for part in parts), str(error)


_ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
#: Without types of columns, which SQLite takes for any.
_UNTYPED = (
    "ALTER TABLE run RENAME TO r; CREATE TABLE run(id, key, run, deaths, outcome, result, guest, started, ended);"
    " INSERT INTO run SELECT {}, key, run, deaths, outcome, result, guest, started, ended FROM r; DROP TABLE r"
)


@pytest.mark.parametrize(
    "statements",
    [
        f"ALTER TABLE run RENAME TO r; CREATE VIEW run AS {_ENDLESS} SELECT x AS id, key, run, deaths, outcome, result,"
        " guest, started, ended FROM c, r",
        f"ALTER TABLE meta RENAME TO m; CREATE VIEW meta AS {_ENDLESS} SELECT key, value FROM m, c WHERE x < 0",
        "DROP TABLE run",
        "DROP TABLE meta",
        "CREATE TABLE more(x)",
        "CREATE TRIGGER t AFTER UPDATE ON run BEGIN DELETE FROM meta; END",
        "CREATE INDEX i ON run(started)",
        "ALTER TABLE run ADD COLUMN x AS (zeroblob(1000000000))",
        _UNTYPED.format("'../../../etc'"),
        _UNTYPED.format("'/etc'"),
        _UNTYPED.format("1"),
    ],
)
def test_tables_are_vmodels_own(tmp_path: Path, statements: str) -> None:
    folder = changed(tmp_path, statements)
    with pytest.raises(ConfigError) as raised:
        reported(folder)
    one_line(raised.value, f"{folder}/campaign.db: was written by another program, or another version of vmodel")
    with pytest.raises(ConfigError):
        ResultStore.create(folder, {"kind": "campaign", "name": "n"})


def test_comments_in_the_tables_do_not_matter(tmp_path: Path) -> None:
    """Older vmodels may have had others."""
    folder = changed(
        tmp_path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = replace(sql, 'until it has ended', 'before')",
        "PRAGMA writable_schema = OFF",
    )
    reported(folder)


@pytest.mark.parametrize(
    "value",
    [
        "'{not json'",
        "'[1]'",
        f"'{'[' * 100_000}'",
        f"""'{{"name": {"9" * 5000}, "kind": "campaign"}}'""",
        """'{"name": [1], "kind": {}}'""",
        """'{"name": "n"}'""",
        "x'ff00'",
        "3",
        "CAST(x'ff' AS TEXT)",
    ],
)
def test_definition(tmp_path: Path, value: str) -> None:
    folder = changed(tmp_path, f"UPDATE meta SET value = {value} WHERE key = 'definition'")
    with pytest.raises(ConfigError) as raised:
        reported(folder)
    one_line(raised.value, f"{folder}/campaign.db: ")
    with pytest.raises(ConfigError):
        ResultStore.create(folder, {"kind": "campaign", "name": "n"})


def test_without_a_definition(tmp_path: Path) -> None:
    folder = changed(tmp_path, "DELETE FROM meta WHERE key = 'definition'")
    with pytest.raises(ConfigError, match=r"campaign\.db: has no sound definition of the campaign"):
        reported(folder)


@pytest.mark.parametrize("column", ["run", "deaths", "result", "guest", "started", "ended"])
@pytest.mark.parametrize("value", ["'abc'", "x'ff00'", "9e999", "-9e999", "1e300", "-1", "CAST(x'ff' AS TEXT)"])
def test_types_of_columns(tmp_path: Path, column: str, value: str) -> None:
    """SQLite stores any type in any column ("Datatypes In SQLite", 2 and 3)."""
    folder = changed(tmp_path, f"UPDATE run SET {column} = {value}")
    if (column, value) in {("deaths", "-1"), ("guest", "'abc'")} or (column == "guest" and value[0] in "-19"):
        reported(folder)  # a guest may have any name
        return
    with pytest.raises(ConfigError) as raised:
        reported(folder)
    one_line(raised.value, f"{folder}/campaign.db: ")


@pytest.mark.parametrize("id", ["-1", "0"])
def test_numbers_of_runs(tmp_path: Path, id: str) -> None:
    folder = changed(tmp_path, f"UPDATE run SET id = {id}")
    with pytest.raises(ConfigError, match=rf"campaign\.db: run {id}: its number must be positive"):
        reported(folder)


@pytest.mark.parametrize("key", ["time_to_detect", "time_to_recover", "workload_time", "wall"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e300", "-1e300", "9" * 4000])
def test_durations(tmp_path: Path, key: str, number: str) -> None:
    made(tmp_path)
    folder = tmp_path / "x.runs"
    with closing(sqlite3.connect(folder / "campaign.db")) as database, database:
        result = json.loads(database.execute("SELECT result FROM run").fetchone()[0])
        text = json.dumps({**result, key: "@"}).replace('"@"', number)
        database.execute("UPDATE run SET result = ?", (text,))
    with pytest.raises(ConfigError) as raised:
        reported(folder)
    one_line(raised.value, f"{folder}/campaign.db: run 1 is damaged")


def test_a_number_that_no_run_has(tmp_path: Path) -> None:
    folder = made(tmp_path)
    for name in ("99999999999999999999", "9223372036854775808", "9223372036854775807", "0"):
        with pytest.raises(ConfigError, match=f"has no run {int(name)}"):
            find_run(folder / name)
    for name in ("9" * 5000, "\u0661", "x", "a" * 300):
        with pytest.raises(ConfigError, match="must be a run's folder"):
            find_run(folder / name)
    with pytest.raises(ConfigError, match="File name too long"):
        ResultStore.open(tmp_path / ("a" * 300))


def test_pages_that_are_used_twice(tmp_path: Path) -> None:
    """An inner page that names one child many times: a small file with any number of rows."""
    made(tmp_path)
    path = tmp_path / "x.runs" / "campaign.db"
    with closing(sqlite3.connect(path)) as database:
        for n in range(300):
            database.execute("INSERT INTO run (key, run, result) SELECT ?, run, result FROM run WHERE id = 1", (n,))
        database.commit()
        root, size = (
            database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'run'").fetchone()[0],
            database.execute("PRAGMA page_size").fetchone()[0],
        )
    data = bytearray(path.read_bytes())
    at = (root - 1) * size
    assert data[at] == 5, "an interior page of a table (SQLite's file format, 1.6)"
    count = int.from_bytes(data[at + 3 : at + 5])
    cells = [at + int.from_bytes(data[at + 12 + 2 * n :][:2]) for n in range(count)]
    assert count > 2
    for cell in cells[1:]:
        data[cell : cell + 4] = data[cells[0] :][:4]
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"campaign\.db: is damaged: "):
        reported(path.parent)


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = made(tmp_path) / "campaign.db"
    with closing(connect(path, write=False)) as database, pytest.raises(sqlite3.OperationalError, match="interrupted"):
        database.execute(f"{_ENDLESS} SELECT max(x) FROM c").fetchone()


def _journal(path: Path, victim: Path) -> None:
    """A rollback journal of a transaction that also had the file `victim` (SQLite's file format, 3)."""
    magic = bytes.fromhex("d9d505f920a163d7")
    head = magic + struct.pack(">IIIII", 0, 0, path.stat().st_size // 4096, 512, 4096)
    name = bytes(victim)
    tail = struct.pack(">I", 0x4000_0000 // 4096 + 1) + name + struct.pack(">II", len(name), sum(name)) + magic
    path.with_name("campaign.db-journal").write_bytes(head.ljust(512, b"\0") + tail)


def test_a_journal_that_names_another_file(tmp_path: Path) -> None:
    """SQLite would delete that file."""
    folder, victim = made(tmp_path), tmp_path / "victim"
    victim.write_text("precious")
    _journal(folder / "campaign.db", victim)
    for use in (ResultStore.open, lambda at: ResultStore.create(at, {"kind": "campaign", "name": "n"})):
        with pytest.raises(
            ConfigError, match=r"campaign\.db-journal: is not a file of vmodel's: it names another file"
        ):
            use(folder)
    assert victim.read_text() == "precious"


def test_a_journal_is_not_followed_for_reading(tmp_path: Path) -> None:
    folder = made(tmp_path)
    _journal(folder / "campaign.db", tmp_path / "x")
    journal = folder / "campaign.db-journal"
    journal.write_bytes(journal.read_bytes()[:512])
    with pytest.raises(ConfigError, match="a process died while it wrote there: continue the campaign first"):
        reported(folder)
    ResultStore.create(folder, {"kind": "campaign", "name": "n"}).close()
    reported(folder)


@pytest.mark.parametrize("suffix", ["-journal", "-wal"])
def test_fifos_beside_the_database(tmp_path: Path, suffix: str) -> None:
    folder = made(tmp_path)
    os.mkfifo(folder / f"campaign.db{suffix}")
    with pytest.raises(ConfigError, match="is not a"):
        reported(folder)


def test_the_lock_is_no_link(tmp_path: Path) -> None:
    """To continue a campaign writes to the lock's file."""
    folder, victim = made(tmp_path), tmp_path / "victim"
    victim.write_text("precious")
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(victim)
    with pytest.raises(ConfigError):
        ResultStore.create(folder, {"kind": "campaign", "name": "n"})
    assert victim.read_text() == "precious"


# ---- files that a run names ---------------------------------------------------------------------------


def the_row(folder: Path) -> Row:
    store, row = find_run(folder / "1")
    store.close()
    return row


@pytest.fixture
def endless(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A path that has no end, or never begins."""
    if request.param == "zero":
        return Path("/dev/zero")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


both = pytest.mark.parametrize("endless", ["zero", "fifo"], indirect=True)


@both
def test_machines_are_regular_files(tmp_path: Path, endless: Path) -> None:
    row = the_row(made(tmp_path, machine=endless))
    with pytest.raises(ConfigError, match=f"its file {endless}: cannot be read: is not a regular file"):
        list(code(row))


@both
def test_inputs_are_regular_files(tmp_path: Path, endless: Path) -> None:
    row = the_row(made(tmp_path, inputs={str(endless): "x"}))
    with pytest.raises(ConfigError, match=f"its file {endless} cannot be read: is not a regular file"):
        list(changed_inputs(row))


@both
def test_files_for_the_guest_are_regular(tmp_path: Path, endless: Path) -> None:
    for more in ({"files": (endless,)}, {"files": ((endless, "/x"),)}, {"kernel": str(endless)}):
        folder = tmp_path / next(iter(more)) / str(len(list(tmp_path.iterdir())))
        folder.mkdir(parents=True)
        row = the_row(made(folder, **more))
        with pytest.raises(ConfigError, match=f"its file {endless} cannot be read: is not a regular file"):
            check_files(row)
    made(tmp_path)
    for line in (f'files = ["{endless}:/x"]', f'kernel = "{endless}"'):
        (tmp_path / "m.toml").write_text(f"[guest]\n{line}\n")
        with pytest.raises(ConfigError, match="is not a regular file"):
            check_files(the_row(tmp_path / "x.runs"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = " + "[" * 20_000 + "]" * 20_000, "is nested too deeply"),
        ("a = " + "9" * 5000, "has an integer of more than 128 bits"),
        ("#" * (4 << 20) + "\n", "is larger than 4 MiB"),
        ("\0", "is not valid TOML"),
    ],
)
def test_machine_files_are_bounded(tmp_path: Path, text: str, says: str) -> None:
    folder = made(tmp_path)
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        list(code(the_row(folder)))
    one_line(raised.value, f"{folder}/1: its file {tmp_path}/m.toml", says)


def test_a_file_that_is_larger_than_it_says(tmp_path: Path) -> None:
    """/proc has regular files of 0 bytes with contents; the limit counts what is read."""
    row = the_row(made(tmp_path, inputs={"/proc/self/status": "x", str(tmp_path / "m\0"): "x"}))
    found = changed_inputs(row)
    assert next(found) == "/proc/self/status"
    with pytest.raises(ConfigError, match="cannot be read: "):
        next(found)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="is larger than 4,294,967,295 bytes"):
        list(changed_inputs(Row(1, row.run.model_copy(update={"inputs": {str(tmp_path / "sparse"): "x"}}), tmp_path)))


def test_keys_that_are_nested_as_deep_as_they_are_long(tmp_path: Path) -> None:
    """Whatever depth can be read can be looked through."""
    folder = made(tmp_path)
    for depth in (300, 700, 900, 20_000):
        (tmp_path / "m.toml").write_text(f'[[device]]\nmodel = "edu"\n{"a." * depth}path = "/etc/x"\n')
        try:
            assert list(code(the_row(folder))) == ["/etc/x"]
        except ConfigError as error:
            assert depth > 300
            one_line(error, "is nested too deeply")


@pytest.mark.parametrize(
    ("guest", "case", "named"),
    [
        ('modules = ["driver/", "nvme"]', {}, ["driver/"]),
        ('extra_modules = ["x.ko"]', {}, ["x.ko"]),
        ('qemu_args = ["-monitor", "stdio"]', {}, ["QEMU -monitor stdio"]),
        ("modules = 3\nqemu_args = [[1]]", {}, []),
        ("", {"modules": ("nvme", "/tmp/driver/")}, ["/tmp/driver/"]),
        ("", {"extra_modules": ("/x.ko",)}, ["/x.ko"]),
    ],
)
def test_what_the_guest_is_booted_with(tmp_path: Path, guest: str, case: dict[str, Any], named: list[str]) -> None:
    """The source of a module is built on this host, by its own Makefile."""
    folder = made(tmp_path, **case)
    (tmp_path / "m.toml").write_text(f'[guest]\n{guest}\n[[device]]\nmodel = "edu"\n')
    row = the_row(folder)
    assert list(code(row)) == named
    assert trusting([row]) == ({1} if named else set())
    with ResultStore.open(folder) as store:
        (run,) = Summary(store, tmp_path).runs
    assert run.command == f"vmodel reproduce {folder}/1{' --trust' if named else ''}"


# ---- as a user meets them -----------------------------------------------------------------------------


@pytest.mark.slow
def test_commands(tmp_path: Path) -> None:
    folder = made(tmp_path, machine="/dev/zero")
    assert refused(vmodel("reproduce", folder / "1")) == (
        f"{folder}/1: its file /dev/zero: cannot be read: is not a regular file"
    )
    assert refused(vmodel("reproduce", folder / "99999999999999999999")) == f"{folder}: has no run {10**20 - 1}"
    assert vmodel("report", folder).returncode == 0, "a report needs no machine file"
    (tmp_path / "b").mkdir()
    changed(tmp_path / "b", "DROP TABLE run")
    assert refused(vmodel("report", tmp_path / "b" / "x.runs")).endswith("another version of vmodel")
