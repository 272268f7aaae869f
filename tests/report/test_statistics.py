"""Summaries against closed forms and published quantiles."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import DataError
from fxsparse.report.statistics import summarise, t_quantile


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=50))
def test_mean_and_deviation_match_the_standard_library(values: list[float]) -> None:
    got = summarise(values)
    assert got.mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    assert got.deviation == pytest.approx(statistics.stdev(values), abs=1e-12)
    assert got.half_width == pytest.approx(t_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def test_one_value_has_no_spread() -> None:
    got = summarise([0.5])
    assert (got.mean, got.deviation, got.half_width, got.count) == (0.5, None, None, 1)


def test_equal_values_have_zero_spread() -> None:
    got = summarise([0.9, 0.9, 0.9])
    assert got.deviation == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("values", [[], [math.nan], [0.1, math.inf]])
def test_nothing_or_not_finite(values: list[float]) -> None:
    with pytest.raises(DataError, match="finite"):
        summarise(values)


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 29, 30, 31, 40, 60, 120, 1000])
def test_quantile_integrates_to_the_level(freedom: int) -> None:
    """Simpson integration of Student's density up to the quantile gives 0.975."""
    t = t_quantile(freedom)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps = 4000
    h = t / steps
    heights = [scale * (1 + (i * h) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    area = h / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    assert 0.5 + area == pytest.approx(0.975, abs=3e-5)


def test_quantile_needs_a_degree_of_freedom() -> None:
    with pytest.raises(DataError, match=r"`freedom` \(=0\)"):
        t_quantile(0)
