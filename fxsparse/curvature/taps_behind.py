"""Taps behind a layer: the identity, whose backward pass returns group squares as the gradients of statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.curvature.taps_call import is_watched
from fxsparse.curvature.taps_conv import ConvSpec, same_padding
from fxsparse.curvature.taps_formulas import EmbeddingWeight
from fxsparse.curvature.taps_fused import Statistics, check_not_exporting, fused_conv_product, fused_product
from fxsparse.curvature.taps_layout import Layout

_TABLES = 1 << 20
"""Up to how many values each sample's own gradient of an embedding is written out."""
_TOKENS_AT_ONCE = 512
"""Up to which length repeated tokens are added by comparing all pairs, which needs no sorting."""


class _Behind(torch.autograd.Function):
    """y, and the squares of what read x."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
        mask: Tensor | None,
        kind: str,
        options: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, of_weight, of_bias, mask)
        ctx.kind, ctx.options = kind, options
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        x, of_weight, of_bias, mask = ctx.saved_tensors
        weight = None
        if ctx.needs_input_grad[2]:
            held = x.to(delta.dtype) if x.is_floating_point() else x
            norm = (ctx.kind,) if ctx.kind in _NORMALISE else ()
            weight = _SQUARES.get(ctx.kind, _norm)(held, delta, mask, of_weight, *norm, *ctx.options)
        bias = _sums(delta, of_bias, ctx.kind).square().sum(0) if ctx.needs_input_grad[3] else None
        return delta, None, weight, bias, None, None, None


def _sums(p: Tensor, statistic: Tensor, kind: str) -> Tensor:
    """[N, size]: p [N, ...] of each sample summed over all axes that the parameter does not have."""
    n, size = p.shape[0], statistic.numel()
    p = p.to(statistic.dtype)
    if kind in _CHANNELS_SECOND and p.ndim > 1 and p.shape[1] == size:
        return p.flatten(2).sum(2) if p.ndim > 2 else p
    return p.reshape(n, -1, size).sum(1)


def _linear(x: Tensor, delta: Tensor, mask: Tensor | None, statistic: Tensor, axis: int) -> Tensor:
    n = len(x)
    d = delta.reshape(n, -1, delta.shape[-1])
    return fused_product(x.reshape(n, -1, x.shape[-1]), d, mask, axis, False, statistic.dtype)[0]


def _conv(
    x: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    statistic: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool,
    output_padding: tuple[int, ...],
    padding_mode: str,
    sides: tuple[int, ...],
) -> Tensor:
    dims = len(stride)
    if padding_mode != "zeros":
        x, padding = F.pad(x, sides, mode=padding_mode), (0,) * dims
    elif padding == "same":
        x, padding = same_padding(x, shape[2:], dilation)
    elif isinstance(padding, str):
        padding = (0,) * dims
    spec = ConvSpec(dims, stride, padding, dilation, groups, transposed, output_padding)
    return fused_conv_product(x, delta, shape, spec, mask, False, statistic.dtype)[0]


def _embedding(ids: Tensor, delta: Tensor, mask: Tensor | None, statistic: Tensor, padding: int | None) -> Tensor:
    n, rows = len(ids), statistic.numel()
    d = delta.reshape(n, -1, delta.shape[-1]).to(statistic.dtype)
    flat = ids.reshape(n, -1)
    if padding is not None:
        d = d * (flat != padding)[..., None]
    if n * rows * d.shape[2] <= _TABLES:
        places = (flat + rows * torch.arange(n, device=ids.device)[:, None]).flatten()
        tables = d.new_zeros((n * rows, d.shape[2])).index_add(0, places, d.flatten(0, 1))
        return tables.square().sum(1).view(n, rows).sum(0)
    if flat.shape[1] > _TOKENS_AT_ONCE:
        return EmbeddingWeight(flat, (rows, d.shape[2]), None).rows(d, Layout(0), n, None).sum(0)  # type: ignore[union-attr]  # no mask
    same = (flat[:, :, None] == flat[:, None, :]).to(d.dtype)
    each = ((d @ d.transpose(1, 2)) * same).sum(2)  # of token t with all equal ones; over them |sum d|^2
    return torch.zeros_like(statistic).index_add(0, flat.flatten(), each.flatten()).clamp_min(0)


def _norm(x: Tensor, delta: Tensor, mask: Tensor | None, statistic: Tensor, kind: str, *options: Any) -> Tensor:
    normalised = delta * _NORMALISE[kind](x, *options)
    return _sums(normalised, statistic, kind).square().sum(0)


def _batch_norm(x: Tensor, delta: Tensor, moments: Tensor | None, statistic: Tensor, eps: float) -> Tensor:
    """`moments` are [2, C], running means and variances as they were at the call."""
    assert moments is not None
    mean, variance = moments.to(x.dtype).unbind()
    normalised = F.batch_norm(x, mean, variance, eps=eps)
    return _sums(delta * normalised, statistic, "batch_norm").square().sum(0)


def _gate(x: Tensor, delta: Tensor, mask: Tensor | None, statistic: Tensor) -> Tensor:
    """X is the output itself, [N, H, ...]."""
    return (x * delta).flatten(2).sum(2, dtype=statistic.dtype).square().sum(0)


_NORMALISE: dict[str, Any] = {
    "layer_norm": lambda x, shape, eps: F.layer_norm(x, shape, None, None, eps),
    "rms_norm": lambda x, shape, eps: F.rms_norm(x, shape, None, eps),
    "group_norm": lambda x, groups, eps: F.group_norm(x, groups, None, None, eps),
    "instance_norm": lambda x, eps: F.instance_norm(x, eps=eps),
    "prelu": lambda x: x.clamp_max(0),
}
_CHANNELS_SECOND = ("conv", "group_norm", "instance_norm", "batch_norm", "prelu")
_SQUARES: dict[str, Any] = {
    "linear": _linear,
    "conv": _conv,
    "embedding": _embedding,
    "batch_norm": _batch_norm,
    "gate": _gate,
}


def tap_behind(
    y: Tensor,
    x: Tensor,
    statistics: Statistics,
    mask: Tensor | None,
    kind: str,
    options: tuple[Any, ...],
    fresh: bool,
) -> Tensor:
    """The tap behind a layer that computed y from x, samples along axis 0.

    Args:
        y: the output.
        x: the input.
        statistics: of the weight and of the bias.
        mask: the entries of the weight that count.
        kind: the kind of layer.
        options: its options.
        fresh: whether a copy of y is returned, for readers in place.
    """
    check_not_exporting()
    if is_watched():
        return y
    tapped: Tensor = _Behind.apply(y, x, *statistics, mask, kind, options)  # type: ignore[no-untyped-call]  # untyped in torch
    return tapped.clone() if fresh else tapped


def tap_behind_batch_norm(
    y: Tensor,
    x: Tensor,
    statistics: Statistics,
    mask: None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    fresh: bool,
) -> Tensor:
    """The tap behind a BatchNorm that is in evaluation mode; behind one in training mode its squares mean nothing.

    Args:
        y: the output.
        x: the input [N, C, ...].
        statistics: of the weight and of the bias.
        mask: none.
        mean: the running means [C].
        variance: the running variances [C].
        eps: what is added to the variances.
        fresh: whether a copy of y is returned, for readers in place.
    """
    return tap_behind(y, x, statistics, torch.stack([mean, variance]), "batch_norm", (eps,), fresh)


def gate_tap(y: Tensor, x: Tensor, statistics: Statistics, mask: None, fresh: bool) -> Tensor:
    """The tap behind an attention operator: squares of the gradient of a gate at 1 on each head, sum(y * dy).

    Raises:
        ValueError: y is not [N, heads, T, size].
    """
    heads = statistics[0]
    assert heads is not None
    if y.ndim != 4 or y.shape[1] != heads.numel():
        raise ValueError(f"the attention's output (={tuple(y.shape)}) must be [N, {heads.numel()}, T, size]")
    return tap_behind(y, y.detach(), statistics, None, "gate", (), fresh)
