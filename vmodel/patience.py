"""$VMODEL_SLOW: a factor that makes time-outs of guests and commands longer, for a slow or busy machine."""

from __future__ import annotations

import os

from vmodel.errors import ConfigError


def slowness() -> float:
    """The factor, 1 to 1000; 1 if $VMODEL_SLOW is not set.  ConfigError: it is not such a number."""
    text = os.environ.get("VMODEL_SLOW", "") or "1"
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1000:
        raise ConfigError(f"VMODEL_SLOW={text}: must be a number from 1 to 1000, such as 4")
    return factor


def patience(seconds: float) -> float:
    """The time-out in seconds of an operation that takes less than `seconds` on an idle machine."""
    return seconds * slowness()


def spoken(seconds: float) -> str:
    """A time-out as text for messages: "15 s", with the factor if it is not 1."""
    factor = slowness()
    return f"{seconds:g} s" if factor == 1 else f"{seconds:g} s x {factor:g} (VMODEL_SLOW)"
