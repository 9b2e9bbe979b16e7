"""Rates and quantiles against values from elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmodel.campaign.statistics import Rate, quantile


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I,
    # method 3; and 0 and all of 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (3, 3, 0.4385, 1.0),
    ],
)
def test_wilson(hits: int, of: int, low: float, high: float) -> None:
    assert Rate(hits, of).interval == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 5000), st.data())
def test_an_interval_holds_its_share(of: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, of))
    low, high = Rate(hits, of).interval
    assert 0 <= low <= hits / of <= high <= 1
    mirrored_low, mirrored_high = Rate(of - hits, of).interval
    assert (low, high) == (pytest.approx(1 - mirrored_high), pytest.approx(1 - mirrored_low))
    wider_low, wider_high = Rate(hits * 4, of * 4).interval
    assert wider_high - wider_low < high - low


def test_of_none() -> None:
    assert (Rate(0, 0).share, Rate(0, 0).interval, str(Rate(0, 0))) == (0.0, (0.0, 1.0), "none")


def test_how_rates_are_written() -> None:
    assert str(Rate(2, 3)) == "67 % (21–94 %)"


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles(values: list[float], q: float) -> None:
    found = quantile(values, q)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found <= max(values) + slack
    assert (quantile(values, 0), quantile(values, 1)) == (min(values), max(values))
    assert sum(value <= found + slack for value in values) >= int(q * len(values))


def test_the_median() -> None:
    assert (quantile([3, 1, 2], 0.5), quantile([4, 1, 2, 3], 0.5)) == (2, 2.5)
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)
