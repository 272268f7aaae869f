"""Layers whose backward pass returns group squares beside the ordinary gradients, from one per-sample product.

The sum over samples of G_n = D_n^T X_n is the weight's gradient, so that its squares cost little more than that
gradient does. Statistics arrive as the gradients of parameters: squares summed over the batch and over all entries of a
slice, in the weight's own layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.curvature.taps_call import is_watched
from fxsparse.curvature.taps_conv import ConvSpec, per_sample_weight
from fxsparse.curvature.taps_formulas import product_rows
from fxsparse.errors import ExportError

_CHUNK = 1 << 19
_GRAM_FACTOR = 4
"""By how much the Gram form must be smaller: beside a gradient, the per-sample product adds about a quarter to it."""

Statistics = tuple[Tensor | None, Tensor | None]
"""Of the weight and of the bias."""


def fused_product(
    x: Tensor, d: Tensor, mask: Tensor | None, axis: int, gradient: bool, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Slice squares of G_n = D_n^T X_n summed over samples, and sum_n G_n.

    One position: D^2 and |X|^2. Several: the Gram form beside a product of the whole batch where T (i + o) is far
    below i o; else G_n itself, some samples at a time.

    Args:
        x: [N, T, i].
        d: [N, T, o].
        mask: [o, i], entries that count; None for all.
        axis: 0 for rows [o], 1 for columns [i].
        gradient: whether the sum is wanted.
        wide: in which dtype squares are summed.
    """
    n, t, i = x.shape
    o = d.shape[2]
    if t == 1:
        x, d = x[:, 0], d[:, 0]
        total = d.T @ x if gradient else None
        return _one_position(x.to(wide), d.to(wide), mask, axis), total
    if mask is None and _GRAM_FACTOR * t * (i + o) < i * o:
        total = d.flatten(0, 1).T @ x.flatten(0, 1) if gradient else None
        return product_rows(*((x, d) if axis == 0 else (d, x)), None).to(wide).sum(0), total
    step = max(1, _CHUNK // (i * o))
    squares, total = None, None
    for begin in range(0, n, step):
        g = d[begin : begin + step].transpose(1, 2) @ x[begin : begin + step]
        if gradient:
            total = _with_sum(total, g)
        own = slice_squares(g if mask is None else g * mask, axis, wide)
        squares = own if squares is None else squares + own
    assert squares is not None
    return squares, total


def _with_sum(total: Tensor | None, g: Tensor) -> Tensor:
    """The total so far and the sum of g over samples, as a product with ones, which is faster than a sum."""
    own = g[0] if len(g) == 1 else (g.new_ones(len(g)) @ g.flatten(1)).view(g.shape[1:])
    return own if total is None else total.add_(own)


def _one_position(x: Tensor, d: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    x, d = x.square(), d.square()
    if mask is not None:
        return (d * (x @ mask.to(x.dtype).T)).sum(0) if axis == 0 else (x * (d @ mask.to(x.dtype))).sum(0)
    return d.T @ x.sum(1) if axis == 0 else x.T @ d.sum(1)


def slice_squares(g: Tensor, axis: int, wide: torch.dtype) -> Tensor:
    """Squares of g [n, o, i, ...] summed over samples and all axes but 0 or 1 of the weight."""
    g = g.flatten(2) if axis == 0 else g.movedim(2, 1).flatten(2)
    norms: Tensor = torch.linalg.vector_norm(g, dim=2, dtype=wide)
    return norms.square().sum(0)


def squares_of_sums(sums: Tensor | None, statistic: Tensor | None) -> Tensor | None:
    """The squares of the gradients [N, ...] of single samples, added up; None without a statistic."""
    return None if sums is None or statistic is None else sums.to(statistic.dtype).square().sum(0)


class _FusedLinear(torch.autograd.Function):
    """y = x W^T + b of x [N, ..., i]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
        mask: Tensor | None,
        axis: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, of_weight, of_bias, mask)
        ctx.axis = axis
        y = F.linear(x, weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape) if y.ndim > 2 else y  # a view refuses readers in place

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        x, weight, of_weight, of_bias, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad
        into = delta @ weight.to(delta.dtype) if needs[0] else None
        n = x.shape[0]
        d = delta.reshape(n, -1, delta.shape[-1])
        squares = total = None
        if needs[3]:
            held = x.to(delta.dtype).reshape(n, -1, x.shape[-1])
            squares, total = fused_product(held, d, mask, ctx.axis, needs[1], of_weight.dtype)
        elif needs[1]:
            total = d.flatten(0, 1).T @ x.to(delta.dtype).reshape(-1, x.shape[-1])
        sums = d.sum(1) if needs[2] or needs[4] else None
        bias = sums.sum(0) if needs[2] and sums is not None else None
        return into, total, bias, squares, squares_of_sums(sums, of_bias if needs[4] else None), None, None


class _FusedConv(torch.autograd.Function):
    """A convolution with zero padding of x [N, C, spatial...]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
        mask: Tensor | None,
        spec: ConvSpec,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, of_weight, of_bias, mask)
        ctx.spec = spec
        return torch.convolution(
            x,
            weight,
            bias,
            spec.stride,
            spec.padding,
            spec.dilation,
            spec.transposed,
            spec.output_padding or (0,) * spec.dims,
            spec.groups,
        )

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        x, weight, of_weight, of_bias, mask = ctx.saved_tensors
        needs, spec = ctx.needs_input_grad, ctx.spec
        x, weight = x.to(delta.dtype), weight.to(delta.dtype)
        plain = needs[1] and not needs[3]
        into, total, _ = (
            torch.ops.aten.convolution_backward(
                delta,
                x,
                weight,
                None,
                list(spec.stride),
                list(spec.padding),
                list(spec.dilation),
                spec.transposed,
                list(spec.output_padding or (0,) * spec.dims),
                spec.groups,
                [needs[0], plain, False],
            )
            if needs[0] or plain
            else (None, None, None)
        )
        squares = None
        if needs[3]:
            shape = tuple(weight.shape)
            squares, total = fused_conv_product(x, delta, shape, spec, mask, needs[1], of_weight.dtype)
        sums = delta.flatten(2).sum(2) if needs[2] or needs[4] else None
        bias = sums.sum(0) if needs[2] and sums is not None else None
        return into, total, bias, squares, squares_of_sums(sums, of_bias if needs[4] else None), None, None


def fused_conv_product(
    x: Tensor,
    d: Tensor,
    shape: tuple[int, ...],
    spec: ConvSpec,
    mask: Tensor | None,
    gradient: bool,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """As `fused_product`, for convolutions: squares by output channel, or [in, out / groups] where it is transposed."""
    if spec.pointwise and all(size == 1 for size in shape[2:]):
        flat = None if mask is None else mask.flatten(1)
        x, d = x.flatten(2).transpose(1, 2), d.flatten(2).transpose(1, 2)
        squares, total = fused_product(x, d, flat, 0, gradient, wide)
        return squares, None if total is None else total.view(shape)
    step = max(1, min(8, _CHUNK // math.prod(shape)))
    squares_, total = None, None
    for begin in range(0, len(x), step):
        g = per_sample_weight(x[begin : begin + step], d[begin : begin + step], shape, spec)
        if gradient:
            total = _with_sum(total, g)
        g = g if mask is None else g * mask
        if spec.transposed:
            norms: Tensor = torch.linalg.vector_norm(g.flatten(3), dim=3, dtype=wide)
            own = norms.square().sum(0).flatten()
        else:
            own = slice_squares(g, 0, wide)
        squares_ = own if squares_ is None else squares_ + own
    assert squares_ is not None
    return squares_, total


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, statistics: Statistics, mask: Tensor | None, axis: int
) -> Tensor:
    """A linear layer with its taps; samples lie along axis 0 of x."""
    check_not_exporting()
    if is_watched():
        return F.linear(x, weight, bias)
    y: Tensor = _FusedLinear.apply(x, weight, bias, *statistics, mask, axis)  # type: ignore[no-untyped-call]  # untyped in torch
    return y


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Statistics,
    mask: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool,
    output_padding: tuple[int, ...],
) -> Tensor:
    """A convolution with its taps; samples lie along axis 0 of x."""
    check_not_exporting()
    if is_watched():
        return _convolution(x, weight, bias, stride, padding, dilation, groups, transposed, output_padding)
    spec = ConvSpec(len(stride), stride, padding, dilation, groups, transposed, output_padding)
    y: Tensor = _FusedConv.apply(x, weight, bias, *statistics, mask, spec)  # type: ignore[no-untyped-call]  # untyped in torch
    return y


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool,
    output_padding: tuple[int, ...],
) -> Tensor:
    """The operator that torch's own layer calls."""
    dims = len(stride) - 1
    if transposed:
        return (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims](
            x, weight, bias, stride, padding, output_padding, groups, dilation
        )
    return (F.conv1d, F.conv2d, F.conv3d)[dims](x, weight, bias, stride, padding, dilation, groups)


def check_not_exporting() -> None:
    """Raise ExportError inside of an export."""
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        raise ExportError("the model has Fisher taps: take them away with `Instrumented.removed` before it is exported")
