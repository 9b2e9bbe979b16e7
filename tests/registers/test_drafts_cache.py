"""The cache of specifications that were read before: it never changes what `load` gives, only how long it takes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("systemrdl", reason="needs the extra `registers`")

from vmodel.errors import ConfigError
from vmodel.spec import drafts_cache, load, reading

CARD = '`include "part.rdl"\naddrmap card { part A @ 0; part B @ 4; };'
PART = 'reg part { field { desc = "a field"; } F[3:0] = 5; };'


class Children:
    """The child processes that were started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = 0
        self._run: Callable[..., Any] = subprocess.run
        monkeypatch.setattr(reading.subprocess, "run", self.run)

    def run(self, *arguments: Any, **more: Any) -> Any:
        self.started += 1
        return self._run(*arguments, **more)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Children:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Children(monkeypatch)


def write(path: Path, text: str, age: float = 100) -> Path:
    """A file as if it had been written `age` seconds ago."""
    path.write_text(text)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


@pytest.fixture
def card(tmp_path: Path) -> Path:
    write(tmp_path / "part.rdl", PART)
    return write(tmp_path / "card.rdl", CARD)


def entry(folder: Path) -> Path:
    (found,) = (folder / "cache/vmodel/specifications").iterdir()
    return found


def test_the_second_time_nothing_is_started(card: Path, children: Children) -> None:
    first, second = load(card), load(card)
    assert children.started == 1
    assert list(first.describe()) == list(second.describe()) and second.A.layout.F.doc == "a field"
    load(card, "card")
    assert children.started == 2, "it was asked for by another name"


@pytest.mark.parametrize("name", ["card.rdl", "part.rdl"])
def test_a_changed_file_is_read_again(name: str, card: Path, children: Children) -> None:
    load(card)
    old = (card.parent / name).read_text()
    write(card.parent / name, old.replace("card {", "card { part C @ 8;").replace("= 5", "= 6"))
    changed = load(card)
    expected = (["A", "B", "C"], 5) if name == "card.rdl" else (["A", "B"], 6)
    assert (list(changed.by_name), changed.A.reset) == expected
    write(card.parent / name, old)
    assert load(card).A.reset == 5
    assert children.started == 3
    (card.parent / "part.rdl").unlink()
    with pytest.raises(ConfigError, match=r"part\.rdl"):
        load(card)


def test_a_file_that_has_just_been_written_is_not_kept(card: Path, children: Children) -> None:
    """It might have been written once more while it was read."""
    write(card.parent / "part.rdl", PART, age=0)
    load(card)
    load(card)
    assert children.started == 2


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\0" + path.read_bytes()[-8:]),
    "no head": lambda path: path.write_bytes(path.read_bytes().partition(b"\n")[2]),
    "another head": lambda path: path.write_bytes(b"[1]\n" + path.read_bytes().partition(b"\n")[2]),
    "a short head": lambda path: path.write_bytes(b"{}\n" + path.read_bytes().partition(b"\n")[2]),
    "writable by others": lambda path: path.chmod(0o666),
    "a FIFO": lambda path: path.unlink() or os.mkfifo(path, 0o600),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_as_none(damage: str, card: Path, children: Children) -> None:
    load(card)
    DAMAGES[damage](entry(card.parent))
    assert load(card).B.offset == 4
    assert children.started == 2
    assert len(list((card.parent / "cache/vmodel/specifications").iterdir())) == 1


def test_a_symbolic_link_is_no_entry(card: Path, children: Children) -> None:
    load(card)
    path = entry(card.parent)
    path.rename(card.parent / "elsewhere")
    path.symlink_to(card.parent / "elsewhere")
    assert load(card).B.offset == 4
    assert children.started == 2


def test_without_a_cache(card: Path, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(card))  # a file
    assert load(card).B.offset == 4 == load(card).B.offset
    assert children.started == 2


def test_an_error_is_not_kept(card: Path, children: Children) -> None:
    write(card, "addrmap card {")
    for _ in range(2):
        with pytest.raises(ConfigError, match="line 1"):
            load(card)
    assert children.started == 2


def test_old_entries_go(card: Path, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_cache, "MOST", 2)
    for number in range(4):
        load(write(card.parent / f"card{number}.rdl", CARD))
    assert len(list((card.parent / "cache/vmodel/specifications").iterdir())) == 2
    load(card.parent / "card3.rdl")
    assert children.started == 4
