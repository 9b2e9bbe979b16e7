"""A user's TOML file that is none: machine, plan and campaign files say so in the same words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmodel import machine
from vmodel.campaign import schema
from vmodel.config_file import MAX_SIZE, parse_toml, read_text
from vmodel.errors import ConfigError
from vmodel.inject import FaultPlan

LOADERS = {"machine": machine.load, "plan": FaultPlan.load, "campaign": schema.load}
Load = Callable[[Path], Any]


@pytest.fixture(params=LOADERS)
def load(request: pytest.FixtureRequest) -> Load:
    return LOADERS[request.param]


def said(load: Load, path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_files_that_are_not_regular(load: Load, tmp_path: Path) -> None:
    """A FIFO without a writer would block, /dev/zero never end."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")):
        assert said(load, path) == "cannot be read: is not a regular file"
    assert said(load, tmp_path) == "cannot be read: Is a directory"


def test_a_large_file(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_bytes(b"\n" * MAX_SIZE)
    assert len(read_text(path)) == MAX_SIZE
    os.truncate(path, 100 << 20)
    assert said(load, path) == "cannot be read: is larger than 4 MiB"


@pytest.mark.parametrize("digits", ["9" * 5000, f"-{'9' * 5000}", f"0x{'f' * 5000}", str(1 << 128)])
def test_a_long_integer(load: Load, digits: str, tmp_path: Path) -> None:
    """Python refuses to read, or to print, integers of more than 4300 digits."""
    path = tmp_path / "long.toml"
    path.write_text(f"[machine]\nmemory = {digits}\n[[device]]\nparams = {{ a = [{digits}] }}\n")
    assert said(load, path) == "has an integer of more than 128 bits"


def test_text_that_is_not_toml(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    for content, text in (
        (b"\n\xe4", "line 2: is not UTF-8 text: save the file as UTF-8"),
        (b"\nx = = 3", "line 2: 'x = = 3': is not valid TOML: invalid value"),
    ):
        path.write_bytes(content)
        assert said(load, path) == text


def test_what_editors_write(tmp_path: Path) -> None:
    path = tmp_path / "edited.toml"
    path.write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 0xFFFF_FFFF_FFFF_FFFF\r\n")
    assert parse_toml(read_text(path), path) == {"x": 1, "y": (1 << 64) - 1}


@pytest.mark.parametrize(
    ("start", "part"), [("", "a."), ("[", "a."), ("[[", "a."), ("x = { b = 1, ", '"a" . '), ("", "'a'\t.")]
)
def test_a_key_of_too_many_parts(start: str, part: str, tmp_path: Path) -> None:
    """tomllib takes memory by the square of their number: 20,000 took 2.4 GB."""
    with pytest.raises(ConfigError, match="is nested too deeply"):
        parse_toml(f"{start}{part * 20_000}z", tmp_path / "m.toml")
    assert len(str(parse_toml("a." * 100 + "z = 1", tmp_path / "m.toml"))) > 100
    assert parse_toml(f's = "{"a." * 1000}"', tmp_path / "m.toml") == {"s": "a." * 1000}
