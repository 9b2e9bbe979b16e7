"""What the tests of virtio-iommu share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio.world import MACHINE, World
from vmodel.machine import parse


@pytest.fixture
def world() -> Iterator[World]:
    made = World(parse(MACHINE, Path("m.toml")))
    yield made
    made.driver.close()
    made.machine.close()
