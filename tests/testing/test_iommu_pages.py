"""The code on the pages of IOMMUs works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, files_of, write_files
from vmodel.patience import patience

PAGE = "docs/iommu.md"
#: Blocks that are no files: each is whole.
BLOCKS = [
    block
    for page in (PAGE, "docs/iommufd.md", "docs/vt-d.md", "docs/iommu-and-linux.md")
    for block in re.findall(r"^```python\n(?!# FILE)(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
]


def test_files(tmp_path: Path) -> None:
    assert {"test_idea.py", "test_stale_line.py"} <= files_of(PAGE).keys()
    write_files(PAGE, tmp_path)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files_of(PAGE)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=patience(200), check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_block(block: str) -> None:
    exec(block, {})
