"""`vmodel groups --sysfs DIR --follow`, which follows a running server."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.commands import environ, in_terminal, refused, vmodel
from tests.waiting import until
from vmodel.control import Command, Control
from vmodel.iommu import dma_domain_alloc
from vmodel.machine import Machine, parse
from vmodel.status import commands

pytestmark = pytest.mark.slow

MACHINE = """
[machine]
name = "m"
[[iommu]]
name = "iommu0"
kind = "vt-d"
[[device]]
name = "a"
model = "edu"
address = "0000:00:03.0"
[[device]]
name = "b"
model = "edu"
address = "0000:00:04.0"
"""


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.toml"
    path.write_text(MACHINE)
    return path


@contextlib.contextmanager
def served(tmp_path: Path, file: Path, **more: Command) -> Iterator[Machine]:
    """The machine in this process, with a control socket."""
    machine = parse(file.read_text(), file)
    with Control(tmp_path, machine.name, {**commands(machine), **more}):
        yield machine
    machine.close()


@contextlib.contextmanager
def following(tmp_path: Path, file: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, once it follows."""
    line = [sys.executable, "-m", "vmodel", "groups", str(file), "--run-dir", str(tmp_path)]
    with subprocess.Popen(
        [*line, "--sysfs", str(folder), "--follow"],
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == f"{folder} follows the groups of the server in {tmp_path}, until Ctrl-C\n"
            yield run
        finally:
            run.kill()


def end_of(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = run.communicate(timeout=30)
    return run.returncode, out, error


def test_changes_and_ctrl_c(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "sys"
    groups = folder / "iommu_groups"
    with served(tmp_path, file) as machine, following(tmp_path, file, folder) as run:
        assert listed(groups) == ["0", "1"]
        assert (groups / "0/type").read_text() == "identity\n"
        a, b = machine.system["a"], machine.system["b"]
        assert a.group is not None
        a.group.set_default(dma_domain_alloc(a))
        until(lambda: (groups / "0/type").read_text() == "DMA-FQ\n", "the new type", 20)
        machine.system.remove(b)
        until(lambda: listed(groups) == ["0"], "the end of the group", 20)
        assert listed(folder / "devices/pci0000:00") == ["0000:00:03.0"]
        run.send_signal(signal.SIGINT)
        assert end_of(run) == (130, "", "")
    assert not folder.exists()


def test_in_a_terminal(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "s"
    with served(tmp_path, file):
        shown = in_terminal(
            "groups", file, "--run-dir", tmp_path, "--sysfs", folder, "--follow", keys=b"\x03", until=b"until Ctrl-C"
        )
    assert b"Traceback" not in shown and shown.count(b"\r\n") <= 2
    assert not folder.exists()


def test_two_at_once(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "sys"
    arguments = ("groups", file, "--run-dir", tmp_path, "--sysfs", folder, "--follow")
    with served(tmp_path, file), following(tmp_path, file, folder):
        said = refused(vmodel(*arguments))
        assert said == f"--sysfs {folder}: another process writes to it: choose another folder"
        assert (folder / "iommu_groups/0/type").exists()


def lose(folder: Path, machine: Machine) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def fill(folder: Path, machine: Machine) -> None:
    """Somebody's file is in the folder of a group that goes."""
    (folder / "iommu_groups/1/mine").write_text("data")
    machine.system.remove(machine.system["b"])


@pytest.mark.parametrize(("what", "why"), [(lose, "it was removed"), (fill, os.strerror(errno.ENOTEMPTY))])
def test_a_folder_that_others_change(
    tmp_path: Path, file: Path, what: Callable[[Path, Machine], None], why: str
) -> None:
    folder = tmp_path / "sys"
    with served(tmp_path, file) as machine, following(tmp_path, file, folder) as run:
        what(folder, machine)
        assert end_of(run) == (2, "", f"vmodel: --sysfs {folder}: {why}\n")


def test_a_server_that_ends(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "sys"
    with contextlib.ExitStack() as server:
        server.enter_context(served(tmp_path, file))
        run = server.enter_context(following(tmp_path, file, folder))
        (tmp_path / "m.control").unlink()
        assert end_of(run)[::2] == (
            2,
            f"vmodel: no server runs in {tmp_path}: start `vmodel serve`, `run` or `guest`, or name its --run-dir\n",
        )
    assert not folder.exists()


def test_another_version(tmp_path: Path, file: Path) -> None:
    """Nothing is written outside of the folder, whatever the server sends."""
    folder = tmp_path / "sys"
    with served(tmp_path, file, sysfs=lambda _: {"../out": ["file", "x"]}):
        said = refused(vmodel("groups", file, "--run-dir", tmp_path, "--sysfs", folder, "--follow"))
    assert said == f"the server in {tmp_path} sends no groups: is it another version of vmodel?"
    assert listed(tmp_path) == ["m.toml"]


def test_what_is_wrong_in_the_line(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "sys"
    assert refused(vmodel("groups", file, "--follow")) == (
        "--follow is for --sysfs DIR, without --json, --svg and --default-domain"
    )
    assert refused(vmodel("groups", file, "--follow", "--sysfs", folder, "--json")).startswith("--follow is for")
    said = refused(vmodel("groups", file, "--follow", "--sysfs", folder, "--default-domain", "dma"))
    assert said.startswith("--follow is for")
    said = refused(vmodel("groups", file, "--sysfs", folder, "--run-dir", tmp_path))
    assert said == "--run-dir is for --follow: otherwise no server is asked"
    said = refused(vmodel("groups", file, "--sysfs", folder, "--run-dir", tmp_path, "--follow"))
    assert said == f"no server runs in {tmp_path}: start `vmodel serve`, `run` or `guest`, or name its --run-dir"
    assert not folder.exists()
