"""Losses of each output alone: Bernoulli cross-entropy of logits, and squared error. H is diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.curvature.fisher_types import UnsupportedLoss
from fxsparse.curvature.losses_base import OutputLoss
from fxsparse.errors import ConfigError, DataError


@dataclass(frozen=True)
class BCEWithLogits(OutputLoss):
    """Bernoulli cross-entropy of logits against targets in [0, 1], like z.

    Attributes:
        reduction: "sum" over the outputs of a sample, or "mean", which divides by their number and is a likelihood
            only for a single output.
        per_position: whether the outputs of a position count, instead of those of a sample.
    """

    reduction: str = "sum"
    per_position: bool = False

    def __post_init__(self) -> None:
        _check_reduction(self.reduction, ("sum", "mean"))

    def value(self, z: Tensor, y: Any) -> Tensor:
        """Sum of log(1 + e^z) - y z."""
        return self._scale(z) * F.binary_cross_entropy_with_logits(z, _like(z, y), reduction="sum")

    def gradient(self, z: Tensor, y: Any) -> Tensor:
        """Sigma(z) - y."""
        return self._scale(z) * (z.sigmoid() - _like(z, y))

    def hessian_product(self, z: Tensor, y: Any, v: Tensor) -> Tensor:
        """Sigma(z) sigma(-z) v."""
        return self.hessian_diagonal(z, y) * v

    def hessian_diagonal(self, z: Tensor, y: Any) -> Tensor:
        """Sigma(z) sigma(-z)."""
        return self._scale(z) * z.sigmoid() * (-z).sigmoid()

    def root_product(self, z: Tensor, y: Any, u: Tensor) -> Tensor:
        """The root of the diagonal, times u."""
        return self.hessian_diagonal(z, y).sqrt() * u

    def draw_gradient(self, z: Tensor, y: Any, generator: torch.Generator | None = None) -> Tensor:
        """Sigma(z) - y for y drawn from it."""
        self.check_natural(z, y)
        p = z.sigmoid()
        return p - torch.bernoulli(p, generator=generator)

    def check_natural(self, z: Tensor, y: Any) -> None:
        """A mean over several outputs is no likelihood."""
        count = _outputs(z, self.per_position)
        if self.reduction == "mean" and count > 1:
            raise UnsupportedLoss(
                f"`reduction` (='mean') over {count} outputs is no likelihood; take BCEWithLogits('sum') or kind 'ggn'"
            )

    def _scale(self, z: Tensor) -> float:
        return 1.0 / _outputs(z, self.per_position) if self.reduction == "mean" else 1.0


@dataclass(frozen=True)
class MSE(OutputLoss):
    """Squared error against targets like z: H = c I.

    Attributes:
        reduction: "sum" is |z - y|^2 (c = 2), "mean" divides by the number of outputs of a sample (c = 2/C), "half" is
            |z - y|^2 / (2 sigma^2) (c = 1/sigma^2).
        sigma: the standard deviation of "half".
        per_position: whether the outputs of a position count, instead of those of a sample.
    """

    reduction: str = "sum"
    sigma: float = 1.0
    per_position: bool = False

    def __post_init__(self) -> None:
        _check_reduction(self.reduction, ("sum", "mean", "half"))
        if not self.sigma > 0:
            raise ConfigError(f"`sigma` (={self.sigma}) must be positive")

    def curvature(self, z: Tensor) -> float:
        """The factor c of H = c I."""
        return {"sum": 2.0, "mean": 2.0 / _outputs(z, self.per_position), "half": self.sigma**-2}[self.reduction]

    def value(self, z: Tensor, y: Any) -> Tensor:
        """Half of c |z - y|^2."""
        return 0.5 * self.curvature(z) * (z - _like(z, y)).square().sum()

    def gradient(self, z: Tensor, y: Any) -> Tensor:
        """C (z - y)."""
        return self.curvature(z) * (z - _like(z, y))

    def hessian_product(self, z: Tensor, y: Any, v: Tensor) -> Tensor:
        """C v."""
        return self.curvature(z) * v

    def hessian_diagonal(self, z: Tensor, y: Any) -> Tensor:
        """C everywhere."""
        return torch.full_like(z, self.curvature(z))

    def root_product(self, z: Tensor, y: Any, u: Tensor) -> Tensor:
        """The root of c, times u."""
        return math.sqrt(self.curvature(z)) * u

    def draw_gradient(self, z: Tensor, y: Any, generator: torch.Generator | None = None) -> Tensor:
        """The root of c times a standard normal: y is drawn from N(z, I/c), the data's residual plays no part."""
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return math.sqrt(self.curvature(z)) * noise


def _outputs(z: Tensor, per_position: bool) -> int:
    return max(z.shape[-1] if per_position and z.ndim > 1 else math.prod(z.shape[1:]), 1)


def _like(z: Tensor, y: Any) -> Tensor:
    if y is None:
        raise DataError("this loss needs targets: give (inputs, targets)")
    if not isinstance(y, Tensor) or y.numel() != z.numel() or (y.ndim == z.ndim and y.shape != z.shape):
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise DataError(f"targets (={shape}) must have the shape of the outputs, {tuple(z.shape)}")
    return y.reshape(z.shape).to(z.dtype)


def _check_reduction(reduction: str, known: tuple[str, ...]) -> None:
    if reduction not in known:
        raise ConfigError(f"`reduction` (={reduction!r}) must be one of {', '.join(map(repr, known))}")
