"""How many examples properties try."""

from __future__ import annotations

import os

from hypothesis import settings


def examples(n: int) -> int:
    """`n`, times what the profile of tests/conftest.py tries of others; fewer with the sanitizers, which are slow."""
    return n * settings().max_examples // 100 // (4 if "VMODEL_SANITIZED" in os.environ else 1)
