"""Convolutions: the weight gradient of each sample alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 4
"""Up to how many input channels windows are copied."""
_AT_ONCE = 8  # more groups leave the caches, and slow oneDNN down


@dataclass(frozen=True)
class ConvSpec:
    """The arguments of a convolution of `dims` spatial axes, each given once per axis."""

    dims: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def pointwise(self) -> bool:
        """Whether nothing but the kernel's size can make it differ from a linear layer at each position."""
        plain = all(s == 1 for s in self.stride) and all(p == 0 for p in (*self.padding, *self.output_padding))
        return plain and self.groups == 1 and not self.transposed


def same_padding(x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The padding of `padding="same"`: symmetric where it can be, else x with the odd zero added at the end."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(total % 2 for total in totals):
        odd = [side for total in reversed(totals) for side in (0, total % 2)]
        x = F.pad(x, odd)
    return x, tuple(total // 2 for total in totals)


def per_sample_weight(x: Tensor, delta: Tensor, shape: tuple[int, ...], spec: ConvSpec) -> Tensor:
    """G_n for each sample.

    Args:
        x: inputs [n, C_in, spatial...].
        delta: output gradients [n, C_out, spatial...].
        shape: of the weight.
        spec: the convolution.

    Returns:
        [n, *shape].
    """
    few = shape[1] <= _FEW and spec.groups == 1 and not spec.transposed
    part = _by_windows if few else _by_groups
    parts = [
        part(x[first : first + _AT_ONCE], delta[first : first + _AT_ONCE], shape, spec)
        for first in range(0, len(x), _AT_ONCE)
    ]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _by_windows(x: Tensor, delta: Tensor, shape: tuple[int, ...], spec: ConvSpec) -> Tensor:
    """A product with a copy of all windows, for few input channels, with which convolutions are slow."""
    n, dims = len(x), spec.dims
    if any(spec.padding):
        x = F.pad(x, [size for size in reversed(spec.padding) for _ in range(2)])
    for axis, (kernel, stride, dilation) in enumerate(zip(shape[2:], spec.stride, spec.dilation, strict=True), start=2):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    places, kernels = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    windows = x.permute(0, 1, *kernels, *places).reshape(n, math.prod(shape[1:]), -1)
    return (windows @ delta.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, *shape)


def _by_groups(x: Tensor, delta: Tensor, shape: tuple[int, ...], spec: ConvSpec) -> Tensor:
    """One weight gradient of a convolution whose groups are the samples."""
    n = x.shape[0]
    _, weight, _ = torch.ops.aten.convolution_backward(
        delta.reshape(1, n * delta.shape[1], *delta.shape[2:]),
        x.reshape(1, n * x.shape[1], *x.shape[2:]),
        x.new_empty((n * shape[0], *shape[1:])),
        None,
        list(spec.stride),
        list(spec.padding),
        list(spec.dilation),
        spec.transposed,
        list(spec.output_padding or (0,) * spec.dims),
        n * spec.groups,
        [False, True, False],
    )
    result: Tensor = weight.reshape(n, *shape)
    return result


def patches(x: Tensor, shape: tuple[int, ...], spec: ConvSpec) -> Tensor:
    """[n, C_in k..., T]: what each position of the output reads; 2-d, one group."""
    return F.unfold(x, shape[2:], spec.dilation, spec.padding, spec.stride)
