"""A model's outputs as a function of chosen parameters, with its buffers and other parameters as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxsparse.curvature.operator_checks import NoFrequencies, is_tracked
from fxsparse.curvature.operator_data import Batch, Output, one_output
from fxsparse.curvature.operator_space import ParameterSpace
from fxsparse.nn import masked_weights

Tensors = dict[str, Tensor]

LOOSE: Any = {"allow_unused": True, "materialize_grads": True}
"""Options of `torch.autograd.grad`: zeros for what nothing depends on."""


class ModelFunction:
    """Outputs z(theta) of a model, theta the parameters of a space; for use inside `curvature_scope`.

    Args:
        model: The model.
        space: The parameters.
        output: Takes the logits out of what the model returns.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, output: Output | None = None) -> None:
        self.model, self.space, self.output = model, space, output or one_output
        self.narrowest = space.dtype  # the coarsest numbers of a forward pass, as far as is known
        self._parameters = dict(model.named_parameters())
        self._masks = {}
        masked = masked_weights(model)
        for name, weight in masked.items():
            if any(f"{alias}_mask" in space.opened for alias in weight.names):
                self._masks[name] = weight.mask
        held = {id(buffer) for weight in masked.values() for buffer in weight.buffers}
        self._buffers = {n: b for n, b in places_of(model, "_buffers") if id(b) not in held}
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._watched = False
        self._places = {place: names[id(parameter)] for place, parameter in places_of(model, "_parameters")}

    @property
    def point(self) -> Tensors:
        """The chosen parameters, detached; dead entries of opened masks are read as zeros."""
        return {name: self._value(name) for name in self.space.shapes}

    def leaves(self) -> Tensors:
        """The same, each a leaf of autograd."""
        return {name: parameter.detach().requires_grad_() for name, parameter in self.point.items()}

    def parameter(self, name: str) -> nn.Parameter:
        """The model's own parameter of this first name."""
        return self._parameters[name]

    def forward(self, parameters: Mapping[str, Tensor], inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """The outputs z [N, ...] at some values of the chosen parameters; the model gets copies of its inputs.

        Raises:
            CoupledSamples: gradients of a lookup are divided by how often the batch has a row.
        """
        args, kwargs = _copied(inputs)
        values = {n: parameters[n] if n in parameters else self._value(n) for n in self._parameters}
        state = {place: values[name] for place, name in self._places.items()}
        buffers = {place: buffer.clone() for place, buffer in self._buffers.items()}  # a model may write to them
        state = {**state, **buffers, **self.space.opened}
        if self._watched or not any(map(is_tracked, parameters.values())):
            return self.output(functional_call(self.model, state, args, kwargs, tie_weights=False))
        with NoFrequencies(self.model):  # once: it costs time at each operator
            z = self.output(functional_call(self.model, state, args, kwargs, tie_weights=False))
        self._watched = True
        return z

    def outputs(self, batch: Batch) -> Tensor:
        """The outputs of a batch, without gradients."""
        with torch.no_grad():
            return self.forward(self.point, batch.inputs).detach()

    def _value(self, name: str) -> Tensor:
        value = self._parameters[name].detach()
        return torch.where(self._masks[name], value, 0.0) if name in self._masks else value


def pulled(of: Sequence[Tensor], point: Tensors, given: Sequence[Tensor], keep: bool = False) -> Tensors:
    """The reverse pass: the sum over outputs of J^T u at leaves, zeros where nothing depends on them."""
    pairs = [(value, each) for value, each in zip(of, given, strict=True) if value.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(parameter) for name, parameter in point.items()}
    values, directions = zip(*pairs, strict=True)
    found = torch.autograd.grad(values, list(point.values()), directions, retain_graph=keep, **LOOSE)
    return {name: each.to_dense() if each.is_sparse else each for name, each in zip(point, found, strict=True)}


def places_of(model: nn.Module, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every place that holds a parameter or buffer, once, however often its module is held.

    torch's own tying of functional calls names such a place twice, and leaves replacements behind in it.
    """
    for path, module in model.named_modules():
        for attribute, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield f"{path}.{attribute}" if path else attribute, tensor


def _copied(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = inputs
    if not kwargs and all(isinstance(each, Tensor) for each in args):  # the most common
        return tuple(each.detach().clone() for each in args), {}
    copied: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs
    )
    return copied
