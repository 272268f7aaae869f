"""The dense gradient of a layer that computes with alive entries only, for those who collect it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fxsparse.nn.functional import DenseGradients, Product, collecting
from fxsparse.nn.shared_conv import geometry_of, padded_input
from fxsparse.nn.shared_kernels import outer_gradient

WEIGHT, MASK = "weight", "weight_mask"


def wanted(module: nn.Module) -> bool:
    """Whether somebody collects the dense gradient of this weight."""
    return torch.is_grad_enabled() and any(each.wants(sink_of(module)) for each in collecting())


def sink_of(module: nn.Module) -> Tensor:
    """The tensor under which collectors file this layer's dense gradient."""
    mask = module._buffers.get(MASK)
    return mask if mask is not None else module._buffers["weight_columns"]  # type: ignore[return-value]  # packed


def watch(module: nn.Module, shape: torch.Size, input: Tensor, output: Tensor) -> None:
    """Hand dL/dW for every position, one dense product, to those who collect it once the backward pass gets here."""
    sink = sink_of(module)
    wanting = [each for each in collecting() if each.wants(sink)]
    output.register_hook(_DenseGradient(module, shape, input, wanting, sink))  # type: ignore[no-untyped-call]  # torch


class _DenseGradient:
    """Backward hook on a layer's output."""

    def __init__(
        self, module: nn.Module, shape: torch.Size, input: Tensor, wanting: list[DenseGradients], sink: Tensor
    ) -> None:
        self.module, self.shape, self.input, self.wanting, self.sink = module, shape, input, wanting, sink

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> None:
        wanting = [each for each in self.wanting if each.active]
        if not wanting:
            return
        weight = self.module._parameters[WEIGHT]
        assert weight is not None
        make = partial(_typed_gradient, self.module, self.shape, weight.dtype)
        product, dense = Product(self.input, gradient, self.shape, make), None
        for each in wanting:
            if each.defers(product):
                each.add_product(self.sink, product)
                continue
            dense = product.dense() if dense is None else dense
            each.add(self.sink, dense)


def _typed_gradient(
    module: nn.Module, shape: torch.Size, dtype: torch.dtype, input: Tensor, gradient: Tensor
) -> Tensor:
    """In the type that the layer multiplied in, wherever it is made."""
    with torch.autocast(input.device.type, enabled=False):
        return dense_gradient(module, shape, input.to(gradient.dtype), gradient).to(dtype)


def dense_gradient(module: nn.Module, shape: torch.Size, input: Tensor, gradient: Tensor) -> Tensor:
    """dL/dW from a layer's input and the gradient of its output."""
    if not isinstance(module, _ConvNd):
        return outer_gradient(input.reshape(-1, shape[1]), gradient.reshape(-1, shape[0]), None)
    if input.ndim < len(shape):
        input, gradient = input[None], gradient[None]
    padded, padding = padded_input(module, input)
    return outer_gradient(padded, gradient, geometry_of(module, padding, 1))
