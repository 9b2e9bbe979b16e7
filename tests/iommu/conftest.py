from __future__ import annotations

import pytest

from tests.iommu.tables import Guest, ReferenceGuest, ShimGuest


@pytest.fixture(params=[ShimGuest, ReferenceGuest], ids=["shim", "reference"])
def guest(request: pytest.FixtureRequest) -> Guest:
    made = request.param()
    assert isinstance(made, Guest)
    return made
