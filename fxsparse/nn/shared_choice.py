"""Dense or sparse: the choice by measuring one layer on one input."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fxsparse.nn.shared import MASK, WEIGHT, SharedPath

ROUNDS = 5


def measured(module: nn.Module, path: SharedPath, input: Tensor) -> float:
    """Time of the dense product, forward and backward, over that of the sparse one.

    Both run in turn on copies, the best of a few rounds counts; gradients, hooks and random state stay as they are.
    """
    weight, bias, mask = module._parameters[WEIGHT], module._parameters.get("bias"), module._buffers[MASK]
    assert weight is not None and mask is not None
    given = input.detach().clone().requires_grad_(input.is_floating_point())
    copy = weight.detach().clone().requires_grad_()
    added = None if bias is None else bias.detach()

    def dense() -> Tensor:
        masked = torch.where(mask, copy, 0.0)
        if isinstance(module, _ConvNd):
            return module._conv_forward(given, masked, added)
        return F.linear(given, masked, added)

    def sparse() -> Tensor:
        return path.run(module, given, copy, added)

    with torch.enable_grad():
        pairs = [(_time(dense, given, copy), _time(sparse, given, copy)) for _ in range(ROUNDS)][1:]
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)


def _time(product: Callable[[], Tensor], given: Tensor, weight: Tensor) -> float:
    """Seconds of one forward and backward."""
    _wait(given)
    begin = time.perf_counter()
    output = product()
    torch.autograd.grad(output, (given, weight), torch.ones_like(output))
    _wait(given)
    return time.perf_counter() - begin


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
