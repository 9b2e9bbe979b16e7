"""What users install, and a project of theirs: wheel, source distribution, and CI in a clean environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.pages import write_files
from vmodel.guest.artifacts import cache_dir
from vmodel.patience import patience

yaml = pytest.importorskip("yaml", reason="needs the extra `docs`")
pytestmark = pytest.mark.guest
ROOT = Path(__file__).parents[2]
#: What is no part of the project.
LEFT_OUT = (".*", "__pycache__", "*.so", "*.egg-info", "build", "site", "artifacts", "*.runs")


def run(*line: object, folder: Path, environ: dict[str, str] | None = None) -> str:
    """A program's stdout."""
    done = subprocess.run(
        list(map(str, line)),
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience(600),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """Only what a CI job has; from this one's, how pip and the tests reach their files."""
    kept = {
        k: v for k, v in os.environ.items() if k.startswith(("PIP_", "VMODEL_SLOW")) or k.lower().endswith("_proxy")
    }
    if (pip := Path("~/.config/pip").expanduser()).is_dir():
        shutil.copytree(pip, home / ".config" / "pip", dirs_exist_ok=True)
    return {**kept, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", **more}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    # A copy, as building leaves files in the tree.
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT, "tests"))
    make = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", make, folder, folder=folder / "tree")
    (made,) = folder.glob("vmodel-*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the source distribution, by pip in a new virtual environment."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist)
    run(folder / "venv" / "bin" / "python", *build, folder=folder, environ=clean_environment(folder))
    (made,) = folder.glob("vmodel-*.whl")
    return made


def documents() -> set[str]:
    """The documents and examples of this tree."""
    found = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    for folder in ("ci", "docs", "examples"):
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and not any(Path(part).match(pattern) for part in parts for pattern in LEFT_OUT):
                found.add("/".join(parts))
    return found


def test_what_is_in_them(sdist: Path, wheel: Path) -> None:
    """One wheel for all versions of Python; both have all documents and examples."""
    assert "-cp311-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    place = f"{'-'.join(wheel.name.split('-')[:2])}.data/data/share/doc/vmodel/"
    assert {name.removeprefix(place) for name in names if name.startswith(place)} == documents()
    assert {"vmodel/_vmshim.abi3.so", "vmodel/py.typed"} <= set(names)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "c_shim").glob("*.[ch]")}
    assert documents() | sources | {"pyproject.toml", "setup.py"} <= held


def commands(readme: Path) -> list[str]:
    """The commands of a README after the first, which installs vmodel."""
    lines = [line.partition("  #")[0].strip() for line in readme.read_text().splitlines() if line.startswith("    ")]
    assert lines[0].startswith("pip install ")
    return lines[1:]


def test_a_users_project(wheel: Path, tmp_path: Path) -> None:
    """What ci/gitlab.yml runs, and then what the project's README says."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "examples" / "project", project, ignore=shutil.ignore_patterns(*LEFT_OUT))
    # On one kernel: its other half would take as long again.
    campaign = project / "campaign.toml"
    campaign.write_text(campaign.read_text().replace(', "backports"', ""))
    (script,) = yaml.safe_load((ROOT / "ci" / "gitlab.yml").read_text())[".vmodel"]["before_script"]
    environ = clean_environment(
        tmp_path,
        VMODEL=f"{wheel}[registers]",
        VMODEL_KERNELS="stable backports",
        VMODEL_ACCEL="tcg",
        XDG_CACHE_HOME=str(cache_dir().parent),
    )

    def job(*lines: str) -> str:
        return run("bash", "-eo", "pipefail", "-c", "\n".join((script, *lines)), folder=project, environ=environ)

    lines = commands(project / "README.md")
    lines[lines.index("vmodel test")] += " -- --junitxml=report.xml"  # as in docs/ci.md
    said = job("python -c 'import vmodel; print(vmodel.__file__)'", "vmodel doctor", *lines)
    assert "guests: kernels stable backports, accelerator tcg" in said
    assert str(project / ".vmodel-venv" / "lib") in said
    assert str(project / ".vmodel-venv" / "share" / "doc" / "vmodel") in said  # from the doctor
    assert re.search(r"\b9 passed in ", said)  # vmodel test --no-guest
    assert re.search(r"\b21 passed in ", said)  # the model's, and those of guests with each kernel
    assert "\n9a1e11fd\n" in said  # the CRC
    assert (project / "report.xml").is_file() and not (project / "artifacts").exists()
    assert "Content-Security-Policy" in (project / "report.html").read_text()
    bin_folder = project / ".vmodel-venv" / "bin"
    report = run(bin_folder / "vmodel", "report", "campaign.runs", "--format", "junit", folder=project, environ=environ)
    assert 'tests="4" errors="0" failures="0" skipped="0"' in report


def test_the_action(tmp_path: Path) -> None:
    """ci/action.yml, each step as GitHub runs it: by `sh -e`, with files for outputs, environment and path."""
    checkout, project, cache = tmp_path / "checkout", tmp_path / "project", cache_dir()
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*LEFT_OUT, "tests"))
    shutil.copytree(ROOT / "examples" / "project", project, ignore=shutil.ignore_patterns(*LEFT_OUT))
    action = yaml.safe_load((ROOT / "ci" / "action.yml").read_text())
    default = "inputs.vmodel || format('{0}/..[registers]', github.action_path)"
    values = {f"inputs.{name}": text["default"] for name, text in action["inputs"].items()}
    values |= {
        "inputs.accel": "tcg",
        "runner.os": "Linux",
        "runner.temp": str(tmp_path),
        default: f"{checkout}/ci/..[registers]",
    }
    files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_PATH")}
    for path in files.values():
        path.touch()
    environ = clean_environment(tmp_path, XDG_CACHE_HOME=str(cache.parent), GITHUB_ACTION_PATH=f"{checkout}/ci")

    def filled(text: str) -> str:
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: values[found[1]], text)

    for step in action["runs"]["steps"]:
        for text in step.get("with", {}).values():
            filled(text)  # a KeyError: there is no such value
        if "run" in step:
            assert step["shell"] == "sh"
            own = {name: filled(text) for name, text in step.get("env", {}).items()} | {
                k: str(v) for k, v in files.items()
            }
            said = run("sh", "-e", "-c", filled(step["run"]), folder=project, environ=environ | own)
        if "id" in step:
            lines = files["GITHUB_OUTPUT"].read_text().splitlines()
            values |= {f"steps.{step['id']}.outputs.{line.partition('=')[0]}": line.partition("=")[2] for line in lines}
    assert values["steps.names.outputs.cache"] == str(cache)
    assert "guests: kernels stable, accelerator tcg" in said

    environ |= dict(line.split("=", 1) for line in files["GITHUB_ENV"].read_text().splitlines())
    environ["PATH"] = f"{files['GITHUB_PATH'].read_text().strip()}:{environ['PATH']}"
    assert environ["VMODEL_ACCEL"] == "tcg"
    assert "9 passed" in run("bash", "-c", "pytest -n 2 -m 'not guest'", folder=project, environ=environ)
    assert run("bash", "-c", "vmodel guest crc.toml -- sh crc.sh", folder=project, environ=environ) == "9a1e11fd\n"


def test_without_pytest(tmp_path: Path) -> None:
    """The program in docs/testing.md."""
    project = shutil.copytree(ROOT / "examples" / "project", tmp_path / "project")
    write_files("docs/testing.md", project)
    done = run(sys.executable, "without_pytest.py", folder=project)
    assert done.splitlines() == ["not activated", "detected and failed", "not activated"]
