"""How commands look: colours, several plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import in_terminal, vmodel

pytestmark = pytest.mark.slow


def test_no_color(tmp_path: Path) -> None:
    """https://no-color.org: no colours; and rich's bold is one of its attributes."""
    assert b"\x1b[32m" in in_terminal("doctor")
    shown = in_terminal("doctor", env={"NO_COLOR": "1"})
    assert b"ok" in shown and b"\x1b[" not in shown, shown


def test_several_plans(tmp_path: Path) -> None:
    for name, text in (("a", 'point = "dma.write"\ndo = "drop"'), ("b", 'point = "nope"'), ("c", "x = 1\ny = 2")):
        (tmp_path / f"{name}.toml").write_text(f"[[rule]]\n{text}\n")
    done = vmodel("plan", "check", "a.toml", "b.toml", "gone.toml", "c.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "a.toml: 1 rule, seed 0"
    lines = done.stderr.splitlines()
    assert all(line.startswith(("vmodel: b.toml: ", "vmodel: gone.toml: ", "vmodel: c.toml: ")) for line in lines), (
        lines
    )
    assert len({line.split(": ")[1] for line in lines}) == 3
    done = vmodel("plan", "check", "a.toml", "a.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("1 rule")) == (0, 2)
