"""examples/campaign is a sound campaign file, and docs/campaign-report.html is what came of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.commands import vmodel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_stock_drivers_campaign(tmp_path: Path) -> None:
    folder = tmp_path / "campaign"
    shutil.copytree(ROOT / "examples" / "campaign", folder, ignore=shutil.ignore_patterns("*.runs", "__pycache__"))
    program = [folder / "gpio_check", folder / "gpio_check.c"]
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", *program], check=True)
    done = vmodel("campaign", "drivers.toml", "--dry-run", cwd=folder)
    assert done.returncode == 0, done.stderr
    *runs, total = done.stdout.splitlines()
    assert total == f"drivers.toml: {len(runs)} runs"
    cases = {re.sub(r" \(.*", "", run) for run in runs}
    report = (ROOT / "docs" / "campaign-report.html").read_text()
    assert len(re.findall(r'id="run-\d+"', report)) == len(runs)
    for case in cases:
        plan = case.split(" / ")[2]
        assert plan.replace("'", "&#39;") in report, plan
    assert not re.search(r'(src|href)="(https?:|/)|/home/|/tmp/|/root/', report)
