"""A small campaign in guests: the example's, with one kernel, one seed and some of its faults."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.cli.commands import vmodel
from vmodel.patience import patience

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "examples" / "driver"
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


#: The functions of the kernel that say "WARNING" are reached by one of the two plans alone.
COVERED = """
[campaign]
name = "memcard"
kernels = ["stable"]
seeds = 1
coverage = ["memcard", "vmlinux:__warn"]

[[machine]]
file = "memcard.toml"

[[workload]]
name = "copy"
run = "sh memcard.sh"
timeout = "20s"

[[plan]]
file = "plans/stale-data.toml"
expect = ["silent corruption"]

[[plan]]
file = "plans/unchecked-mapping.toml"
expect = ["detected and failed"]
"""


def test_what_each_plan_reaches(tmp_path: Path) -> None:
    """The driver's own error handling, and a function that without faults nobody calls, in JSON and on the page."""
    shutil.copytree(DRIVER, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build", "*.runs"))
    (tmp_path / "card.toml").write_text(COVERED)
    line = [sys.executable, "-m", "vmodel", "campaign", "card.toml"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=patience(240), check=False)
    assert done.returncode == 0, done.stderr

    said = json.loads(vmodel("report", "card.runs", "--format", "json", cwd=tmp_path).stdout)["coverage"]
    assert said["notes"] == []
    (build,) = said["builds"]
    assert (build["runs"], build["clean_runs"]) == (3, 1)
    warn = next(f for module in build["modules"] for f in module["functions"] if f["name"] == "__warn")
    assert warn["instructions"]["clean"] == 0 < warn["instructions"]["only_faults"]
    only = {fault["name"]: {f["name"] for f in fault["functions"]} for fault in build["faults"]}
    assert {"__warn", "memcard_write"} <= only["unchecked-mapping"]
    assert only["stale-data"] == {"memcard_execute"}
    assert any(branch["signs"] for branch in build["never_taken"] if branch["module"] == "memcard")

    assert vmodel("report", "card.runs", "-o", "report.html", cwd=tmp_path).returncode == 0
    page = (tmp_path / "report.html").read_text()
    faults = re.search('<section id="c1-faults">.*?</section>', page, re.DOTALL)
    assert faults and ">__warn " in faults[0] and ">memcard_execute " in faults[0]
    data = re.search('id="c1-data">([^<]*)<', page)
    assert data
    files = {
        path: (text, lines) for path, text, lines in json.loads(zlib.decompress(base64.b64decode(data[1])))["files"]
    }
    text, lines = files[str(tmp_path / "driver" / "memcard.c")]
    reach = {row.strip(): lines.get(str(n)) for n, row in enumerate(text, 1) if lines.get(str(n)) is not None}
    assert reach["return memcard_complete(queue, request);"] == 2
    assert reach["memcard_recover(queue);"] == 1, "after a time-out, which no run without faults has"
