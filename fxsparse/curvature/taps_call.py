"""Calls of a model with other tensors in the place of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.func import functional_call
from torch.overrides import _get_current_function_mode_stack

from fxsparse.curvature.taps_mode import TapMode
from fxsparse.graph.tree import modules_of, parameters_of

_foreign: ContextVar[bool] = ContextVar("foreign", default=False)


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
    before = _foreign.set(True)
    try:
        return functional_call(model, places, args, kwargs, tie_weights=False)
    finally:
        _foreign.reset(before)


def is_watched() -> bool:
    """Whether taps in a graph are to call the operators that they stand for, and nothing else.

    So it is while a collector's own taps look at each operator, and with other tensors in the place of parameters.
    """
    if torch.compiler.is_compiling():
        return False
    if _foreign.get() or not _len_torch_function_stack():
        return _foreign.get()
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # untyped in torch
    return any(isinstance(mode, TapMode) for mode in modes)
