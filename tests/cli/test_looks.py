"""How commands look: colours, several plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE, ROOT, in_terminal, vmodel
from vmodel.cli import bench
from vmodel.cli.bench import Figure

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


@pytest.mark.parametrize("model", ["edu", "nvme"])
def test_80_columns_lose_nothing(model: str) -> None:
    """Text folds into more lines; figures and names stay whole."""
    env = {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "80"}
    narrow = in_terminal("regs", model, env=env).decode().removesuffix("status 0").split()
    assert "\u2026" not in "".join(narrow)
    wide = vmodel("regs", model).stdout.split()
    assert sorted(narrow) == sorted(wide)


def test_figures_of_a_benchmark_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [Figure("random write", 128 << 10, 128, 1234567.0, 1234567.0, 23456.7, 0.98, 1234.5, 12345.6, 123456.7)]
    bench._show(figures)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[-1].split()) == "write 128 KiB 128 1,234,567 1,234,567 23,457 0.98 1234.5 12345.6 123456.7"
    assert max(map(len, lines)) <= 80


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
