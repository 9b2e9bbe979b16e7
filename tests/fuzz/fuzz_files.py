"""Machine files, plans and campaign files: each is taken, or it is a ConfigError, which has a line for each mistake.

What could name files of the host is left out.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmodel.machine", "vmodel.inject", "vmodel.campaign"]):
    from vmodel.campaign.schema import load
    from vmodel.campaign.toml import plan_text
    from vmodel.errors import ConfigError
    from vmodel.inject.plan import FaultPlan
    from vmodel.machine import parse

from tests.fuzz.harness import fuzz

CAMPAIGN = Path("c.toml")


def one_input(data: bytes) -> None:
    """A byte that says what it is, then the text."""
    text = data[1:].decode("utf-8", "replace")
    if any(word in text for word in ("path", ".py", "/", "\\")):
        return
    try:
        if data[:1] == b"p":
            plan = FaultPlan.parse(text, Path("p.toml"))
            again = FaultPlan.parse(plan_text(plan), Path("p.toml"))
            assert again.plain() == plan.plain()
        elif data[:1] == b"c":
            CAMPAIGN.write_bytes(data[1:])
            load(CAMPAIGN)
        else:
            parse(text, Path("m.toml")).close()
    except ConfigError as error:
        assert str(error).strip()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        fuzz(one_input)
