"""How commands look: colours, several plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE, ROOT, in_terminal, vmodel

pytestmark = pytest.mark.slow


def test_no_color(tmp_path: Path) -> None:
    """https://no-color.org: no colours; and rich's bold is one of its attributes."""
    assert b"\x1b[32m" in in_terminal("doctor")
    shown = in_terminal("doctor", env={"NO_COLOR": "1"})
    assert b"ok" in shown and b"\x1b[" not in shown, shown


GROUPS = ROOT / "examples" / "iommu-groups.toml"
#: Commands that end by themselves within seconds.
QUICK: list[list[str | Path]] = [
    [],
    ["--version"],
    ["--install-completion"],
    ["doctor"],
    ["devices"],
    ["regs", "edu"],
    ["groups", GROUPS],
    ["groups", GROUPS, "--json"],
    ["iommu", "show", EXAMPLE],
    ["kernels", "list"],
    ["plan", "check", ROOT / "examples" / "project" / "plan.toml"],
    ["schema", "plan"],
    ["campaign", ROOT / "examples" / "faults" / "campaign.toml", "--dry-run"],
    ["log", EXAMPLE],
    ["inject", "list", EXAMPLE],
    ["serve", "missing.toml"],
    ["nonsense"],
]


@pytest.mark.parametrize("command", QUICK, ids=lambda words: " ".join(getattr(word, "name", word) for word in words))
def test_no_style_is_escaped(tmp_path: Path, command: list[str | Path]) -> None:
    """Control characters of data are escaped; vmodel's own colours are not data."""
    env = {"HOME": str(tmp_path), "TERM": "xterm-256color", "SHELL": "/bin/bash"}
    shown = in_terminal(*command, env=env)
    assert shown and b"\\u001b" not in shown, shown


def test_groups_are_coloured() -> None:
    shown = in_terminal("groups", GROUPS, env={"TERM": "xterm-256color"})
    assert b"\x1b[1m0000:00:" in shown, shown


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
