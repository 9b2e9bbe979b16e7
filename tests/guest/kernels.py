"""The kernels that guest tests run on, by role; `scripts/test --kernels NAME,...` chooses others."""

from __future__ import annotations

import os

from vmodel.guest.artifacts import CLOUD, KERNELS, ArtifactError, find_kernel

#: What was chosen comes by the environment, as tests run in several processes.
CHOSEN = tuple(filter(None, os.environ.get("VMODEL_TEST_KERNELS", "").split(","))) or KERNELS
#: Those, and the one with fewer drivers if it is there: for tests that need no driver that it has not.
WITH_CLOUD = tuple(dict.fromkeys((*CHOSEN, CLOUD)))


def is_there(kernel: str) -> bool:
    """Whether the cache has it."""
    try:
        find_kernel(kernel)
    except ArtifactError:
        return False
    return True
