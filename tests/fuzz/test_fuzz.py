"""A bounded run of each fuzz target."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 15


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Atheris has no wheels for this Python")
def test_channel(tmp_path: Path) -> None:
    line = [sys.executable, "tests/fuzz/fuzz_channel.py", f"-max_total_time={SECONDS}", "-timeout=10"]
    line += [f"-artifact_prefix={tmp_path}/", "-print_final_stats=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS + 120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    executed = int(done.stderr.partition("stat::number_of_executed_units:")[2].split()[0])
    assert executed > 100
