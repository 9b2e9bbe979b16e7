"""`vmodel acpi`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, in_terminal, refused, vmodel
from vmodel.machine import load
from vmodel.patience import patience

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(("name", "table"), [("edu-viommu", "viot"), ("edu-vtd", "dmar")])
def test_command(name: str, table: str, tmp_path: Path) -> None:
    path, file = EXAMPLES / f"{name}.toml", tmp_path / "t.bin"
    wanted = dict(load(path).acpi_tables())[table.upper()]
    done = vmodel("acpi", path, "--table", table, "-o", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert file.read_bytes() == wanted
    line = [sys.executable, "-m", "vmodel", "acpi", str(path), "--table", table]
    piped = subprocess.run(line, capture_output=True, timeout=patience(60), cwd=ROOT)
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, wanted, b"")


def test_command_refuses(tmp_path: Path) -> None:
    vtd, viommu = EXAMPLES / "edu-vtd.toml", EXAMPLES / "edu-viommu.toml"
    none = 'has no [[iommu]] of kind "{}" with an address: there is no {}'
    assert refused(vmodel("acpi", vtd, "--table", "viot")) == f"{vtd}: {none.format('virtio-iommu', 'VIOT')}"
    assert refused(vmodel("acpi", viommu, "--table", "dmar")) == f"{viommu}: {none.format('vt-d', 'DMAR')}"
    plain = EXAMPLES / "edu.toml"
    assert refused(vmodel("acpi", plain, "--table", "dmar")) == f"{plain}: {none.format('vt-d', 'DMAR')}"
    assert refused(vmodel("acpi", tmp_path / "x.toml", "--table", "viot")).endswith("No such file or directory")
    place = tmp_path / "no" / "t.bin"
    assert refused(vmodel("acpi", vtd, "--table", "dmar", "-o", place)) == f"-o {place}: No such file or directory"
    assert refused(vmodel("acpi", vtd, "--table", "dmar", "-o", tmp_path)) == f"-o {tmp_path}: Is a directory"
    assert "--table" in refused(vmodel("acpi", vtd))
    assert "'ivrs'" in refused(vmodel("acpi", vtd, "--table", "ivrs"))


def test_command_keeps_bytes_off_terminals() -> None:
    shown = in_terminal("acpi", EXAMPLES / "edu-vtd.toml", "--table", "dmar")
    assert b"the table is binary: name a file with -o" in shown and b"DMAR" not in shown
    assert shown.endswith(b"status 2")
