"""One factor by which all time-outs of guests are longer on a slow or busy machine: $VMODEL_SLOW."""

from __future__ import annotations

import os

from vmodel.errors import ConfigError


def slowness() -> float:
    """$VMODEL_SLOW, 1 or more; 1 where it is not set.  ConfigError: it is no such number."""
    text = os.environ.get("VMODEL_SLOW", "") or "1"
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1000:
        raise ConfigError(f"VMODEL_SLOW={text}: must be a number from 1 to 1000, such as 4")
    return factor


def patience(seconds: float) -> float:
    """How long to wait for what takes less than `seconds` on a machine at rest."""
    return seconds * slowness()


def spoken(seconds: float) -> str:
    """A time-out as messages have it: "15 s", with the factor if there is one."""
    factor = slowness()
    return f"{seconds:g} s" if factor == 1 else f"{seconds:g} s x {factor:g} (VMODEL_SLOW)"
