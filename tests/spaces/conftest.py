from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.spaces.vm import DATA, PAGE, Guest
from tests.spaces.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """A machine with RAM; IOMMUs and devices are added by the test."""
    made = World()
    yield made
    made.close()


@pytest.fixture
def guest(world: World) -> Iterator[Guest]:
    """A VM behind an SMMUv3; each page of its memory from DATA on begins with its own address."""
    made = Guest(world)
    for page in range(DATA, 16 * PAGE, PAGE):
        made.put(page, page)
    yield made
    made.context.close()
