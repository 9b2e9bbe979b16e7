"""Controllers with their drivers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.nvme.driver import Driver, start


@pytest.fixture
def started() -> Iterator[Callable[..., Driver]]:
    """Makes controllers that are enabled, from parameters; ends them."""
    made: list[Driver] = []

    def make(**params: Any) -> Driver:
        made.append(start(params or None))
        return made[-1]

    yield make
    for driver in made:
        errors = driver.device.errors
        driver.device.close()
        driver.close()
        assert not errors, "the model failed"


@pytest.fixture
def driver(started: Callable[..., Driver]) -> Driver:
    """A controller with a namespace of 1 MiB in memory, enabled."""
    return started()
