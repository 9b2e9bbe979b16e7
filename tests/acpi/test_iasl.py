"""VIOT and DMAR, as ACPICA's iasl decodes them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.acpi.machines import EXAMPLES, VIOMMU, VTD, bridged, described, tables, two, with_ats
from vmodel.guest.artifacts import find_iasl
from vmodel.machine import load, parse
from vmodel.patience import patience

pytestmark = pytest.mark.slow  # it is fetched


def iasl(folder: Path, *arguments: str) -> str:
    """What it says."""
    line = [str(find_iasl()), *arguments]
    done = subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=patience(60), stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def complaints(folder: Path, table: bytes) -> list[str]:
    """The lines in which iasl is not content with a table."""
    (folder / "table.bin").write_bytes(table)
    said = iasl(folder, "-d", "-p", "table", "table.bin") + (folder / "table.dsl").read_text()
    assert " decoded" in said
    return [
        line for line in said.splitlines() if re.search(r"(?i)warning|error|incorrect|unknown|invalid|\*\*\*", line)
    ]


def test_iasl_reads_rmrr_and_andd(tmp_path: Path) -> None:
    assert complaints(tmp_path, described(tmp_path)) == []
    text = (tmp_path / "table.dsl").read_text()
    assert "Reserved Memory Region" in text and "0000000070001FFF" in text
    assert "_SB.UART" in text


@pytest.mark.parametrize(
    "what", ["edu-viommu", "edu-vtd", "bridged-viommu", "bridged-vtd", "two", "one of each", "ats"]
)
def test_iasl_is_content(what: str, tmp_path: Path) -> None:
    """It decodes the table without a warning, and makes the same bytes of what it has decoded."""
    if what.startswith("bridged"):
        machine = bridged(VIOMMU if what.endswith("viommu") else VTD)
    elif what in ("two", "one of each"):
        machine = parse(two(VIOMMU, VIOMMU if what == "two" else VTD), tmp_path / "m.toml")
    elif what == "ats":
        machine = with_ats()
    else:
        machine = load(EXAMPLES / f"{what}.toml")
    for table in tables(machine).values():
        assert complaints(tmp_path, table) == []
        assert "0 Errors, 0 Warnings, 0 Remarks" in iasl(tmp_path, "-p", "again", "table.dsl")
        again = (tmp_path / "again.aml").read_bytes()
        own = {9, *range(28, 36)}  # the checksum, and who has compiled it: that is iasl now
        assert len(again) == len(table)
        assert [n for n in range(len(table)) if table[n] != again[n] and n not in own] == []


@pytest.mark.parametrize(("at", "value", "says"), [(9, 0, "Incorrect checksum"), (48, 9, "Unknown")])
def test_iasl_would_complain(at: int, value: int, says: str, tmp_path: Path) -> None:
    table = bytearray(tables(load(EXAMPLES / "edu-viommu.toml"))["VIOT"])
    table[at] = value
    assert any(says in line for line in complaints(tmp_path, bytes(table)))
