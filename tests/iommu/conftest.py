from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.iommu.tables import Guest, ReferenceGuest, ShimGuest
from tests.iommu.vtd_bench import Bench, ScalableBench
from tests.iommu.world import World, iommu


@pytest.fixture(params=[ShimGuest, ReferenceGuest], ids=["shim", "reference"])
def guest(request: pytest.FixtureRequest) -> Guest:
    made = request.param()
    assert isinstance(made, Guest)
    return made


@pytest.fixture
def world() -> Iterator[World]:
    """Segment 0 behind one VT-d."""
    made = World(iommu())
    yield made
    made.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A VT-d unit in legacy mode."""
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def scalable() -> Iterator[ScalableBench]:
    """A VT-d unit in scalable mode."""
    made = ScalableBench()
    yield made
    made.close()
