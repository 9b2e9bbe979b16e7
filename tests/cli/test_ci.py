"""ci/ and the project's own workflow: their YAML is right for its service, and their shell for sh.

What the action and the template run, tests/guest/test_project.py runs, too.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import ROOT
from vmodel.patience import patience

yaml = pytest.importorskip("yaml", reason="needs the extra `docs`")
SCHEMAS = {
    "ci/action.yml": "vendor.github-actions",
    "ci/gitlab.yml": "vendor.gitlab-ci",
    ".github/workflows/wheels.yml": "vendor.github-workflows",
}


def run(*line: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, line)), input=text, cwd=ROOT, capture_output=True, text=True, timeout=patience(60), check=False
    )


def scripts(node: Any) -> Iterator[str]:
    """The shell scripts in a file of GitHub's or GitLab's."""
    if isinstance(node, list):
        for part in node:
            yield from scripts(part)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "run":
                yield value
            elif key in ("before_script", "script"):
                yield "\n".join(value)
            else:
                yield from scripts(value)


@pytest.mark.parametrize("file", SCHEMAS)
def test_the_shell_in_them(file: str) -> None:
    found = list(scripts(yaml.safe_load((ROOT / file).read_text())))
    assert found
    for text in found:
        # ${{ ... }} is GitHub's: it would be a value.
        done = run("sh", "-n", text=text)
        assert done.returncode == 0, (text, done.stderr)
        if shellcheck := shutil.which("shellcheck") or shutil.which(Path(sys.executable).parent / "shellcheck"):
            # SC1091: another test has the file that is sourced.
            done = run(shellcheck, "--shell=sh", "--exclude=SC1091,SC2154", "-", text=text)
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("file", "schema"), SCHEMAS.items())
@pytest.mark.skipif(not importlib.util.find_spec("check_jsonschema"), reason="needs the extra `dev`")
def test_their_service_takes_them(file: str, schema: str) -> None:
    done = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_gitlab_has_the_script() -> None:
    """GitLab includes YAML only, so the template has a copy."""
    (script,) = yaml.safe_load((ROOT / "ci" / "gitlab.yml").read_text())[".vmodel"]["before_script"]
    text = (ROOT / "ci" / "setup.sh").read_text()
    assert script == text[text.index("set -eu") :]
