"""`vmodel iommu show`, which asks a running server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import environ, in_terminal, refused, serving, vmodel
from vmodel.control import Control, ask
from vmodel.errors import DmaFault
from vmodel.machine import Machine, parse
from vmodel.status import MAX_MAPPINGS, commands

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
[[group]]
device = "a"
domain = "paging"
"""
MAPPING = '[[group.mapping]]\niova = {}\ngpa = {}\nsize = "4K"\nprot = "rw"\n'


def text(mappings: int = 5) -> str:
    return MACHINE + "".join(MAPPING.format(0x100000 + n * 0x2000, n * 0x1000) for n in range(mappings))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.toml"
    path.write_text(text())
    return path


# ---- vmodel iommu show -------------------------------------------------------------------------------


@contextlib.contextmanager
def told(tmp_path: Path, file: Path) -> Iterator[Machine]:
    """The machine in this process, with a control socket for `vmodel iommu show`."""
    machine = parse(file.read_text(), file)
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 20)
    for device in machine.devices.values():
        device.memory.map(0, 1 << 20, fd=fd)
        device.config.write(4, b"\x06\x00")
    with Control(tmp_path, machine.name, commands(machine)):
        yield machine
    machine.close()
    os.close(fd)


def busy(machine: Machine) -> None:
    """Three hits, a miss and a fault."""
    for _ in range(4):
        machine.devices["a"].dma.read(0x100000, 4)
    with pytest.raises(DmaFault):
        machine.devices["a"].dma.write(0x101000, b"x")


def test_table(tmp_path: Path, file: Path) -> None:
    with told(tmp_path, file) as machine:
        busy(machine)
        stats = machine.devices["a"].dma.stats
        assert (stats.iotlb_hits, stats.faults) == (3, 1)
        rate = f"{100 * 3 / (3 + stats.iotlb_misses):.1f} %"
        done = vmodel("iommu", "show", file, "--run-dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    head, a, b, faults, last = done.stdout.splitlines()
    assert head.split() == ["group", "IOMMU", "devices", "domain", "mappings", "IOTLB", "hits", "faults"]
    shown = ", ".join(f"{0x100000 + n * 0x2000:#x}..{0x100FFF + n * 0x2000:#x} -> {n * 0x1000:#x}" for n in range(4))
    assert a.split(None, 3)[:3] == ["0", "iommu0", "a"]
    assert f" 5: {shown}, ... " in a and a.endswith(" 1") and f" {rate} " in a
    assert b.split() == ["1", "iommu0", "b", "identity", "-", "0"]
    assert faults == "iommu0: 1 faults"
    assert last == "  iommu0: a [0x18]: WRITE at iova 0x101000: NOT_MAPPED (DMA-FQ domain, group 0)"


def test_stale_uses_and_pasids(tmp_path: Path, file: Path) -> None:
    """Where somebody looks at them they have a column."""
    more = 'kind = "vt-d"\nparams = { report_stale = true }\ncapabilities = { flush_ms = 100000.0 }\n'
    file.write_text(file.read_text().replace('kind = "vt-d"\n', more, 1))
    with told(tmp_path, file) as machine:
        busy(machine)
        group = machine.system["a"].group
        assert group is not None
        group.attach_pasid(group.iommu.identity, 5)
        group.domain.unmap(0x100000, 0x1000)  # type: ignore[attr-defined]
        machine.devices["a"].dma.read(0x100000, 4)
        done = vmodel("iommu", "show", file, "--run-dir", tmp_path)
        found = ask(tmp_path / "m.control", "iommu")
    head, a, b, *_ = done.stdout.splitlines()
    assert head.split()[-2:] == ["faults", "stale"]
    assert a.split()[-2:] == ["1", "1"] and "; pasid 5: identity" in a
    assert b.split()[-2:] == ["0", "0"]
    assert found["devices"]["a"]["stale"] == 1 and found["iommus"][0]["report_stale"] is True


def test_json(tmp_path: Path, file: Path) -> None:
    with told(tmp_path, file) as machine:
        busy(machine)
        done = vmodel("iommu", "show", file, "--run-dir", tmp_path, "--json")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    found = json.loads(done.stdout)
    assert list(found) == ["machine", "iommus", "groups", "devices"]
    assert found["machine"] == "m"
    (iommu,) = found["iommus"]
    assert (iommu["name"], iommu["kind"], iommu["faults"], iommu["lost"]) == ("iommu0", "vt-d", 1, 0)
    assert len(iommu["last_faults"]) == 1
    a, b = found["groups"]
    assert (a["number"], a["iommu"], a["devices"], a["pasids"], a["mapping_count"]) == (0, "iommu0", ["a"], {}, 5)
    assert a["mappings"][1] == {"iova": 0x102000, "last": 0x102FFF, "gpa": 0x1000, "access": 3}
    assert (b["type"], b["devices"]) == ("identity", ["b"]) and "mappings" not in b
    assert found["devices"]["a"]["iotlb_hits"] == 3 and found["devices"]["a"]["faults"] == 1


def test_more_mappings_than_are_told_of(tmp_path: Path, file: Path) -> None:
    with told(tmp_path, file) as machine:
        group = machine.system["a"].group
        assert group is not None
        for n in range(MAX_MAPPINGS):
            group.domain.map(0x4000_0000 + n * 0x2000, 0, 0x1000)  # type: ignore[attr-defined]
        shown = ask(tmp_path / "m.control", "iommu")["groups"][0]
    assert (shown["mapping_count"], len(shown["mappings"])) == (MAX_MAPPINGS + 5, MAX_MAPPINGS)


def test_watch_until_ctrl_c(tmp_path: Path, file: Path) -> None:
    """In a terminal a table; for tools a line a second."""
    with serving(file, "--run-dir", tmp_path / "run"):
        line = ["iommu", "show", file, "--run-dir", tmp_path / "run", "--watch"]
        shown = in_terminal(*line, keys=b"\x03", until=b"identity")
        assert shown.endswith(b"status 130") and b"Traceback" not in shown
        assert b"\x1b[?25h" in shown, "the cursor is there again"
        command = [sys.executable, "-m", "vmodel", *map(str, line), "--json"]
        with subprocess.Popen(command, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None and run.stderr is not None
            for _ in range(2):
                assert json.loads(run.stdout.readline())["machine"] == "m"
            run.send_signal(signal.SIGINT)
            assert (run.wait(20), run.stderr.read()) == (130, "")


def test_watch_of_a_server_that_ends(tmp_path: Path, file: Path) -> None:
    with serving(file, "--run-dir", tmp_path / "run") as (server, _):
        command = [sys.executable, "-m", "vmodel", "iommu", "show", str(file), "--run-dir", str(tmp_path / "run"), "-w"]
        with subprocess.Popen(
            [*command, "--json"], env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            assert run.stdout is not None and run.stderr is not None
            run.stdout.readline()
            server.terminate()
            assert run.wait(20) == 2
            assert run.stderr.read().startswith(f"vmodel: no server runs in {tmp_path}/run: ")


def test_no_server(tmp_path: Path, file: Path) -> None:
    line = ["iommu", "show", file, "--run-dir", tmp_path]
    said = f"no server runs in {tmp_path}: start `vmodel serve`, `run` or `guest`, or name its --run-dir"
    for extra in ([], ["--json"], ["--watch"]):
        assert refused(vmodel(*line, *extra)) == said
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "m.control"))
    assert refused(vmodel(*line)) == said
    assert refused(vmodel("iommu", "show", tmp_path / "x.toml")).endswith("cannot be read: No such file or directory")
