"""Mean, spread and interval over a handful of seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxsparse.errors import DataError

# Two-sided 95 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """A few values in four numbers.

    Attributes:
        mean: arithmetic mean.
        deviation: sample standard deviation (n - 1); None for a single value.
        half_width: half of the 95 % confidence interval of the mean (Student's t); None for a single value.
        count: number of values.
    """

    mean: float
    deviation: float | None
    half_width: float | None
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation and 95 % interval of the mean.

    Raises:
        DataError: no value, or one that is not finite.

    >>> summarise([0.95, 0.96, 0.97])
    Summary(mean=0.96, deviation=0.01..., half_width=0.0248..., count=3)
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise DataError(f"`values` (={list(values)}) must hold at least one number, all of them finite")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Summary(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Summary(mean, deviation, t_quantile(count - 1) * deviation / math.sqrt(count), count)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with `freedom` >= 1 degrees of freedom, to three decimals.

    Beyond 30 it is read from the expansion z + (z^3 + z) / (4 f) (Abramowitz & Stegun 26.7.5), right to 1e-3.
    """
    if freedom < 1:
        raise DataError(f"`freedom` (={freedom}) must be at least 1: an interval needs two values")
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
