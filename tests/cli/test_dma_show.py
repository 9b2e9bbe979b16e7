"""`vmodel dma show`, which asks a running server."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import in_terminal, refused, serving, vmodel
from tests.dma_report.made import MACHINE
from vmodel.control import Control
from vmodel.dma_report import DmaReport
from vmodel.errors import Access
from vmodel.iommu.domain import PagingDomain
from vmodel.machine import Machine, parse
from vmodel.span import PAGE
from vmodel.status import commands

pytestmark = pytest.mark.slow


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.toml"
    path.write_text(MACHINE)
    return path


@contextlib.contextmanager
def controlled(tmp_path: Path, file: Path) -> Iterator[Machine]:
    """The machine in this process, with a control socket."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 64 * PAGE)
    with contextlib.closing(parse(file.read_text(), file)) as machine:
        machine.devices["edu0"].memory.map(0, 64 * PAGE, fd=fd)
        with Control(tmp_path, machine.name, commands(machine)):
            yield machine
    os.close(fd)


def leak(machine: Machine, iova: int = 0x10000) -> None:
    """A driver that comes, maps a page and goes."""
    group = machine.system["edu0"].group
    assert group is not None and isinstance(group.domain, PagingDomain)
    machine.devices["edu0"].dma.bus_master = True
    group.domain.map(iova, 0x2000, PAGE, Access.READ)
    machine.devices["edu0"].dma.read(iova, 8)
    machine.devices["edu0"].dma.bus_master = False


def test_the_first_call_begins_the_record(tmp_path: Path, file: Path) -> None:
    line = ["dma", "show", file, "--run-dir", tmp_path]
    with controlled(tmp_path, file) as machine:
        leak(machine)
        first = vmodel(*line)
        leak(machine, 0x20000)
        second = vmodel(*line)
        data = DmaReport.model_validate_json(vmodel(*line, "--json").stdout)
        page = vmodel(*line, "-o", tmp_path / "r.html")
        again = vmodel(*line, "--restart")
        third = vmodel(*line)
    assert (
        first.stdout
        == "the record begins now: the next `vmodel dma show` has what happens from now on\n"
        == again.stdout
    )
    assert "error: dma-leak: 2 mappings of 8 KiB still there" in second.stdout and "0x20000, 4 KiB" in second.stdout
    assert data.signs == ["dma-leak"] and [one.iova for one in data.endpoints[0].mappings] == [0x10000, 0x20000]
    assert page.stdout == "" and "<svg viewBox" in (tmp_path / "r.html").read_text()
    assert "dma-leak" not in third.stdout  # a new record does not know that a driver released the device


def test_watch_until_ctrl_c(tmp_path: Path, file: Path) -> None:
    with serving(file, "--run-dir", tmp_path / "run"):
        line = ["dma", "show", file, "--run-dir", tmp_path / "run", "--watch"]
        shown = in_terminal(*line, keys=b"\x03", until=b"0 mappings")
        assert shown.endswith(b"status 130") and b"Traceback" not in shown
        assert b"\x1b[?25h" in shown, "the cursor is there again"


def test_mistakes(tmp_path: Path, file: Path) -> None:
    line = ["dma", "show", file, "--run-dir", tmp_path]
    said = f"no server runs in {tmp_path}: start `vmodel serve`, `run` or `guest`, or name its --run-dir"
    for extra in ([], ["--json"], ["--watch"], ["-o", tmp_path / "r.json"]):
        assert refused(vmodel(*line, *extra)) == said
    assert refused(vmodel(*line, "-o", "r.txt")) == "--output r.txt: must end in .html or .json"
    assert refused(vmodel(*line, "-o", "no/r.html")) == "--output no/r.html: the folder no does not exist"
    assert refused(vmodel(*line, "--watch", "-o", "r.html")) == "--output: not together with --watch"
    with Control(tmp_path, "made", {"dma": lambda _: {"report": 1}}):
        assert refused(vmodel(*line)) == f"{tmp_path}/made.control: the server's answer is not this version's"


def test_a_record_of_a_server_in_json_is_a_report(tmp_path: Path, file: Path) -> None:
    with controlled(tmp_path, file):
        done = vmodel("dma", "show", file, "--run-dir", tmp_path, "--json")
    assert json.loads(done.stdout)["kind"] == "dma-report" and done.stdout.count("\n") == 1
