from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.iommu.tables import Guest, ReferenceGuest, ShimGuest
from tests.iommu.world import World


@pytest.fixture(params=[ShimGuest, ReferenceGuest], ids=["shim", "reference"])
def guest(request: pytest.FixtureRequest) -> Guest:
    made = request.param()
    assert isinstance(made, Guest)
    return made


@pytest.fixture
def world() -> Iterator[World]:
    """A machine with RAM; IOMMUs and devices are added by the test."""
    made = World()
    yield made
    made.close()
