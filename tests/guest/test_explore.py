"""`vmodel explore` finds the five bugs that are planted in the driver of examples/driver.

It takes about five minutes of two free cores (docs/exploration.md), and is the first test to start (tests/conftest.py).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmodel.patience import patience

pytestmark = pytest.mark.guest

FOLDER = Path(__file__).parents[2] / "examples" / "driver"
#: By plan of examples/driver/plans: what the signature of its bug's find begins with.
BUGS = {
    "unchecked-mapping": r"warn: WARNING: drivers/iommu/dma-iommu\.c iommu_dma_unmap_page",
    "double-free": r"crash in memcard_(read|write)_block ",
    "use-after-free": r"crash in memcard_execute ",
    "endless-loop": r"hang: time status: polling: memcard_execute\(\)",
    "stale-data": r"corruption: data",
}
#: After how many plans the search is asked whether it has found all; the last is its budget.
RUNS = (60, 80, 100, 120, 140, 160, 180, 200)


def bug_of(find: dict[str, Any]) -> str | None:
    return next((bug for bug, pattern in BUGS.items() if re.match(pattern, find["signature"])), None)


def test_all_planted_bugs_are_found(tmp_path: Path) -> None:
    # Other tests copy the example, and shall not meet what is built there.
    folder = tmp_path / "example"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("build", "*.runs"))
    store = tmp_path / "runs"
    command = [
        *(sys.executable, "-m", "vmodel", "explore", "memcard.toml"),
        *("--driver", "driver/", "--workload", "sh memcard.sh"),
        *("--sanitize", "--timeout", "15", "-j", "2", "--format", "json", "-o", str(store)),
    ]
    by_bug: dict[str, dict[str, Any]] = {}
    for runs in RUNS:
        # The same command with a larger budget goes on.
        line = [*command, "--runs", str(runs)]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=patience(900), check=False)
        assert done.returncode == 1, done.stderr[-2000:]
        said = json.loads(done.stdout)
        by_bug = {bug: find for find in said["found"] if (bug := bug_of(find)) is not None}
        if len(by_bug) == len(BUGS):
            break
    assert set(by_bug) == set(BUGS), f"{said['runs']} runs: {json.dumps(said['found'], indent=1)}"
    for find in by_bug.values():
        assert 1 <= len(find["rules"]) <= 3
        assert (store / Path(find["reproduce"]).name / "case.json").is_file()
    # Those that were repeated are stable enough for somebody else.
    repeated = [find for find in by_bug.values() if find["of"]]
    assert len(repeated) >= 3 and sum(find["again"] > 0 for find in repeated) >= 3
    assert said["reached"]["new"] > 50
