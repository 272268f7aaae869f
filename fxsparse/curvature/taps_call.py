"""Calls of a model with other tensors in the place of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from fxsparse.graph.tree import modules_of, parameters_of


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the model with tensors by the parameters' first names; tied parameters are replaced at all their places.

    Each place is named once. torch's own tying names the places of a module that is held twice twice, and leaves the
    replacements behind in it.
    """
    first = {id(parameter): name for name, parameter in parameters_of(model)}
    places: dict[str, Tensor] = {}
    for path, module in modules_of(model):
        for attribute, parameter in module._parameters.items():
            if parameter is not None and first[id(parameter)] in tensors:
                places[f"{path}.{attribute}" if path else attribute] = tensors[first[id(parameter)]]
    return functional_call(model, places, args, kwargs, tie_weights=False)
