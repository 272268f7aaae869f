"""Losses of model outputs: gradients, output Hessians and their square roots in closed form.

Outputs z are [N, C], or with positions [N, T, C] or [N, C, H, W]; every function here returns what has the shape of z.
A loss is a sum over units (rows of classes), never a mean over them; H is block diagonal over units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.curvature.fisher_types import CoupledSamples as CoupledSamples
from fxsparse.curvature.fisher_types import UnsupportedLoss
from fxsparse.curvature.losses_base import OutputLoss as OutputLoss
from fxsparse.errors import ConfigError, DataError


def _last(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, -1)


@dataclass(frozen=True, eq=False)
class CrossEntropy(OutputLoss):
    """Softmax cross-entropy of class indices or of class probabilities (soft targets).

    Attributes:
        ignore_index: units with this label do not count.
        label_smoothing: share of the label spread over all classes.
        weight: class weights w [C]: H = (sum_c t_c w_c)(diag p - p p^T), with no likelihood.
        class_axis: the axis of the classes in z; None finds it from the shape of the targets, torch's axis 1 first,
            and without targets takes 1 for images and the last axis otherwise.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    class_axis: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "natural", self.weight is None)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ConfigError(f"`label_smoothing` (={self.label_smoothing}) must lie in [0, 1]")

    def axis(self, z: Tensor, y: Tensor | None) -> int:
        """The axis of the classes."""
        if self.class_axis is not None:
            return self.class_axis % z.ndim
        if y is None:
            return z.ndim - 1 if z.ndim == 3 else min(1, z.ndim - 1)
        if y.shape == z.shape[:1] + z.shape[2:] or (y.shape == z.shape and z.ndim != 3):
            return 1
        if y.shape == z.shape[:-1] or y.shape == z.shape:
            return z.ndim - 1
        raise DataError(
            f"targets of shape {tuple(y.shape)} fit no outputs of shape {tuple(z.shape)}: give class indices or "
            "probabilities for each row of outputs"
        )

    def valid(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Which units have a label other than `ignore_index`."""
        if y is None or y.is_floating_point():
            return super().valid(z, y)
        return y != self.ignore_index

    def columns(self, z: Tensor, y: Tensor | None) -> int:
        """One less than the classes (Tanabe and Sagae, 1992)."""
        return max(z.shape[self.axis(z, y)] - 1, 0)

    def value(self, z: Tensor, y: Any) -> Tensor:
        """Sum of -sum_c t_c w_c log p_c."""
        log_p = _last(z, self.axis(z, y)).log_softmax(-1)
        return -(self._targets(z, y) * log_p).sum()

    def gradient(self, z: Tensor, y: Any) -> Tensor:
        """(sum_c t_c) p - t, the t weighted."""
        if y is None:
            raise DataError("the empirical Fisher needs targets: give (inputs, targets)")
        axis = self.axis(z, y)
        t = self._targets(z, y)
        p = _last(z, axis).softmax(-1)
        return (t.sum(-1, keepdim=True) * p - t).movedim(-1, axis)

    def hessian_product(self, z: Tensor, y: Any, v: Tensor) -> Tensor:
        """(diag p - p p^T) v, times the units' weights."""
        axis = self.axis(z, y)
        p, v = _last(z, axis).softmax(-1), _last(v, axis)
        return (self._mass(z, y) * p * (v - (p * v).sum(-1, keepdim=True))).movedim(-1, axis)

    def hessian_diagonal(self, z: Tensor, y: Any) -> Tensor:
        """P (1 - p), times the units' weights."""
        axis = self.axis(z, y)
        p = _last(z, axis).softmax(-1)
        rest = _others(p)
        return (self._mass(z, y) * p * rest).movedim(-1, axis)

    def root_product(self, z: Tensor, y: Any, u: Tensor) -> Tensor:
        """sum_c u_c sqrt(p_c)(e_c - p), times the roots of the units' weights."""
        axis = self.axis(z, y)
        p, u = _last(z, axis).softmax(-1), _last(u, axis)
        scaled = p.sqrt() * u
        return (self._mass(z, y).sqrt() * (scaled - p * scaled.sum(-1, keepdim=True))).movedim(-1, axis)

    def root_column(self, z: Tensor, y: Any, column: int) -> Tensor:
        """Column j of the Cholesky factor of diag p - p p^T, zero above the diagonal (Tanabe and Sagae, 1992)."""
        axis = self.axis(z, y)
        p = _last(z, axis).softmax(-1)
        tails = p.flip(-1).cumsum(-1).flip(-1)  # q_{j-1} = sum_{k >= j} p_k
        before, after, own = tails[..., column], tails[..., column + 1], p[..., column]
        tiny = torch.finfo(p.dtype).tiny
        result = torch.zeros_like(p)
        result[..., column] = (own * after / before.clamp_min(tiny)).sqrt()
        ratio = (own / before.clamp_min(tiny)).sqrt() / after.clamp_min(tiny).sqrt()
        result[..., column + 1 :] = -p[..., column + 1 :] * ratio[..., None]
        return (self._mass(z, y).sqrt() * result).movedim(-1, axis)

    def draw_gradient(self, z: Tensor, y: Any, generator: torch.Generator | None = None) -> Tensor:
        """P - e_c for c drawn from p."""
        self.check_natural(z, y)
        axis = self.axis(z, y)
        p = _last(z, axis).softmax(-1)
        flat = p.reshape(-1, p.shape[-1])
        drawn = torch.multinomial(flat, 1, generator=generator)
        gradient = flat.scatter_add(-1, drawn, -torch.ones_like(drawn, dtype=p.dtype)).view_as(p)
        return (self._mass(z, y) * gradient).movedim(-1, axis)

    def check_natural(self, z: Tensor, y: Any) -> None:
        """Class weights, and soft targets that do not sum to one, are no likelihood."""
        super().check_natural(z, y)
        if y is not None and y.is_floating_point():
            sums = _last(y, self.axis(z, y)).sum(-1)
            if not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-4):
                raise UnsupportedLoss(
                    "soft targets must sum to 1 for the true Fisher; normalise them or take kind 'ggn'"
                )

    def _targets(self, z: Tensor, y: Tensor) -> Tensor:
        """Weighted target probabilities, the classes last; zeros for ignored units."""
        axis = self.axis(z, y)
        classes = z.shape[axis]
        if y.is_floating_point():
            t = _last(y, axis).to(z.dtype)
        else:
            _check_labels(y, classes, self.ignore_index)
            known = (y != self.ignore_index).to(z.dtype)
            t = F.one_hot(torch.where(known > 0, y, 0).long(), classes).to(z.dtype) * known[..., None]
        if self.label_smoothing:
            share, total = self.label_smoothing, t.sum(-1, keepdim=True)
            t = (1 - share) * t + share / classes * total
        return t if self.weight is None else t * self.weight.to(z)

    def _mass(self, z: Tensor, y: Tensor | None) -> Tensor:
        """The total weight of each unit [N, positions..., 1]: 1, 0 where ignored, sum_c t_c w_c with class weights."""
        if y is None:
            if self.weight is not None:
                raise DataError("class weights need targets: give (inputs, targets)")
            return torch.ones((), dtype=z.dtype, device=z.device)
        if self.weight is None and not y.is_floating_point():
            return self.valid(z, y)[..., None].to(z.dtype)
        return self._targets(z, y).sum(-1, keepdim=True)


def _others(p: Tensor) -> Tensor:
    """The sum over the other classes, 1 - p without cancellation."""
    total = p.sum(-1, keepdim=True) - p
    return torch.where(p > 0.5, _rest_of_largest(p), total)


def _rest_of_largest(p: Tensor) -> Tensor:
    largest = p.argmax(-1, keepdim=True)
    return p.scatter(-1, largest, 0.0).sum(-1, keepdim=True)


def _check_labels(y: Tensor, classes: int, ignored: int) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:  # values cannot be read under a transform
        return
    wrong = (y != ignored) & ((y < 0) | (y >= classes))
    if bool(wrong.any()):
        raise DataError(f"label {int(y[wrong][0])} is no class of {classes}: labels run from 0, or are {ignored}")


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


@dataclass(frozen=True, eq=False)
class CallableLoss(OutputLoss):
    """Any function ``loss(z, y)``; it is applied to each sample alone, whatever its reduction. Gradients only.

    Attributes:
        function: returns a tensor, of which the sum is taken.
    """

    function: Callable[[Tensor, Any], Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "natural", False)
        object.__setattr__(self, "curved", False)

    def value(self, z: Tensor, y: Any) -> Tensor:
        """Sum over samples of the loss of each alone."""
        parts = [self.function(z[n : n + 1], _sample(y, n, len(z))).sum() for n in range(len(z))]
        return torch.stack(parts).sum()

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


_FUNCTIONS: dict[Any, OutputLoss] = {
    F.cross_entropy: CrossEntropy(),
    F.mse_loss: MSE("mean"),
    F.binary_cross_entropy_with_logits: BCEWithLogits("mean"),
}
_NAMES: dict[str, OutputLoss] = {
    "cross_entropy": CrossEntropy(),
    "mse": MSE("mean"),
    "bce": BCEWithLogits("sum"),
}


def as_loss(loss: Any) -> OutputLoss:
    """The loss of that module, function or name.

    torch's losses keep their scale: a `mean` is taken over the outputs of one sample, never over samples.

    Raises:
        UnsupportedLoss: it is nothing of the kind, or has an option that is not covered.
    """
    if isinstance(loss, OutputLoss):
        return loss
    if isinstance(loss, str) and loss in _NAMES:
        return _NAMES[loss]
    if type(loss) is nn.CrossEntropyLoss:
        return CrossEntropy(loss.ignore_index, loss.label_smoothing, loss.weight)
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
