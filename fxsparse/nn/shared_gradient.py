"""The dense gradient of a layer that computes with alive entries only, for those who collect it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fxsparse.nn.functional import DenseGradients, Product, collecting
from fxsparse.nn.shared_kernels import Geometry, outer_gradient
from fxsparse.nn.shared_product import Watcher

WEIGHT, MASK = "weight", "weight_mask"


def wanted(module: nn.Module) -> bool:
    """Whether somebody collects the dense gradient of this weight."""
    return torch.is_grad_enabled() and any(each.wants(sink_of(module)) for each in collecting())


def sink_of(module: nn.Module) -> Tensor:
    """The tensor under which collectors file this layer's dense gradient."""
    mask = module._buffers.get(MASK)
    return mask if mask is not None else module._buffers["weight_columns"]  # type: ignore[return-value]  # packed


def watcher_of(module: nn.Module, shape: torch.Size) -> Watcher:
    """Hands dL/dW for every position, one dense product, to those who collect it now, in each backward pass."""
    sink = sink_of(module)
    return _DenseGradient(module, shape, [each for each in collecting() if each.wants(sink)], sink)


class _DenseGradient:
    """What a product calls in its backward pass with its input and the gradient of the weight's rows."""

    def __init__(self, module: nn.Module, shape: torch.Size, wanting: list[DenseGradients], sink: Tensor) -> None:
        self.module, self.shape, self.wanting, self.sink = module, shape, wanting, sink

    def __call__(self, input: Tensor, gradient: Tensor, geometry: Geometry | None) -> None:
        wanting = [each for each in self.wanting if each.active]
        if not wanting:
            return
        weight = self.module._parameters[WEIGHT]
        assert weight is not None
        product, dense = Product(input, gradient, self.shape, partial(_made, geometry, weight.dtype)), None
        for each in wanting:
            if each.defers(product):
                each.add_product(self.sink, product)
                continue
            dense = product.dense() if dense is None else dense
            each.add(self.sink, dense)


def _made(geometry: Geometry | None, dtype: torch.dtype, input: Tensor, gradient: Tensor) -> Tensor:
    """In the type that the layer multiplied in, wherever it is made."""
    with torch.autocast(input.device.type, enabled=False):
        return outer_gradient(input, gradient.to(input.dtype), geometry).to(dtype)
