"""A LayerNorm whose backward pass returns group squares beside the ordinary gradients, from the sums of each sample."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.curvature.taps_behind import tap_behind
from fxsparse.curvature.taps_call import is_watched
from fxsparse.curvature.taps_fused import Statistics, check_not_exporting, squares_of_sums


class _FusedLayerNorm(torch.autograd.Function):
    """y = (x - mean) scale W + b of x [N, ..., *shape]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, scale, of_weight, of_bias)
        ctx.shape, ctx.eps = shape, eps
        return y

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        x, weight, mean, scale, of_weight, of_bias = ctx.saved_tensors
        needs, shape = ctx.needs_input_grad, ctx.shape
        into = None
        if needs[0]:
            into = torch.ops.aten.native_layer_norm_backward(
                delta, x, shape, mean, scale, weight, None, [True, False, False]
            )[0]
        n, size = len(x), math.prod(shape)
        weights = biases = None
        if needs[1] or needs[3]:
            if torch.is_grad_enabled():  # the moments that are held have no derivative
                weights = (F.layer_norm(x, shape, eps=ctx.eps) * delta).reshape(n, -1, size).sum(1)
            else:
                weights = (scale.reshape(n, 1, -1) @ (x - mean).mul_(delta).reshape(n, -1, size)).squeeze(1)
        if needs[2] or needs[4]:
            biases = delta.reshape(n, -1, size).sum(1)
        return (
            into,
            _total(weights, shape, needs[1]),
            _total(biases, shape, needs[2]),
            squares_of_sums(weights, of_weight if needs[3] else None),
            squares_of_sums(biases, of_bias if needs[4] else None),
            None,
            None,
        )


def _total(sums: Tensor | None, shape: tuple[int, ...], wanted: bool) -> Tensor | None:
    return sums.sum(0).view(shape) if wanted and sums is not None else None


def fused_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Statistics,
    mask: None,
    shape: tuple[int, ...],
    eps: float,
) -> Tensor:
    """A LayerNorm with its taps; samples lie along axis 0 of x. Under autocast the tap is behind torch's own."""
    check_not_exporting()
    if is_watched():
        return F.layer_norm(x, shape, weight, bias, eps)
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        y = F.layer_norm(x, shape, weight, bias, eps)
        return tap_behind(y, x, statistics, None, "layer_norm", (shape, eps), True)
    tapped: Tensor = _FusedLayerNorm.apply(x, weight, bias, *statistics, shape, eps)  # type: ignore[no-untyped-call]  # untyped in torch
    return tapped
