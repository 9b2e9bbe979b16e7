"""vmodel new and vmodel test: a project from nothing, as far as that needs no guest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import environ, refused, vmodel
from vmodel.patience import patience

ALL = {
    "README.md", ".gitignore", "NAME.py", "NAME.toml", "plan.toml", "pyproject.toml", "driver/Kbuild", "driver/NAME.c",
    "driver/NAME_regs.h", "tests/test_driver.py", "tests/test_model.py",
}  # fmt: skip


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["mycard", "dma_engine_2", "a_b", "x2_y"])
def test_a_project(name: str, tmp_path: Path) -> None:
    """Each file has the device's name in it, and nothing of the template's; the model's tests pass at once."""
    done = vmodel("new", f"projects/{name}", cwd=tmp_path)
    assert done.returncode == 0
    project = tmp_path / "projects" / name
    expected = {path.replace("NAME", name) for path in ALL}
    assert files_in(project) == expected
    assert {line.removeprefix(f"projects/{name}/") for line in done.stdout.splitlines()} == expected
    assert done.stderr == f"next: cd projects/{name} && vmodel test\n"
    if name != "mycard":
        assert not [path for path in expected if "mycard" in (project / path).read_text().lower()]
    tested = vmodel("test", "--no-guest", cwd=project)
    assert tested.returncode == 0 and "9 passed" in tested.stdout, tested.stdout


def test_the_template_is_in_order(tmp_path: Path) -> None:
    """ruff finds nothing in the Python that users start from."""
    assert vmodel("new", "mycard", cwd=tmp_path).returncode == 0
    for command in (
        ["check", "--select", "E,F,W,I,B,UP", "--line-length", "120"],
        ["format", "--check", "--line-length", "120"],
    ):
        ruff = [sys.executable, "-m", "ruff", *command, str(tmp_path / "mycard")]
        done = subprocess.run(ruff, capture_output=True, text=True, timeout=patience(60), check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["9lives", "my-card", "MyCard", "", "a" * 40, "käse", "a\nb", "a__b", "a_"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    said = refused(vmodel("new", name, cwd=tmp_path))
    assert "must be lower-case words of letters and digits, joined by _" in said
    assert not files_in(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["class", "struct", "json", "test", "tests", "driver", "int", "current", "pci", "status", "pci_device", "msi"],
)
def test_names_that_are_taken(name: str, tmp_path: Path) -> None:
    """A project called json would hide Python's module in its own tests; an int_probe's struct is no int.

    The model of "status" would have two classes Status, and the header of "pci" its own PCI_STATUS.
    """
    assert refused(vmodel("new", name, cwd=tmp_path)).startswith(f"'{name}': this name is taken")


def test_what_exists_stays(tmp_path: Path) -> None:
    (tmp_path / "mycard").mkdir()
    (tmp_path / "mycard" / "thesis.txt").write_text("years of work")
    assert refused(vmodel("new", "mycard", cwd=tmp_path)) == "mycard: exists already"
    assert files_in(tmp_path) == {"mycard/thesis.txt"}
    (tmp_path / "file").write_text("")
    assert refused(vmodel("new", "file/mycard", cwd=tmp_path), 1)
    (tmp_path / "empty").mkdir()
    assert vmodel("new", "empty", cwd=tmp_path).returncode == 0
    (tmp_path / "card").symlink_to("nowhere")
    assert refused(vmodel("new", "card", cwd=tmp_path)) == "card: exists already"


def test_here(tmp_path: Path) -> None:
    """In an empty folder, its name is the device's."""
    (tmp_path / "mycard").mkdir()
    assert vmodel("new", ".", cwd=tmp_path / "mycard").returncode == 0
    assert files_in(tmp_path / "mycard") == {path.replace("NAME", "mycard") for path in ALL}


@pytest.mark.parametrize("folder", ["my projects", "$(touch x)", "a'b", "a:b", "\udcff"])
def test_folders_in_which_nothing_can_be_built(folder: str, tmp_path: Path) -> None:
    """kbuild puts paths into commands of a shell, without quotes."""
    (tmp_path / folder).mkdir()
    said = refused(vmodel("new", f"{folder}/mycard", cwd=tmp_path))
    assert "kbuild takes no path with " in said
    assert not files_in(tmp_path)


def test_half_a_project_is_removed(tmp_path: Path) -> None:
    """The second attempt finds nothing of the first in its way."""
    line = f"ulimit -f 2; exec {sys.executable} -m vmodel new folder/mycard"
    done = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=patience(60)
    )
    assert refused(done, 1).startswith("folder/mycard/") and "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_test_that_fails(tmp_path: Path) -> None:
    """The exit status is pytest's; arguments behind -- are pytest's."""
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    assert vmodel("test", "--no-guest", cwd=tmp_path).returncode == 1
    done = vmodel("test", "--no-guest", "-j", "1", "--", "-k", "good", "-q", cwd=tmp_path)
    assert done.returncode == 0 and "1 passed, 1 deselected" in done.stdout


def test_a_project_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text('[machine]\nname = "card"\nmemry = "1G"\n')
    (tmp_path / "campaign.toml").write_text('[campaign]\nname = "x"\n[[machine]]\nfile = "card.toml"\n')  # is none
    assert refused(vmodel("test", cwd=tmp_path)).startswith("card.toml: machine.memry: ")
    (tmp_path / "card.toml").write_text('[machine]\nname = "card"\n[guest]\ntools = ["nvme-cli:nvme", ":x"]\n')
    said = refused(vmodel("test", cwd=tmp_path))
    assert said == "card.toml: guest.tools[1]: ':x': must be PACKAGE:PROGRAM, as pciutils:lspci"
    (tmp_path / "card.toml").write_text("[machine")
    assert "is not valid TOML" in refused(vmodel("test", cwd=tmp_path))


def test_without_pytest(tmp_path: Path) -> None:
    """One line, with what to do."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pytest'] = None\n")
    path = os.pathsep.join((str(tmp_path), environ()["PYTHONPATH"]))
    said = refused(vmodel("test", cwd=tmp_path, PYTHONPATH=path), 125)
    assert said == f"pytest is missing: {sys.executable} -m pip install pytest pytest-xdist"
