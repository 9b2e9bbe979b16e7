"""The examples that each page of docs/reference begins with work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, files_of, write_files
from vmodel.patience import patience

#: All but the page of machine files, whose examples tests/cli/test_schema.py checks.
PAGES = sorted(page.name for page in (ROOT / "docs" / "reference").glob("*.md") if page.stem != "machine-file")
IN_GUESTS = ["guest.md"]


def run(page: str, folder: Path) -> None:
    names = files_of(f"docs/reference/{page}")
    assert names, "it begins with an example"
    write_files(f"docs/reference/{page}", folder)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=patience(200), check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if page not in IN_GUESTS])
def test_the_example(page: str, tmp_path: Path) -> None:
    run(page, tmp_path)


@pytest.mark.guest
@pytest.mark.parametrize("page", IN_GUESTS)
def test_the_example_in_a_guest(page: str, tmp_path: Path) -> None:
    run(page, tmp_path)
