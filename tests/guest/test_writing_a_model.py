"""The device of docs/writing-a-model.md in a stock guest, as the page says to boot it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pages import ROOT, write_files
from vmodel.patience import patience

pytestmark = pytest.mark.guest
PAGE = "docs/writing-a-model.md"


def lines() -> list[list[str]]:
    """The page's shell lines."""
    shell = (ROOT / PAGE).read_text().split("```sh\n")[1:]
    return [shlex.split(line) for block in shell for line in block.partition("```")[0].splitlines()]


def run(folder: Path, line: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    program, guest, machine, *rest = line
    assert (program, guest, machine) == ("vmodel", "guest", "copier.toml")
    command = [sys.executable, "-m", "vmodel", guest, machine, "--run-dir", str(folder / "run"), *more, *rest]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=patience(200), check=False)


def test_it_is_there(tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    done = run(tmp_path, lines()[0])
    assert (done.returncode, done.stdout) == (0, "0xc09e\n"), done.stdout + done.stderr


def test_a_program_drives_it_by_vfio(kernel: str, compiled: Callable[[str], Path], tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    (tmp_path / "copier_check").symlink_to(compiled("tests/guest/copier_check.c"))
    done = run(tmp_path, lines()[1], "--kernel", kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    for mode in ("MSI-X", "MSI", "INTx", "MSI-X after the reset"):
        assert f"{mode}: copies, faults, timer\n" in done.stdout
    assert "all is well" in done.stdout
    assert "model failed" not in done.stderr
