"""Running a model for its numbers, and how far two runs are apart."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.graph.inputs import fresh_inputs
from fxsparse.graph.scopes import seeded

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_SEED = 1729
_FLOOR = 1e-3  # gradients below this share of the model's largest are compared with that share


@dataclass(frozen=True)
class Outputs:
    """What a forward pass returned: its tensors in order, and everything else as text."""

    structure: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Trained:
    """A forward and backward pass in train mode: outputs, gradients and buffers afterwards, by name."""

    outputs: Outputs
    loss: float
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]


def flatten(value: Any) -> tuple[str, list[Tensor]]:
    """The tensors of a nested output, and its structure as text; dataclasses count as dicts."""
    leaves, spec = pytree.tree_flatten(value)
    shown, tensors = [str(spec)], []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            shown.append(f"{leaf.dtype}{list(leaf.shape)}")
            tensors.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            inner, found = flatten({f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)})
            shown.append(f"{type(leaf).__name__}({inner})")
            tensors += found
        else:
            plain = isinstance(leaf, int | float | str | bool | None)
            shown.append(repr(leaf) if plain else type(leaf).__name__)
    return " ".join(shown), tensors


def forward(model: nn.Module, inputs: Inputs, seed: int = _SEED) -> Outputs:
    """Run `model` in its present mode, seeded, without gradients, on copies of the inputs."""
    args, kwargs = fresh_inputs(*inputs)
    with seeded(seed), torch.no_grad():
        structure, tensors = flatten(model(*args, **kwargs))
    return Outputs(structure, tuple(tensor.detach().clone() for tensor in tensors))


def loss_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum over all floating-point outputs with a gradient of their mean square."""
    parts = [t.float().square().mean() for t in tensors if t.requires_grad and t.is_floating_point()]
    if not parts:
        raise ValueError("no output of the model has a gradient")
    return torch.stack(parts).sum()


def train_run(model: nn.Module, inputs: Inputs, seed: int = _SEED) -> Trained:
    """Run `model` forward and backward in its present mode, seeded; its gradients are taken off again."""
    args, kwargs = fresh_inputs(*inputs)
    model.zero_grad(set_to_none=True)
    with seeded(seed):
        structure, tensors = flatten(model(*args, **kwargs))
        loss = loss_of(tensors)
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    outputs = Outputs(structure, tuple(tensor.detach().clone() for tensor in tensors))
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return Trained(outputs, float(loss.detach()), gradients, buffers)


def outputs_difference(expected: Outputs, found: Outputs) -> float:
    """The largest difference relative to the largest value of its tensor; infinity for another structure."""
    if expected.structure != found.structure:
        return float("inf")
    pairs = zip(expected.tensors, found.tensors, strict=True)
    return max((difference(a, b) for a, b in pairs), default=0.0)


def difference(expected: Tensor, found: Tensor, floor: float = 0.0) -> float:
    """Return max |expected - found| / max(max |expected|, floor); infinity for another shape, dtype or NaNs."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    a, b = expected.detach().to_dense(), found.detach().to_dense()
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = _wide(a), _wide(b)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    gap = float(torch.where(same, 0.0, (a - b).abs()).max())
    if not gap < float("inf"):
        return float("inf")
    scale = max(float(torch.where(a.isfinite(), a.abs(), 0.0).max()), floor)
    return gap / scale if scale else float("inf")


@contextlib.contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer and its values back afterwards, also those that a forward pass replaced by other tensors."""
    saved = [
        (m, name, b, b.detach().clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in saved:
                buffer.copy_(values)
                module._buffers[name] = buffer


def _wide(tensor: Tensor) -> Tensor:
    """Its values with 64 bits each, whatever its layout and dtype (bool, integers, half precision) are."""
    return tensor.detach().to_dense().to(torch.complex128 if tensor.is_complex() else torch.float64)


def named_difference(expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None]) -> tuple[float, str]:
    """The largest relative difference among tensors of the same name, and that name; a missing one is infinite."""
    worst, where = 0.0, ""
    sizes = [float(_wide(t).abs().max()) for t in expected.values() if t is not None and t.numel()]
    floor = _FLOOR * max((size for size in sizes if size < float("inf")), default=0.0)
    for name, value in expected.items():
        other = found.get(name)
        if value is None or other is None:
            gap = 0.0 if value is None and other is None and name in found else float("inf")
        else:
            gap = difference(value, other, floor)
        if gap > worst:
            worst, where = gap, name
    return worst, where


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with every floating-point tensor in `dtype`."""

    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    converted: Inputs = pytree.tree_map(convert, inputs)
    return converted
