"""Help of each command, and what a shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, environ
from vmodel.cli import main
from vmodel.devices import BUILTIN
from vmodel.patience import patience

GROUPS = {"bench", "dma", "iommu", "kernels", "plan", "inject"}


def help_of(capsys: pytest.CaptureFixture[str], *path: str) -> str:
    assert main([*path, "--help"]) == 0
    return capsys.readouterr().out


def listed(text: str) -> dict[str, str]:
    """What a help text lists as commands, and says of each; a sentence may go on in the next line."""
    _, _, commands = text.partition("\nCommands:\n")
    return dict(re.findall(r"^  ([\w-]+)((?: .*\n)(?:   .*\n)*)", commands, re.MULTILINE))


def paths(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, ...]]:
    """Each command, subcommands too."""
    found: list[tuple[str, ...]] = [()]
    for name in listed(help_of(capsys)):
        found += [(name,), *((name, sub) for sub in listed(help_of(capsys, name)))]
    return found


def test_help_says_whole_sentences(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In 80 columns no line is longer, and no sentence is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    every = paths(capsys)
    assert len(every) > 25 and {path[0] for path in every if len(path) == 2} == GROUPS
    for path in every:
        text = help_of(capsys, *path)
        usage, description, rest = text.split("\n\n", 2)
        assert usage.startswith(f"Usage: {' '.join(['vmodel', *path])} "), path
        assert max(map(len, text.splitlines())) <= 80, path
        assert not re.search(r"(\.\.\.|\u2026)$", rest, re.MULTILINE), text
        for said in (description, *listed(text).values()):
            assert re.search(r"[^.]\.$", said.rstrip()), (path, said)


# ---- completion -------------------------------------------------------------------------------------


def completed(words: str, cwd: Path) -> list[str]:
    """What bash proposes after these words and Tab, by the script that `vmodel --show-completion bash` prints."""
    (cwd / "bin").mkdir(exist_ok=True)
    program = cwd / "bin" / "vmodel"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vmodel "$@"\n')
    program.chmod(0o755)
    script = f"""
        PATH={program.parent}:$PATH
        eval "$(vmodel --show-completion bash)"
        complete -p vmodel
        words="{words}"
        COMP_WORDS=($words)
        [[ $words == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _vmodel_completion vmodel
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    line = ["bash", "--norc", "-c", script]
    done = subprocess.run(line, cwd=cwd, env=environ(), capture_output=True, text=True, timeout=patience(60))
    first, *proposed = done.stdout.splitlines()
    assert (first, done.stderr) == ("complete -o default -F _vmodel_completion vmodel", "")
    return [line for line in proposed if line]


@pytest.mark.slow
def test_bash_proposes_commands(tmp_path: Path) -> None:
    assert completed("vmodel re", tmp_path) == ["regs", "reproduce", "report"]
    assert {"list", "add"} <= {*completed("vmodel inject ", tmp_path)}


def test_bash_proposes_models(tmp_path: Path) -> None:
    assert completed("vmodel regs ", tmp_path) == sorted(BUILTIN)


@pytest.mark.slow
def test_bash_proposes_machine_files(tmp_path: Path) -> None:
    """Of TOML files only those with a table [machine], although they may be wrong still."""
    (tmp_path / "a.toml").write_text("# half written\n[machine]\nname = ")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "a"\n')
    (tmp_path / "plan.toml").write_text('[[rule]]\npoint = "irq"\n')
    (tmp_path / "a.txt").write_text("[machine]\n")
    os.mkfifo(tmp_path / "fifo.toml")
    assert completed("vmodel serve ", tmp_path) == ["a.toml"]
    examples = f"{ROOT}/examples"
    assert completed(f"vmodel iommu show {examples}/edu-v", tmp_path) == [
        f"{examples}/edu-viommu.toml",
        f"{examples}/edu-vtd.toml",
    ]
    assert completed("vmodel serve gone/x", tmp_path) == []
