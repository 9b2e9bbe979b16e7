"""VFIO's type 1 answers as the cases of Linux's iommufd selftest check its VFIO compatibility: each row of `type1`."""

from __future__ import annotations

import pytest

from tests.linux.mock import Row, by_variant, check, name
from tests.linux.type1 import ROWS, Type1
from tests.spaces.world import World


@pytest.mark.parametrize(("row", "variant"), by_variant(ROWS), ids=name)
def test_container(world: World, row: Row, variant: str) -> None:
    check(row, Type1(world, int(variant != "none")))
