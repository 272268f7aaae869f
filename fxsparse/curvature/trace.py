"""Traces from products with random vectors."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fxsparse.errors import ConfigError


class Symmetric(Protocol):
    """What the estimators need of an operator."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        ...

    def mm(self, columns: Any) -> Any:
        """G V for V [n, k]."""
        ...


class TraceMethod(enum.Enum):
    """How a trace is estimated."""

    EXACT = "exact"
    """The sum of the exact diagonal."""
    HUTCHINSON = "hutchinson"
    """The mean of r^T G r, r random signs; variance 2 (|G|_F^2 - sum G_ii^2) / m, exact for diagonal matrices."""
    HUTCHPP = "hutch++"
    """m/3 products find a range Q, m/3 take its trace, m/3 estimate the rest (Meyer et al., arXiv 2010.09649)."""
    XTRACE = "xtrace"
    """Every test vector serves the range of the others and the rest (Epperly et al., arXiv 2301.07825)."""

    @classmethod
    def of(cls, method: TraceMethod | str) -> TraceMethod:
        """The method itself, or the one of that value; raises ConfigError where there is none."""
        try:
            return cls(method)
        except ValueError:
            known = ", ".join(each.value for each in cls)
            raise ConfigError(f"`method` (={method!r}) must be one of {known}") from None


@dataclass(frozen=True)
class TraceEstimate:
    """A trace.

    Attributes:
        value: The estimate.
        standard_error: Its standard error; 0 where it is exact, NaN where one vector tells none.
        products: Products with the operator.
        method: How.
    """

    value: float
    standard_error: float
    products: int
    method: TraceMethod

    def __float__(self) -> float:
        return self.value


def estimate_trace(
    operator: Symmetric, method: TraceMethod | str, m: int, generator: torch.Generator | None = None
) -> TraceEstimate:
    """The trace of a symmetric operator from `m` products, unbiased.

    Args:
        operator: Anything with `shape` and `mm`; where it has a `space` with a support, test vectors live there.
        method: See `TraceMethod`; "exact" multiplies by every unit vector.
        m: Products at most; at least 3 for Hutch++ and 4 for XTrace.
        generator: Source of the signs (CPU); a fixed one by default.

    Raises:
        ConfigError: an unknown method or too few products.
    """
    chosen = TraceMethod.of(method)
    least = {TraceMethod.HUTCHPP: 3, TraceMethod.XTRACE: 4}.get(chosen, 1)
    if not is_whole(m) or m < least:
        raise ConfigError(f"`m` (={m!r}) must be an integer of at least {least} for {chosen.value}")
    tests = _Tests(operator, torch.Generator().manual_seed(0) if generator is None else generator)
    if chosen is TraceMethod.HUTCHINSON:
        r = tests.signs(m)
        return _mean((r * tests.times(r)).sum(0), 0.0, m, chosen)
    if chosen is TraceMethod.HUTCHPP:
        return _hutchpp(tests, m)
    if chosen is TraceMethod.XTRACE:
        return _xtrace(tests, m)
    total = 0.0
    for index in torch.split(tests.coordinates, 64):
        basis = torch.zeros(tests.size, len(index), dtype=torch.float64)
        basis[index, torch.arange(len(index))] = 1.0
        total += float(tests.times(basis)[index, torch.arange(len(index))].sum())
    return TraceEstimate(total, 0.0, len(tests.coordinates), chosen)


def is_whole(value: Any) -> bool:
    """Whether a count is an integer, Python's or numpy's."""
    return isinstance(value, Integral)


class _Tests:
    """Products in float64 on the CPU, whatever the operator's dtype and device."""

    def __init__(self, operator: Symmetric, source: torch.Generator) -> None:
        self.operator, self.source, self.size = operator, source, operator.shape[0]
        space = getattr(operator, "space", None)
        support = getattr(space, "support", None)
        self.coordinates = torch.arange(self.size)
        if support is not None:
            self.coordinates = self.coordinates[support.cpu()]
        self.like = torch.empty(
            0, dtype=getattr(space, "dtype", torch.float64), device=getattr(space, "device", torch.device("cpu"))
        )

    def times(self, columns: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        found: Tensor = self.operator.mm(columns.to(self.like))
        return found.detach().cpu().double()

    def signs(self, count: int) -> Float[Tensor, "n k"]:
        """Random signs on the support."""
        found = torch.zeros(self.size, count, dtype=torch.float64)
        draws = torch.randint(2, (len(self.coordinates), count), generator=self.source)
        found[self.coordinates] = draws.double().mul_(2).sub_(1)
        return found


def _hutchpp(tests: _Tests, m: int) -> TraceEstimate:
    third = min(m // 3, len(tests.coordinates))
    q = _range(tests.times(tests.signs(third)))
    head = float((q * tests.times(q)).sum()) if q.shape[1] else 0.0
    r = tests.signs(m // 3)
    r = r - q @ (q.mT @ r)
    rest = (r * tests.times(r)).sum(0)
    return _mean(rest, head, third + q.shape[1] + m // 3, TraceMethod.HUTCHPP)


def _xtrace(tests: _Tests, m: int) -> TraceEstimate:
    k = min(m // 2, len(tests.coordinates))
    omega = tests.signs(k)
    y = tests.times(omega)
    q = _range(y)
    z = tests.times(q) if q.shape[1] else q
    h = q.mT @ z
    if q.shape[1] < k:  # the range is whole: nothing is left to estimate
        return TraceEstimate(float(h.trace()), 0.0, k + q.shape[1], TraceMethod.XTRACE)
    r = q.mT @ y  # G omega = Q r
    s = torch.linalg.inv(r).mT
    s = s / s.norm(dim=0)  # column i is orthogonal to every other column of r
    w = q.mT @ omega
    x = w - s * (s * w).sum(0)  # omega_i in the range of the other vectors
    heads = h.trace() - (s * (h @ s)).sum(0)
    # mu_i = omega_i - Q x_i -> mu_i^T G mu_i
    rests = (omega * y).sum(0) - ((z.mT @ omega) * x).sum(0) - (x * r).sum(0) + (x * (h @ x)).sum(0)
    return _mean(heads + rests, 0.0, 2 * k, TraceMethod.XTRACE)


def _range(columns: Float[Tensor, "n k"]) -> Float[Tensor, "n r"]:
    """An orthonormal basis of the columns' span; directions at rounding level are left out."""
    u: Tensor
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    if not s.numel():
        return u
    tiny = max(columns.shape) * torch.finfo(columns.dtype).eps * float(s[0])
    return u[:, s > tiny]


def _mean(samples: Tensor, offset: float, products: int, method: TraceMethod) -> TraceEstimate:
    count = len(samples)
    error = float(samples.std()) / math.sqrt(count) if count > 1 else math.nan
    return TraceEstimate(offset + float(samples.mean()), error, products, method)
