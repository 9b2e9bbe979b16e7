"""The code in README.md works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vmodel.cli import main
from vmodel.patience import patience

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"```(\w+)\n(?:# FILE: (\S+)\n|<!-- .*? -->\n)?(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files that the README shows, under their names."""
    for _, name, text in BLOCKS:
        if name:
            (tmp_path / name).write_text(text)
    return tmp_path


def test_the_blocks_are_there() -> None:
    assert {name for _, name, _ in BLOCKS if name} == {
        "counter.py",
        "counter.toml",
        "test_counter.py",
        "behind.toml",
        "test_iommu.py",
        "faults.toml",
    }


def test_the_machine_and_its_model(files: Path) -> None:
    line = [sys.executable, "-m", "vmodel", "qemu-args", "counter.toml"]
    done = subprocess.run(line, cwd=files, capture_output=True, text=True, timeout=patience(60), check=True)
    assert "vfio-user-pci" in done.stdout
    line = [sys.executable, "-m", "vmodel", "regs", "counter.py:Counter"]
    done = subprocess.run(line, cwd=files, capture_output=True, text=True, timeout=patience(60), check=True)
    assert "COUNT" in done.stdout


def test_the_groups(files: Path) -> None:
    (words,) = [words for words in command_lines() if words[1] == "groups"]
    line = [sys.executable, "-m", *words]
    done = subprocess.run(line, cwd=files, capture_output=True, text=True, timeout=patience(60), check=True)
    assert "0000:00:03.0 counter0  group 0 (DMA-FQ) on the root bus" in done.stdout


def test_the_plan(files: Path) -> None:
    (words,) = [words for words in command_lines() if words[1] == "plan"]
    line = [sys.executable, "-m", *words]
    done = subprocess.run(line, cwd=files, capture_output=True, text=True, timeout=patience(60), check=True)
    assert done.stdout == "lost: irq device=counter0 do=drop nth=2\nfaults.toml: 1 rule, seed 7\n"


@pytest.mark.parametrize("name", ["test_counter.py", "test_iommu.py"])
def test_the_tests_of_the_model(files: Path, name: str) -> None:
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    done = subprocess.run(line, cwd=files, capture_output=True, text=True, timeout=patience(60), check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def command_lines() -> list[list[str]]:
    """The lines of the README's shell blocks, as words."""
    return [shlex.split(line) for language, _, text in BLOCKS if language == "sh" for line in text.splitlines()]


def test_the_shell_blocks_are_vmodels() -> None:
    assert command_lines() and all(words[0] == "vmodel" for words in command_lines())


@pytest.mark.guest
def test_the_device_in_a_guest(files: Path) -> None:
    (line,) = [words for words in command_lines() if words[1] == "guest"]
    command = [sys.executable, "-m", "vmodel", *line[1:]]
    done = subprocess.run(command, cwd=files, capture_output=True, text=True, timeout=patience(120), check=False)
    assert (done.returncode, done.stdout) == (0, "0xc0de\n"), done.stderr


def test_nothing_is_installed_from_pypi_by_our_name() -> None:
    """vmodel is not there: whoever registers the name could run code on machines of those who follow such a line."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("docs", "examples", "scripts", "vmodel"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in ("", ".md", ".py", ".toml", ".sh")]
    lines = [(file, line) for file in files if file.is_file() for line in file.read_text().splitlines()]
    assert any("pip install" in line for _, line in lines)
    wrong = re.compile(r"pip install(?: [^`]*)?[ '\"]vmodel\b(?!/)|\"--force-reinstall\", \"vmodel\"")
    assert [(file, line) for file, line in lines if wrong.search(line.partition("  #")[0])] == []


def test_the_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for script in set(re.findall(r"\./(scripts/[\w-]+)", text)):
        assert (ROOT / script).stat().st_mode & 0o111, script
    for command in set(re.findall(r"`vmodel ([\w-]+)", text)):
        assert main([command, "--help"]) == 0, command
