"""A bounded run of each fuzz target: VMODEL_FUZZ_SECONDS, from the corpus, with a fixed seed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import Target, run, targets
from vmodel.guest.artifacts import ArtifactError, find_clang

pytestmark = pytest.mark.slow

SECONDS = int(os.environ.get("VMODEL_FUZZ_SECONDS", "5"))


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_target(target: Target, tmp_path: Path) -> None:
    """No crash, leak, hang or endless memory; and it did run."""
    if target.is_c:
        try:
            find_clang()
        except ArtifactError as error:
            pytest.skip(str(error))
    elif sys.version_info >= (3, 14):
        pytest.skip("Atheris has no wheels for this Python")
    outcome = run(target, tmp_path / "found", seconds=SECONDS, seed=1)
    assert outcome.ok, f"{outcome}; input {outcome.artifact}\n{outcome.log[-6000:]}"
    assert outcome.executions > 100 and outcome.coverage > 10, outcome.log[-2000:]
    print(outcome)
