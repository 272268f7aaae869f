"""Softmax cross-entropy: gradients, output Hessian and its square root in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.curvature.fisher_types import UnsupportedLoss
from fxsparse.curvature.losses_base import OutputLoss
from fxsparse.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class CrossEntropy(OutputLoss):
    """Softmax cross-entropy of class indices or of class probabilities (soft targets).

    Attributes:
        ignore_index: units with this label do not count.
        label_smoothing: share of the label spread over all classes.
        weight: class weights w [C]: H = (sum_c t_c w_c)(diag p - p p^T), with no likelihood.
        class_axis: the axis of the classes in z; None takes torch's axis 1 where the shape of the targets allows that
            (always for probabilities), else the last axis, which is that of labels [N, T] for outputs [N, T, C];
            without targets 1 for images and the last axis otherwise.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    class_axis: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "natural", self.weight is None)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ConfigError(f"`label_smoothing` (={self.label_smoothing}) must lie in [0, 1]")

    def of_next(self) -> CrossEntropy:
        """With the classes last, unless `class_axis` says where they are."""
        return self if self.class_axis is not None else replace(self, class_axis=-1)

    def axis(self, z: Tensor, y: Tensor | None) -> int:
        """The axis of the classes.

        Raises:
            DataError: there is none, or the targets do not fit the outputs.
        """
        if z.ndim < 2:
            raise DataError(
                f"outputs (={tuple(z.shape)}) must have an axis of classes, [N, C]: for one logit of each sample take "
                "loss 'bce'"
            )
        if y is None:
            images = z.ndim != 3
            return self.class_axis % z.ndim if self.class_axis is not None else 1 if images else z.ndim - 1
        if not isinstance(y, Tensor):
            raise DataError(f"targets (={type(y).__name__}) must be a tensor of class indices or probabilities")
        axes = (1, z.ndim - 1) if self.class_axis is None else (self.class_axis % z.ndim,)
        for axis in axes:
            wanted = z.shape if y.is_floating_point() else z.shape[:axis] + z.shape[axis + 1 :]
            if y.shape == wanted:
                return axis
        raise DataError(
            f"targets (={y.dtype}, {tuple(y.shape)}) fit no outputs of shape {tuple(z.shape)}: give class indices, "
            "which are integers, or probabilities for each row of outputs"
        )

    def valid(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Which units have a label other than `ignore_index`.

        Raises:
            DataError: a label is no class.
        """
        axis = self.axis(z, y)
        if y is None or y.is_floating_point():
            return super().valid(z, y)
        _check_labels(y, z.shape[axis], self.ignore_index)
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
        p = _last(z, axis).softmax(-1)
        if not (y.is_floating_point() or self.label_smoothing or self.weight is not None):
            _check_labels(y, z.shape[axis], self.ignore_index)
            known = (y != self.ignore_index)[..., None]
            found: Tensor = (known * p).scatter_add(-1, (known * y[..., None]).long(), -known.to(p.dtype))
            return found.movedim(-1, axis)
        t = self._targets(z, y)
        return (t.sum(-1, keepdim=True) * p - t).movedim(-1, axis)

    def hessian_product(self, z: Tensor, y: Any, v: Tensor) -> Tensor:
        """(diag p - p p^T) v, times the units' weights."""
        axis = self.axis(z, y)
        p, v = _last(z, axis).softmax(-1), _last(v, axis)
        v = v - v.gather(-1, p.argmax(-1, keepdim=True))  # H 1 = 0; what is left does not cancel where p is near 1
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
        whole = scaled - p * scaled.sum(-1, keepdim=True)
        nearly = scaled * _rest_of_largest(p) - p * _rest_of_largest(scaled, p)  # the same at the largest p
        return (self._mass(z, y).sqrt() * torch.where(p > 0.5, nearly, whole)).movedim(-1, axis)

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
        axis = self.axis(z, y)
        if y is not None and y.is_floating_point():
            if self.class_axis is None:
                _check_sums(y)
            sums = _last(y, axis).sum(-1)
            if not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-4):
                raise UnsupportedLoss(
                    "soft targets must sum to 1 for the true Fisher; normalise them or take kind 'ggn'"
                )

    def _targets(self, z: Tensor, y: Tensor) -> Tensor:
        """Weighted target probabilities, the classes last; zeros for ignored units."""
        axis = self.axis(z, y)
        classes = z.shape[axis]
        if y.is_floating_point():
            if self.class_axis is None:
                _check_sums(y)
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


@dataclass(frozen=True, eq=False)
class LogProbabilities(CrossEntropy):
    """Negative log-likelihood -w_y z_y of log-probabilities z, as the cross-entropy of z, which is the same function.

    log_softmax changes nothing of log-probabilities, so that values, gradients and Hessians by the parameters agree;
    the Hessian of -z_y itself is 0, and so would be the GGN.
    """

    def valid(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Which units have a label other than `ignore_index`; here outputs are looked at, also for Hessians."""
        self._check(z, y)
        return super().valid(z, y)

    def _targets(self, z: Tensor, y: Tensor) -> Tensor:
        self._check(z, y)
        return super()._targets(z, y)

    def _mass(self, z: Tensor, y: Tensor | None) -> Tensor:
        self._check(z, y)
        return super()._mass(z, y)

    def _check(self, z: Tensor, y: Tensor | None) -> None:
        if y is not None and y.is_floating_point():
            raise DataError("NLLLoss takes class indices; give CrossEntropyLoss for targets that are probabilities")
        if torch._C._functorch.peek_interpreter_stack() is not None:  # values cannot be read under a transform
            return
        z = z.detach()
        far = z.double().logsumexp(self.axis(z, y)).abs().max() if z.numel() else z.new_zeros(())
        if not float(far) <= torch.finfo(z.dtype).eps ** 0.5:
            raise DataError(
                f"NLLLoss takes log-probabilities, and the logarithm of the outputs' sum is {float(far):.3g} instead "
                "of 0: end the model with LogSoftmax, or give CrossEntropyLoss"
            )


def _others(p: Tensor) -> Tensor:
    """The sum over the other classes, 1 - p without cancellation."""
    total = p.sum(-1, keepdim=True) - p
    return torch.where(p > 0.5, _rest_of_largest(p), total)


def _rest_of_largest(x: Tensor, p: Tensor | None = None) -> Tensor:
    """The sum of x over all classes but the one of the largest p (of x itself, where there is no p)."""
    largest = (x if p is None else p).argmax(-1, keepdim=True)
    return x.scatter(-1, largest, 0.0).sum(-1, keepdim=True)


def _check_labels(y: Tensor, classes: int, ignored: int) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:  # values cannot be read under a transform
        return
    if not y.numel():
        return
    low, high = y.aminmax()
    if int(low) >= 0 and int(high) < classes:
        return
    wrong = ((y < 0) | (y >= classes)) & (y != ignored)
    if bool(wrong.any()):
        raise DataError(f"label {int(y[wrong][0])} is no class of {classes}: labels run from 0, or are {ignored}")


def _check_sums(y: Tensor) -> None:
    """Refuse probabilities over the last axis of several, which torch's cross-entropy would take along axis 1."""
    if y.ndim < 3 or torch._C._functorch.peek_interpreter_stack() is not None:
        return
    first, last = (y.detach().double().sum(axis).sub(1).abs().max() for axis in (1, -1))
    if float(last) <= _SUMS < float(first):
        raise DataError(
            f"targets (={tuple(y.shape)}) sum to 1 over their last axis, and the classes of a cross-entropy are along "
            "axis 1: give CrossEntropy(class_axis=-1) for outputs whose classes are last"
        )


_SUMS = 1e-3  # also of probabilities in half precision


def _last(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, -1)
