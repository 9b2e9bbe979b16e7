"""How commands look: colours, help."""

from __future__ import annotations

from pathlib import Path

from tests.cli.commands import in_terminal, vmodel


def test_no_color(tmp_path: Path) -> None:
    """https://no-color.org: no colours; and rich's bold is one of its attributes."""
    assert b"\x1b[32m" in in_terminal("doctor")
    shown = in_terminal("doctor", env={"NO_COLOR": "1"})
    assert b"ok" in shown and b"\x1b[" not in shown, shown


def test_help_says_whole_sentences() -> None:
    """In 80 columns no command's line is cut."""

    def look(*path: str) -> None:
        text = vmodel(*path, "--help", COLUMNS="80").stdout
        assert max(map(len, text.splitlines())) <= 80, path
        _, found, commands = text.partition("\nCommands:\n")
        for line in commands.splitlines():
            name, _, said = line.strip().partition(" ")
            assert said.strip().endswith(".") and not said.endswith("..."), line
            look(*path, name)
        assert found or path, "there are commands"

    look()


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
