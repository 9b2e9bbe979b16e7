"""docs/outside.md: its model passes its own test, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cli.commands import environ
from tests.pages import write_files
from vmodel.patience import patience


def test_the_page_s_test_passes(tmp_path: Path) -> None:
    write_files("docs/outside.md", tmp_path)
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "test_uart.py",
        "test_pty_uart.py",
    ]
    env = environ(PYTEST_ADDOPTS="")
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
