"""A user's project, with the wheel of this tree in a virtual environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import write_files
from vmodel.patience import patience

pytestmark = pytest.mark.guest
ROOT = Path(__file__).parents[2]


def run(*line: object, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, line)), cwd=folder, capture_output=True, text=True, timeout=patience(300), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_users_project(tmp_path: Path) -> None:
    """What docs/testing.md says to do, from the wheel on: its tests pass side by side, with and without guests."""
    # A copy, as building leaves files in the tree.
    tree = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "build", "artifacts", "tests", "docs")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels")
    run(sys.executable, *build, tree, folder=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("vmodel-*.whl")

    run(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, "pytest", "pytest-xdist", folder=tmp_path)
    project = tmp_path / "project"
    shutil.copytree(ROOT / "examples" / "project", project, ignore=shutil.ignore_patterns("__pycache__"))

    where = run(python, "-c", "import vmodel; print(vmodel.__file__)", folder=project).stdout
    assert str(tmp_path / "venv") in where
    quick = run(python, "-m", "pytest", "-m", "not guest", folder=project).stdout
    assert "8 passed, 5 deselected" in quick
    guests = run(python, "-m", "pytest", "-n", "2", "-m", "guest", folder=project).stdout
    assert "5 passed" in guests
    assert not (project / "artifacts").exists()


def test_without_pytest(tmp_path: Path) -> None:
    """The program in docs/testing.md."""
    project = shutil.copytree(ROOT / "examples" / "project", tmp_path / "project")
    write_files("docs/testing.md", project)
    done = run(sys.executable, "without_pytest.py", folder=project)
    assert done.stdout.splitlines() == ["not activated", "detected and failed", "not activated"]
