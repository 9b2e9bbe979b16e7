from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.inject.lab import Bench, bench


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Bench]:
    """A served device whose driver has started."""
    with bench(tmp_path) as made:
        yield made
