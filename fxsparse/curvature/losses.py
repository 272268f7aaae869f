"""Losses of model outputs: gradients, output Hessians and their square roots in closed form.

Outputs z are [N, C], or with positions [N, T, C] or [N, C, H, W]; every function here returns what has the shape of z.
A loss is a sum over units (rows of classes), never a mean over them; H is block diagonal over units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.curvature.fisher_types import CoupledSamples as CoupledSamples
from fxsparse.curvature.fisher_types import UnsupportedLoss
from fxsparse.curvature.losses_base import OutputLoss as OutputLoss
from fxsparse.curvature.losses_cross_entropy import CrossEntropy as CrossEntropy
from fxsparse.curvature.losses_cross_entropy import LogProbabilities as LogProbabilities
from fxsparse.curvature.losses_pointwise import MSE as MSE
from fxsparse.curvature.losses_pointwise import BCEWithLogits as BCEWithLogits


@dataclass(frozen=True, eq=False)
class CallableLoss(OutputLoss):
    """Any function ``loss(z, y)``; it is applied to each sample alone, whatever its reduction. Gradients only.

    Attributes:
        function: returns a tensor, of which the sum is taken.

    Raises:
        UnsupportedLoss: by its methods, where the function returns no tensor, or one without a gradient.
    """

    function: Callable[[Tensor, Any], Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "natural", False)
        object.__setattr__(self, "curved", False)

    def value(self, z: Tensor, y: Any) -> Tensor:
        """Sum over samples of the loss of each alone."""
        parts = [self.function(z[n : n + 1], _sample(y, n, len(z))) for n in range(len(z))]
        for part in parts:
            if not isinstance(part, Tensor):
                raise UnsupportedLoss(
                    f"`loss` (={self.function!r}) returns {type(part).__name__}: it must return a tensor, made of the "
                    "outputs by differentiable operations"
                )
        total = torch.stack([part.sum() for part in parts]).sum()
        if z.requires_grad and torch.is_grad_enabled() and not total.requires_grad:
            raise UnsupportedLoss(
                f"`loss` (={self.function!r}) returns what has no gradient at the outputs: no detach(), item() or "
                "argmax() may stand between them, nor may it be a constant"
            )
        return total

    def gradient(self, z: Tensor, y: Any) -> Tensor:
        """By autograd."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            return torch.autograd.grad(self.value(leaf, y), leaf)[0]

    def hessian_product(self, z: Tensor, y: Any, v: Tensor) -> Tensor:
        """By autograd, twice; H may be indefinite."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            slope = torch.autograd.grad(self.value(leaf, y), leaf, create_graph=True)[0]
            if not slope.requires_grad:
                return torch.zeros_like(z)
            return torch.autograd.grad(slope, leaf, v)[0]

    def root_product(self, z: Tensor, y: Any, u: Tensor) -> Tensor:
        """Not known."""
        raise UnsupportedLoss(f"`loss` (={self}) has no known square root of its output Hessian: take kind 'empirical'")

    def draw_gradient(self, z: Tensor, y: Any, generator: torch.Generator | None = None) -> Tensor:
        """Not known."""
        raise UnsupportedLoss(f"`loss` (={self}) has no known likelihood: take kind 'empirical'")


def _sample(y: Any, n: int, size: int) -> Any:
    if isinstance(y, Tensor):
        return y[n : n + 1] if y.ndim and len(y) == size else y
    if isinstance(y, (tuple, list)):
        return type(y)(_sample(each, n, size) for each in y)
    return {key: _sample(each, n, size) for key, each in y.items()} if isinstance(y, dict) else y


_FUNCTIONS: dict[Any, OutputLoss] = {
    F.cross_entropy: CrossEntropy(),
    F.nll_loss: LogProbabilities(),
    F.mse_loss: MSE("mean"),
    F.binary_cross_entropy_with_logits: BCEWithLogits("mean"),
}
_NAMES: dict[str, OutputLoss] = {
    "cross_entropy": CrossEntropy(),
    "mse": MSE("mean"),
    "bce": BCEWithLogits("sum"),
}


def as_loss(loss: Any, per_position: bool = False) -> OutputLoss:
    """The loss of that module, function or name.

    torch's losses keep their scale: a `mean` is taken over the outputs of one sample, never over samples; over those
    of one position where `per_position` says so.

    Raises:
        UnsupportedLoss: it is nothing of the kind, or has an option that is not covered.
    """
    own = _own(loss)
    return dataclasses.replace(own, per_position=True) if per_position and isinstance(own, MSE | BCEWithLogits) else own


def _own(loss: Any) -> OutputLoss:
    if isinstance(loss, OutputLoss):
        return loss
    if isinstance(loss, str) and loss in _NAMES:
        return _NAMES[loss]
    if isinstance(loss, type):
        raise UnsupportedLoss(f"`loss` (={loss.__name__}) is a class: give an instance, {loss.__name__}()")
    if type(loss) is nn.CrossEntropyLoss:
        return CrossEntropy(loss.ignore_index, loss.label_smoothing, loss.weight)
    if type(loss) is nn.NLLLoss:
        return LogProbabilities(loss.ignore_index, weight=loss.weight)
    if type(loss) is nn.MSELoss:
        return MSE("mean" if loss.reduction == "mean" else "sum")
    if type(loss) is nn.BCEWithLogitsLoss and loss.weight is None and loss.pos_weight is None:
        return BCEWithLogits("mean" if loss.reduction == "mean" else "sum")
    if callable(loss):
        known = _FUNCTIONS.get(loss) if not isinstance(loss, nn.Module) else None
        return CallableLoss(loss) if known is None else known
    known_names = ", ".join(map(repr, _NAMES))
    raise UnsupportedLoss(
        f"`loss` (={loss!r}) must be a torch loss, a function of outputs and targets, or {known_names}"
    )
