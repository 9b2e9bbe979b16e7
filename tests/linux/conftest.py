from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.spaces.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """A machine with RAM."""
    made = World()
    yield made
    made.close()
