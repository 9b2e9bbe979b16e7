"""The scripts: their help; scripts/test: its own options, and all else for pytest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import ROOT


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """The script among others that only note how they are called."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup").write_text(
        f'set -eu\nroot={tmp_path}\nvenv={tmp_path}\ninstall() {{ :; }}\ndie() {{ echo "test: $*" >&2; exit 1; }}\n'
    )
    for name, kind in (("scripts/get-qemu", "get-qemu"), ("bin/python", "pytest")):
        program = tmp_path / name
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f'print(json.dumps(["{kind}", os.environ.get("VMODEL_TEST_KERNELS", ""), *sys.argv[1:]]))\n'
        )
        program.chmod(0o755)
    return tmp_path / "scripts" / "test"


def calls(script: Path, *arguments: str, status: int = 0) -> list[list[str]]:
    environ = {key: value for key, value in os.environ.items() if key != "VMODEL_TEST_KERNELS"}
    done = subprocess.run([script, *arguments], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("bench", "tests/bench/run.py"),
        ("build-kernel", "vmodel/guest/build_kernel.py"),
        ("demo", ""),
        ("docs", "scripts/docs"),
        ("fuzz", "tests/fuzz/run.py"),
        ("get-qemu", "vmodel/guest/get_qemu.py"),
        ("test", "scripts/test"),
    ],
)
def test_help(tmp_path: Path, name: str, source: str, option: str) -> None:
    """It names each option, at once: in a fresh clone nothing is installed or fetched for it."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    done = subprocess.run(
        [tmp_path / "scripts" / name, option],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    head, *rest = done.stdout.splitlines()
    assert head == f"usage: scripts/{name} [OPTIONS]" and rest and not any(line.startswith("#") for line in rest)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scripts"]
    text = (ROOT / source).read_text() if source else ""
    options = re.findall(r'add_argument\(\s*"(--[\w-]+)"|^ *(--[\w-]+)\)', text, re.MULTILINE)
    assert bool(options) == bool(source) and all("".join(pair) in done.stdout for pair in options), options


HEAD = ["-m", "pytest", "-n", "auto", "--dist", "worksteal"]


def test_arguments_go_to_pytest(scripts: Path) -> None:
    odd = ["-m", "not guest", "-k", "a or 'b c'", "tests/unit", "", "*", "$HOME", "-n0"]
    assert calls(scripts, *odd) == [["get-qemu", "", "--all"], ["pytest", "", *HEAD, *odd]]
    assert calls(scripts)[-1] == ["pytest", "", *HEAD]


def test_quick(scripts: Path) -> None:
    """Nothing is fetched; a selection by the user comes later, and so counts."""
    quick = ["-m", "not guest and not slow", "--hypothesis-profile", "quick"]
    assert calls(scripts, "--quick") == [["pytest", "", *HEAD, *quick]]
    assert calls(scripts, "-x", "--quick", "-m", "a b") == [["pytest", "", *HEAD, *quick, "-x", "-m", "a b"]]
    assert calls(scripts, "--quick", "--kernels", "all", status=1) == []


@pytest.mark.parametrize("option", [["--kernels", "all"], ["--kernels=all"]])
def test_all_kernels_are_refreshed(scripts: Path, option: list[str]) -> None:
    everything, refresh, tests = calls(scripts, "-x", *option, "-k", "a b")
    roles = [word for role in ("stable", "backports", "cloud") for word in ("--kernel", role)]
    assert everything[2:] == ["--all"] and refresh[2:] == ["--refresh", *roles]
    assert tests == ["pytest", "stable,backports,cloud", *HEAD, "-x", "-k", "a b"]


def test_some_kernels(scripts: Path) -> None:
    *fetched, tests = calls(scripts, "--kernels", "stable,6.12", "-x")
    assert [call[2:] for call in fetched] == [["--all"], ["--kernel", "stable"], ["--kernel", "6.12"]]
    assert tests == ["pytest", "stable,6.12", *HEAD, "-x"]
    assert calls(scripts, "-x", "--kernels", status=1) == []


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    """Each of its measurements, for a moment: what they say is for people to look at."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "bench" / "run.py", "--try", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["number"] for row in rows} == {*range(1, 11), 13} and all(row["measured"] > 0 for row in rows)
