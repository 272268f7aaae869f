"""Convolutions whose weight has a shared support, and what their padding and strides mean to a product."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from fxsparse.nn.shared_kernels import Geometry
from fxsparse.nn.shared_product import Index, Rows, Watcher, format_of, product


def padded_input(module: _ConvNd, input: Tensor) -> tuple[Tensor, list[int]]:
    """The input with what a convolution cannot pad itself, and what is left to pad."""
    axes = len(module.kernel_size)
    around = list(module._reversed_padding_repeated_twice)
    before, after = around[::2][::-1], around[1::2][::-1]
    if before == after and (module.padding_mode == "zeros" or not any(before)):
        return input, before
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(input, around, mode=mode).contiguous(memory_format=format_of(input)), [0] * axes


def geometry_of(module: _ConvNd, padding: list[int], groups: int) -> Geometry:
    """How a convolution moves over its input."""
    return Geometry(module.kernel_size, module.stride, tuple(padding), module.dilation, groups)


def convolved(
    module: _ConvNd,
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Index,
    rows: Rows,
    sink: Tensor,
    watcher: Watcher | None = None,
) -> Tensor:
    """A convolution with alive values only, of a batch or of a single image."""
    single = input.ndim == len(module.kernel_size) + 1
    padded, padding = padded_input(module, input[None] if single else input)
    geometry = geometry_of(module, padding, rows.groups)
    if set(geometry.kernel) == {1} and not any(padding) and set(geometry.stride) != {1}:
        steps = tuple(slice(None, None, step) for step in geometry.stride)
        form = format_of(padded)
        padded = padded[(slice(None), slice(None), *steps)].contiguous(memory_format=form)
        geometry = dataclasses.replace(geometry, stride=(1,) * len(steps))
    output = product(padded, values, bias, index, rows, geometry, sink, watcher=watcher)
    return output[0] if single else output
