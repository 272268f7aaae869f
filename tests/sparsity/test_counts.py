from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError
from fxsparse.sparsity import Target, check_sparsity, dead_count, fraction_count, keep_count


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"),
    [
        (10, 0.9, 1),
        (16, 0.5, 8),
        (7, 0.5, 4),
        (100, 0.29, 71),
        (3, 1 / 3, 2),
        (6, 1 / 3, 4),
        (1000, 0.999, 1),
        (9408, 0.8, 1882),
        (432, 0.9, 44),
    ],
)
def test_golden_keep_counts(n: int, sparsity: float, kept: int) -> None:
    assert keep_count(n, sparsity) == kept
    assert dead_count(n, sparsity) == n - kept


def test_naive_products_would_be_wrong() -> None:
    assert int((1 - 0.9) * 10) == 0 and keep_count(10, 0.9) == 1
    assert int(0.29 * 100) == 28 and dead_count(100, 0.29) == 29


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 10**6), thousandths=st.integers(0, 999))
def test_counts_are_those_of_exact_decimals(n: int, thousandths: int) -> None:
    exact = Fraction(thousandths, 1000)
    assert dead_count(n, thousandths / 1000) == math.floor(exact * n)
    assert fraction_count(thousandths / 1000, n) == math.floor(exact * n)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 10**9), sparsity=st.floats(0, 1, exclude_max=True))
def test_at_least_one_stays_alive(n: int, sparsity: float) -> None:
    assert 1 <= keep_count(n, sparsity) <= n


def test_zero_sparsity_keeps_everything() -> None:
    assert keep_count(17, 0.0) == 17 and keep_count(17, 0) == 17


@pytest.mark.parametrize("bad", [1.0, -1e-9, 2, math.nan, math.inf, True, "0.5", None])
def test_sparsity_outside_its_range_is_refused(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"`alpha` \(="):
        check_sparsity(bad, "alpha")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        keep_count(4, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_counts_need_elements(n: object) -> None:
    with pytest.raises(ConfigError, match="`n`"):
        keep_count(n, 0.5)  # type: ignore[arg-type]


def test_fraction_count_golden_and_range() -> None:
    assert fraction_count(0.25, 9) == 2
    assert fraction_count(1 / 3, 6) == 2
    assert fraction_count(0.29, 100) == 29
    assert fraction_count(1.0, 5) == 5 and fraction_count(0.0, 5) == 0 and fraction_count(0.5, 0) == 0
    for fraction, alive in [(1.1, 5), (-0.1, 5), (math.nan, 5), (0.5, -1)]:
        with pytest.raises(ConfigError):
            fraction_count(fraction, alive)


def test_target() -> None:
    assert Target.of(432, 0.9) == Target(0.9, 44)
    assert Target.dense(5) == Target(0.0, 5)
    with pytest.raises(ConfigError, match="alive"):
        Target(0.5, 0)
    with pytest.raises(ConfigError, match="sparsity"):
        Target(1.0, 3)
