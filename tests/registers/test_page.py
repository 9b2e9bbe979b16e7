"""docs/registers.md: its code works."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pages import ROOT, files_of


def test_the_fields() -> None:
    space: dict[str, Any] = {"__name__": "page"}
    exec(files_of("docs/registers.md")["test_fields.py"][-1], space)
    space["test_values"]()


def test_the_card(tmp_path: Path) -> None:
    pytest.importorskip("systemrdl", reason="pip install 'vmodel[registers]'")
    block = re.search(r"```python\n(from vmodel.device.*?)```", (ROOT / "docs/registers.md").read_text(), re.DOTALL)
    assert block is not None
    shutil.copy(ROOT / "examples/registers/card.rdl", tmp_path)
    path = tmp_path / "card.py"
    path.write_text(block[1])
    space: dict[str, Any] = {"__name__": "page"}
    exec(compile(block[1], path, "exec"), space)
    space["Card"]().close()
