"""$VMODEL_SLOW and what a machine lacks, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE, ROOT, environ, refused, vmodel
from vmodel.patience import patience

pytestmark = pytest.mark.slow


def test_a_wrong_factor_is_one_line() -> None:
    done = vmodel("guest", EXAMPLE, "--", "true", VMODEL_SLOW="fast", XDG_CACHE_HOME="/nonexistent")
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1
    assert "must be a number" in refused(done)


def test_tests_of_terminals_skip_without_one(tmp_path: Path) -> None:
    """The same by a real session, on a machine without ptys."""
    (tmp_path / "conftest.py").write_text(
        "import os\ndef none(*_): raise OSError(2, 'no pty here')\nos.openpty = os.forkpty = none\n"
    )
    tests = [f"{ROOT}/tests/cli/test_cli.py", "-k", "ctrl_c or colours"]
    line = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--confcutdir", str(tmp_path)]
    line += ["-p", "conftest", "--rootdir", str(ROOT), *tests]
    environment = environ(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs a pty, which this machine has not: [Errno 2] no pty here" in done.stdout
    assert " passed" not in done.stdout
