"""Running sums of per-unit values: ratio, variance and standard error, mergeable without order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsparse.errors import DataError

_EXACT_UP_TO = 1 << 20
_PROMOTE_AFTER = 1_000_000


@dataclass(eq=False)
class Moments:
    """Weighted sums over units n with values u_n (a vector) and masses m_n (samples: 1, sequences: valid tokens).

    Attributes:
        count: V1 = sum w; without weights the number of units K.
        squares: V2 = sum w^2.
        mass: M = sum w m.
        total: A = sum w u.
        spread: Q = sum w (u - mean u)^2; None where variances are not kept.
        cross: sum w (u - mean u)(m - mean m).
        mass_spread: sum w (m - mean m)^2.
    """

    count: float = 0.0
    squares: float = 0.0
    mass: float = 0.0
    mass_spread: float = 0.0
    total: Tensor | None = None
    spread: Tensor | None = None
    cross: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, masses: Tensor | None = None, weights: Tensor | None = None) -> Moments:
        """The moments of values [n, size].

        Args:
            values: u.
            masses: m [n]; ones where it is not given.
            weights: w [n], positive; ones where it is not given.
        """
        n = values.shape[0]
        if masses is None and weights is None:
            return cls._plain(values)
        u = values.to(_precision(values))
        m = torch.ones(n, dtype=torch.float64) if masses is None else masses.detach().cpu().double()
        w = torch.ones(n, dtype=torch.float64) if weights is None else weights.detach().cpu().double()
        count = float(w.sum())
        mean_m = float((w * m).sum()) / count
        wu = w.to(u)[:, None]
        total = (wu * u).sum(0)
        apart = u - total / count
        return cls(
            count,
            float((w * w).sum()),
            float((w * m).sum()),
            float((w * (m - mean_m).square()).sum()),
            total,
            (wu * apart.square()).sum(0),
            (wu * (m - mean_m).to(u)[:, None] * apart).sum(0),
        )

    @classmethod
    def _plain(cls, values: Tensor) -> Moments:
        n = values.shape[0]
        u = values.to(_precision(values), copy=True)
        total = u.sum(0)
        spread = u.sub_(total / n).square_().sum(0)
        return cls(float(n), float(n), float(n), 0.0, total, spread, torch.zeros_like(total))

    @classmethod
    def of_sum(cls, total: Tensor, units: int, mass: float) -> Moments:
        """The moments of a sum over units, of whose spread nothing is known."""
        return cls(float(units), float(units), mass, 0.0, total.to(_precision(total)))

    def merge(self, other: Moments) -> Moments:
        """The moments of both (Chan, Golub and LeVeque, 1983)."""
        if self.total is None or self.count == 0:
            return other
        if other.total is None or other.count == 0:
            return self
        both = self.count + other.count
        mine, theirs = self._promoted(both), other._promoted(both)
        assert mine.total is not None and theirs.total is not None
        apart_u = theirs.total / other.count - mine.total.to(theirs.total.device) / self.count
        apart_m = other.mass / other.count - self.mass / self.count
        share = self.count * other.count / both
        kept = mine.spread is not None and theirs.spread is not None
        return Moments(
            both,
            self.squares + other.squares,
            self.mass + other.mass,
            self.mass_spread + other.mass_spread + share * apart_m**2,
            mine.total.to(theirs.total.device) + theirs.total,
            _sum(mine.spread, theirs.spread, share * apart_u.square()) if kept else None,
            _sum(mine.cross, theirs.cross, share * apart_m * apart_u) if kept else None,
        )

    def mean(self) -> Tensor:
        """F = A / M.

        Raises:
            DataError: M is 0.
        """
        if self.total is None or not self.mass > 0:
            raise DataError("no unit was seen: update the collector first")
        return self.total / self.mass

    def variance(self) -> Tensor:
        """Unbiased variance of the values of a unit: Q / (V1 - V2 / V1), which is Q / (K - 1) without weights.

        Raises:
            DataError: fewer than two units, or variances are not kept.
        """
        free = self._freedom()
        assert self.spread is not None
        return self.spread / free

    def standard_error(self) -> Tensor:
        """Of `mean`: for masses of 1 sqrt(variance / n_eff), else of the ratio estimator over units.

        Raises:
            DataError: fewer than two units, or variances are not kept.
        """
        free = self._freedom()
        assert self.spread is not None and self.cross is not None
        f = self.mean()
        residual = (self.spread - 2 * f * self.cross + f.square() * self.mass_spread).clamp_min(0)
        mean_mass = self.mass / self.count
        return (residual / free / self.effective).sqrt() / mean_mass

    @property
    def effective(self) -> float:
        """The effective number of units, V1^2 / V2."""
        return self.count**2 / self.squares if self.squares else 0.0

    def _freedom(self) -> float:
        if self.spread is None:
            raise DataError("variances were not kept: make the collector with `variance` (=True)")
        free = self.count - self.squares / self.count if self.count else 0.0
        if not free > 0:
            raise DataError(f"a variance needs at least 2 units (={self.count:g}): update the collector further")
        return free

    def _promoted(self, count: float) -> Moments:
        if count <= _PROMOTE_AFTER or self.total is None or self.total.device.type == "mps":
            return self
        wide = [None if t is None else t.double() for t in (self.total, self.spread, self.cross)]
        return Moments(self.count, self.squares, self.mass, self.mass_spread, *wide)

    def to(self, device: torch.device | str) -> Moments:
        """The same on a device."""
        moved = [None if t is None else t.to(device) for t in (self.total, self.spread, self.cross)]
        return Moments(self.count, self.squares, self.mass, self.mass_spread, *moved)

    def numbers(self) -> dict[str, float]:
        """The scalars by name."""
        return {name: getattr(self, name) for name in ("count", "squares", "mass", "mass_spread")}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        found = {"total": self.total, "spread": self.spread, "cross": self.cross}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def restored(cls, numbers: Mapping[str, float], tensors: Mapping[str, Tensor]) -> Moments:
        """What `numbers` and `tensors` told."""
        held: dict[str, Any] = {**numbers, **{name: tensor.clone() for name, tensor in tensors.items()}}
        return cls(**held)


def _precision(values: Tensor) -> torch.dtype:
    """fp64 for what is small or fp64 already, else fp32; devices without fp64 take fp32."""
    if values.device.type == "mps":
        return torch.float32
    if values.dtype is torch.float64 or values.shape[-1] <= _EXACT_UP_TO:
        return torch.float64
    return torch.float32


def _sum(first: Tensor | None, second: Tensor | None, between: Tensor) -> Tensor:
    assert first is not None and second is not None
    return first.to(second.device) + second + between


@dataclass(eq=False)
class Decaying:
    """An exponential mean: num <- beta num + (1 - beta) A_k, den likewise of M_k; it reads num / den.

    Attributes:
        num: the decayed sum of values; None before the first step, zeros where it is known what shape it will have.
        den: the decayed sum of masses.
        steps: how many steps there were.
        count: V1 = sum w over units, w the weight of the step that they came with.
        squares: V2 = sum w^2 over units.
    """

    num: Tensor | None = None
    den: float = 0.0
    steps: int = 0
    count: float = 0.0
    squares: float = 0.0

    @property
    def effective(self) -> float:
        """The effective number of units, V1^2 / V2; 0 before the first step."""
        return self.count**2 / self.squares if self.squares else 0.0

    def step(self, total: Tensor | None, mass: float, beta: float, units: float | None = None) -> None:
        """One step; a `total` of None stands for zeros, and there are as many units as their mass where not said."""
        number = mass if units is None else units
        self.count = beta * self.count + (1 - beta) * number
        self.squares = beta**2 * self.squares + (1 - beta) ** 2 * number
        if self.num is not None:
            self.num = beta * self.num
        if total is not None:
            add = (1 - beta) * total
            self.num = add if self.num is None else self.num + add
        self.den = beta * self.den + (1 - beta) * mass
        self.steps += 1

    def mean(self) -> Tensor:
        """Num / den; zeros where there was no step.

        Raises:
            DataError: nothing was seen.
        """
        if self.num is None:
            raise DataError("no unit was seen: update the collector first")
        return self.num / self.den if self.den > 0 else torch.zeros_like(self.num)
