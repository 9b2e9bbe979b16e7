"""Rates with their confidence intervals, and quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: 95 % of a normal distribution are within this many standard deviations.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """`hits` of `of` runs."""

    hits: int
    of: int

    @property
    def share(self) -> float:
        """`hits / of`, from 0 to 1; 0 if `of` is 0."""
        return self.hits / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95 %, as (low, high).  It is valid for few runs, and for shares of 0 and 1, too.

        E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927.
        """
        if not self.of:
            return 0.0, 1.0
        n, p, z2 = self.of, self.share, _Z * _Z
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # For no hits the lower end is exactly 0, for all hits the upper end exactly 1: rounding must not change that.
        return (0.0 if not self.hits else max(middle - half, 0.0)), (1.0 if self.hits == n else min(middle + half, 1.0))

    def __str__(self) -> str:
        """As "67 % (30-90 %)"."""
        if not self.of:
            return "none"
        low, high = self.interval
        return f"{self.share:.0%} ({low * 100:.0f}–{high * 100:.0f} %)".replace("%", " %", 1)


def quantile(values: Sequence[float], q: float) -> float:
    """The quantile `q` (0 to 1) of the values, interpolated linearly.  ValueError: there are no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
