"""A small campaign in guests: the example's, with one kernel, one seed and some of its faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import vmodel
from vmodel.patience import patience

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "faults"
pytestmark = pytest.mark.guest


def test_the_example(tmp_path: Path) -> None:
    (tmp_path / "nvme.toml").write_text((EXAMPLE / "nvme.toml").read_text())
    head, *plans = (EXAMPLE / "campaign.toml").read_text().split("[[plan]]")
    head = head.replace('kernels = ["stable", "backports"]', 'kernels = ["stable"]').replace("seeds = 3", "seeds = [1]")
    assert head.count('"stable"') == 1 and "[1]" in head
    # A workload's own modules and tools, without which it fails.
    first = 'run = """\nlspci -s 0000:00:04.0 | grep -q Non-Volatile || exit 1'
    head = head.replace('modules = ["nvme"]', "", 1).replace('run = """', first, 1)
    head += '\nmodules = ["nvme"]\ntools = ["pciutils:lspci"]\n'
    assert first in head
    chosen = [plan for plan in plans if '"lost completion"' in plan or '"flipped bit"' in plan]
    (tmp_path / "nvme.campaign.toml").write_text("[[plan]]".join([head, *chosen]))
    line = [sys.executable, "-m", "vmodel", "campaign", "nvme.campaign.toml", "-o", "runs"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=patience(240), check=False)
    assert done.returncode == 0, done.stderr

    report = vmodel("report", "runs", "--format", "json", cwd=tmp_path)
    said = json.loads(report.stdout)
    assert {run["plan"]: run["outcome"] for run in said["runs"]} == {
        "no faults": "not activated",
        "lost completion": "detected and recovered",
        "flipped bit": "silent corruption",
    }
    assert all(run["expected"] for run in said["runs"])
    lost = said["runs"][1]
    # The driver's time limit, of 2 s, twice: it aborts the command, then it resets the controller.
    assert lost["time_to_detect"] > 1.5 and lost["time_to_recover"] > 3
    assert any("timeout, reset controller" in signature["example"] for signature in said["signatures"])
    assert (tmp_path / lost["artefacts"]["kernel log"]).read_text().count("timeout") >= 2
    assert set(lost["versions"]) == {"vmodel", "python", "qemu", "kernel"}
    page = vmodel("report", "runs", "-o", "report.html", cwd=tmp_path)
    assert page.returncode == 0 and "timeout, reset controller" in (tmp_path / "report.html").read_text()
