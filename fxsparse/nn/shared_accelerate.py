"""Training with shared supports made faster: turning the fast path of a model on and off, and what it picked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import shared_triton
from fxsparse.nn.conv import Conv1d, Conv2d, Conv3d
from fxsparse.nn.linear import Linear
from fxsparse.nn.model import masked_weights
from fxsparse.nn.shared import Choice, FastMode, SharedPath, close_path, open_path, path_of
from fxsparse.nn.shared_gradient import WEIGHT
from fxsparse.nn.shared_kernels import Kernel
from fxsparse.sparsity import SharedSupport

FAST_TYPES = (Linear, Conv1d, Conv2d, Conv3d)


@dataclass(frozen=True)
class FastLayer:
    """What one layer does.

    Attributes:
        name: Path of the module.
        shape: Shape of its dense weight.
        sparsity: Dead fraction, 0 where there is no sparse product.
        product: "dense", "sparse" (gathers), "triton", or "unmeasured" until the first step has measured it.
        ratio: Time of the dense product over that of the fastest sparse one, forward and backward, as last measured;
            None where nobody has.
        reason: Why there is no sparse product, or None.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    product: str
    ratio: float | None
    reason: str | None


@dataclass(frozen=True)
class FastReport:
    """What every layer with a shared support does; `print` shows a table."""

    layers: tuple[FastLayer, ...]

    def __iter__(self) -> Iterator[FastLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        width = max((len(each.name) for each in self.layers), default=5)
        lines = [f"{'layer':<{width}} {'weight':>18} {'sparsity':>8} {'product':>10} {'dense/sparse':>12}"]
        for each in self.layers:
            ratio = "-" if each.ratio is None else f"{each.ratio:.2f}"
            shape = "x".join(map(str, each.shape))
            line = f"{each.name:<{width}} {shape:>18} {each.sparsity:>8.3f} {each.product:>10} {ratio:>12}"
            lines.append(line if each.reason is None else f"{line}  {each.reason}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
    *,
    mode: FastMode = FastMode.AUTO,
    sparse_threshold: float | None = None,
) -> FastReport:
    """Compute layers with shared support by gathers and small dense products, in place; `decelerate` undoes it.

    Outputs and gradients are those of the dense product with the masked weight up to rounding. Parameters, masks and
    `state_dict` stay as they are, methods and `set_masks` go on changing masks. The gradient of a weight is written
    where it is alive; that of all positions, which RigL and others read, costs one dense product in their steps only.
    Layers that have no sparse product, and weights without dead entries, go on as before.

    Args:
        model: A model with masks.
        example_inputs: Inputs by which AUTO measures at once, in evaluation mode; otherwise each layer measures at its
            first use of a shape and device. Graphs of `torch.compile` measure nothing: they take what is known, and
            the sparse product from half sparsity on where nothing is.
        mode: How the product is chosen; a calling again changes it.
        sparse_threshold: In AUTO, the sparsity in [0, 1] from which the sparse product is taken, instead of measuring.

    Returns:
        What each layer does.

    Raises:
        ConfigError: a model without any layer that could be faster, a threshold outside [0, 1] or one given to another
            mode, or `FastMode.TRITON` where Triton is not installed. Nothing has changed then.
    """
    if not isinstance(mode, FastMode):
        raise ConfigError(f"`mode` (={mode!r}) must be a FastMode such as FastMode.AUTO")
    _check_module(model)
    if sparse_threshold is not None and (
        isinstance(sparse_threshold, bool) or not isinstance(sparse_threshold, int | float)
    ):
        raise ConfigError(f"`sparse_threshold` (={sparse_threshold!r}) must be a number in [0, 1], or None")
    if sparse_threshold is not None and not (0 <= sparse_threshold <= 1 and mode is FastMode.AUTO):
        raise ConfigError(f"`sparse_threshold` (={sparse_threshold}) must be in [0, 1], for FastMode.AUTO (={mode})")
    if mode is FastMode.TRITON and not shared_triton.INSTALLED:
        raise ConfigError(f"`mode` (={mode}) needs Triton; install triton, which torch for CUDA brings on Linux")
    found = _layers(model)
    if not found:
        weights = masked_weights(model).items()
        mend = "transform it with pattern=SharedSupport(group)"
        for name in [name for name, weight in weights if isinstance(weight.spec.pattern, SharedSupport)][:1]:
            mend = f"`{name}` is read by a function; make it a module of the model (a bare layer: Sequential(layer))"
        raise ConfigError(
            f"`model` (={type(model).__name__}) has no Linear or Conv layer with the pattern SharedSupport; {mend}"
        )
    for module in found.values():
        open_path(module, mode, sparse_threshold)
    if example_inputs is not None and mode is FastMode.AUTO and sparse_threshold is None:
        _run(model, example_inputs)
    return fast_report(model)


def decelerate(model: nn.Module) -> None:
    """Undo `accelerate`.

    Raises:
        ConfigError: weights are stored alive only. Nothing has changed then.
    """
    _check_module(model)
    packed = [name for name, module in model.named_modules() if (path := path_of(module)) is not None and path.packed]
    if packed:
        raise ConfigError(f"`{packed[0]}` stores its alive weights only; call restore_dense(handle) first")
    for module in model.modules():
        close_path(module)


def fast_report(model: nn.Module) -> FastReport:
    """What every layer with a fast path does.

    Raises:
        ConfigError: not a module.
    """
    _check_module(model)
    layers = []
    for name, module in model.named_modules():
        path = path_of(module)
        if path is not None:
            path.refresh(module)
            layers.append(_row(name, module, path))
    return FastReport(tuple(layers))


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={model!r}) must be a torch.nn.Module")


def _row(name: str, module: nn.Module, path: SharedPath) -> FastLayer:
    choice = next(reversed(path.chosen.values()), None)
    sparsity = path.sparsity if path.reason is None else 0.0
    ratio = None if choice is None else choice.ratio
    return FastLayer(name, tuple(path.shape), sparsity, _product(module, path, choice), ratio, path.reason)


def _product(module: nn.Module, path: SharedPath, choice: Choice | None) -> str:
    """What the layer takes, for the input that was measured last in AUTO."""
    weight = module._parameters[WEIGHT]
    assert weight is not None
    fused = type(module) is Linear and shared_triton.runs(weight.device, weight.dtype)
    if path.reason is not None or (path.mode is FastMode.DENSE and not path.packed):
        return "dense"
    if path.mode in (FastMode.SPARSE, FastMode.DENSE):
        return "sparse"
    if path.mode is FastMode.TRITON:
        return "triton" if fused else "sparse"
    if path.threshold is not None and not path.packed and path.sparsity < path.threshold:
        return "dense"
    forced = path.packed or path.threshold is not None  # the dense product is no choice
    if choice is None:
        return "sparse" if forced and not fused else "unmeasured"
    if not forced and choice.ratio is not None and choice.ratio <= 1:
        return "dense"
    return "triton" if choice.kernel is Kernel.TRITON else "sparse"


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in FAST_TYPES and isinstance(module.mask_spec.pattern, SharedSupport)
    }


def _run(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """One forward in evaluation mode, so that every layer sees its shapes."""
    positional: tuple[Any, ...] = example_inputs
    named: Mapping[str, Any] = {}
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], Mapping):
        positional, named = example_inputs
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(*positional, **named)
    finally:
        for module, mode in modes.items():
            module.training = mode
