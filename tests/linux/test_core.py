"""Calls of groups and domains answer as Linux's iommu core: each row of `core`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.linux.core import DIFFERENCES, ROWS, Core
from tests.linux.mock import Difference, Row, check, name


@pytest.fixture
def core() -> Iterator[Core]:
    made = Core()
    yield made
    made.world.close()


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_core(core: Core, row: Row) -> None:
    check(row, core)


@pytest.mark.parametrize("row", DIFFERENCES, ids=name)
def test_a_difference_is_still_there(core: Core, row: Difference) -> None:
    assert row.why
    check(row, core)
    assert row.expect != row.linux
