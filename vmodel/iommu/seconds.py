"""Times that callers give, in seconds."""

from __future__ import annotations


def check_seconds(what: str, seconds: float) -> None:
    """ValueError: less than 0, or NaN, with which a wait would have no end.  Infinity is a time."""
    if not seconds >= 0:
        raise ValueError(f"{what} must be 0 seconds or more, not {seconds}")
