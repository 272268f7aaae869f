"""What a loss of outputs has to tell: value, gradient, output Hessian and its square root."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from fxsparse.curvature.fisher_types import UnsupportedLoss


class OutputLoss(abc.ABC):
    """A loss of outputs z and targets y (None where the target is not needed).

    Attributes:
        natural: whether the loss is -log p of a likelihood in natural parameters, so that its true Fisher is its GGN.
        curved: whether `hessian_product` and `root_product` are known.
    """

    natural: bool = True
    curved: bool = True

    def axis(self, z: Tensor, y: Tensor | None) -> int:
        """Which axis of z holds the outputs of one unit; the last one, where a loss does not say otherwise.

        Outputs [N] have none, one output for each sample: see `spread`.
        """
        return z.ndim - 1

    def of_next(self) -> OutputLoss:
        """The same loss where outputs [N, T, C] at a position predict the next label of [N, T]: classes are last."""
        return self

    def valid(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Bool [N, positions...]: which units count; outputs [N] are one of each sample."""
        rows = z.detach()
        return torch.ones_like(rows if z.ndim == 1 else rows.movedim(self.axis(z, y), -1)[..., 0], dtype=torch.bool)

    def spread(self, units: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        """Values [N, positions...] of units, as they multiply what is like z."""
        return units if z.ndim == 1 else units.unsqueeze(self.axis(z, y))

    def columns(self, z: Tensor, y: Tensor | None) -> int:
        """How many columns the square root of H of one unit has."""
        return z.shape[self.axis(z, y)] if z.ndim > 1 else 1

    @abc.abstractmethod
    def value(self, z: Tensor, y: Any) -> Tensor:
        """The scalar sum of the losses of the valid units, differentiable."""

    @abc.abstractmethod
    def gradient(self, z: Tensor, y: Any) -> Tensor:
        """The gradient of `value` at z."""

    @abc.abstractmethod
    def hessian_product(self, z: Tensor, y: Any, v: Tensor) -> Tensor:
        """H v for v like z."""

    @abc.abstractmethod
    def root_product(self, z: Tensor, y: Any, u: Tensor) -> Tensor:
        """S u with S S^T = H, for u like z; the sketch takes random signs for u, the exact type unit vectors."""

    def root_column(self, z: Tensor, y: Any, column: int) -> Tensor:
        """Column `column` of a square root of H in every unit; fewer than `root_product` has where one is known."""
        unit = torch.zeros_like(z)
        (unit if z.ndim == 1 else unit.select(self.axis(z, y), column)).fill_(1.0)
        return self.root_product(z, y, unit)

    @abc.abstractmethod
    def draw_gradient(self, z: Tensor, y: Any, generator: torch.Generator | None = None) -> Tensor:
        """The gradient at a label drawn from the implied likelihood at z; the generator lives on the device of z.

        Raises:
            UnsupportedLoss: there is no such likelihood.
        """

    def hessian_diagonal(self, z: Tensor, y: Any) -> Tensor:
        """The diagonal of H, like z."""
        rows = range(self.columns(z, y))
        return torch.stack([self.root_column(z, y, column).square() for column in rows]).sum(0)

    def check_natural(self, z: Tensor, y: Any) -> None:
        """Raise UnsupportedLoss where the true Fisher of this loss is not its GGN."""
        if not self.natural:
            raise UnsupportedLoss(
                f"`loss` (={self}) is not the negative log-likelihood of natural parameters: there is no true Fisher; "
                "collect kind 'ggn' or 'empirical'"
            )
