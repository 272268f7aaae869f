"""Dense or sparse, and by which kernels: the choice by measuring one layer on one input."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fxsparse.nn.select import selected
from fxsparse.nn.shared import Choice, SharedPath
from fxsparse.nn.shared_gradient import MASK, WEIGHT
from fxsparse.nn.shared_kernels import Kernel

ROUNDS = 5

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""How far two sparse products may differ, over the largest value; float32 may be rounded to TF32."""


def measured(
    module: nn.Module,
    path: SharedPath,
    input: Tensor,
    kernels: Sequence[Kernel] = (Kernel.GATHER,),
    dense: bool = True,
) -> Choice:
    """Time of the dense product, forward and backward, over that of the fastest sparse one, and which that is.

    All run in turn on copies, the best of a few rounds counts; gradients, hooks and random state stay as they are.
    Fused kernels that fail here, or whose results are not those of the gathers, are left out with a RuntimeWarning.

    Args:
        module: The layer.
        path: Its fast path.
        input: Its input.
        kernels: The sparse products that can run; the first one is taken as right.
        dense: Whether the dense product is a choice.
    """
    weight, bias = module._parameters[WEIGHT], module._parameters.get("bias")
    assert weight is not None
    given = input.detach().clone().requires_grad_(input.is_floating_point())
    copy = weight.detach().clone().requires_grad_()
    added = None if bias is None else bias.detach()
    with torch.enable_grad():
        sparse = {kernel: _sparse(module, path, given, copy, added, kernel) for kernel in kernels}
        sparse = {kernel: run for kernel, run in sparse.items() if _works(run, sparse[kernels[0]], given, copy)}
        runs = list(sparse.values())
        if dense:
            runs.append(_dense(module, given, copy, added))
        rounds = [[_time(run, given, copy) for run in runs] for _ in range(ROUNDS)][1:]
    best = [min(times) for times in zip(*rounds, strict=True)]
    fastest = min(range(len(sparse)), key=best.__getitem__)
    return Choice(best[-1] / best[fastest] if dense else None, list(sparse)[fastest])


def _dense(module: nn.Module, given: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    mask = module._buffers[MASK]
    assert mask is not None

    def run() -> Tensor:
        masked = selected(weight, mask)
        if isinstance(module, _ConvNd):
            return module._conv_forward(given, masked, bias)
        return F.linear(given, masked, bias)

    return run


def _sparse(
    module: nn.Module, path: SharedPath, given: Tensor, weight: Tensor, bias: Tensor | None, kernel: Kernel
) -> Callable[[], Tensor]:
    return lambda: path.run(module, given, weight, bias, kernel)


def _works(run: Callable[[], Tensor], right: Callable[[], Tensor], given: Tensor, weight: Tensor) -> bool:
    """Whether a product runs here and agrees with the one that is right; warns where it does not."""
    if run is right:
        return True
    try:
        found = _results(run, given, weight)
    except Exception as error:  # compilers and drivers raise what they like; the gathers go on
        what = f"fail here ({type(error).__name__}: {error})"
    else:
        expected = _results(right, given, weight)
        if all(_agree(one, other) for one, other in zip(found, expected, strict=True)):
            return True
        what = "give other results than gathers here"
    warnings.warn(f"the Triton kernels {what}; gathers and batched products are taken instead", RuntimeWarning, 4)
    return False


def _results(run: Callable[[], Tensor], given: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    output = run()
    return output.detach(), *torch.autograd.grad(output, (given, weight), torch.ones_like(output))


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = other.abs().max() if other.numel() else torch.zeros(())
    if not bool(largest.isfinite()):
        return True  # nothing can be said about such values
    return bool((one - other).abs().max() <= TOLERANCE.get(one.dtype, 1e-2) * largest) if one.numel() else True


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
