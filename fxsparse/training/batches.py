"""The forms of batches: a tensor, a tuple of positional or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs; a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def samples_of(inputs: Any) -> int:
    """The length of the first tensor.

    Raises:
        ConfigError: there is none.
    """
    items = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else [inputs]
    for item in items:
        if isinstance(item, Tensor) and item.ndim:
            return len(item)
    raise ConfigError(f"a batch's inputs (={type(inputs).__name__}) hold no tensor with samples along its first axis")


def ones_like(inputs: Any) -> Any:
    """One sample of ones, float64, in the form of the inputs.

    Raises:
        ConfigError: a tensor holds integers, which are names and not amounts.
    """
    if isinstance(inputs, Mapping):
        return {name: ones_like(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(ones_like(value) for value in inputs)
    if not isinstance(inputs, Tensor):
        return inputs
    if not inputs.is_floating_point():
        raise ConfigError(f"SynFlow feeds ones, which inputs of `dtype` (={inputs.dtype}) cannot mean; use SNIP")
    return torch.ones_like(inputs[:1], dtype=torch.float64)


def float_tensors(outputs: Any) -> Iterator[Tensor]:
    """Every floating-point tensor of nested outputs."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping | tuple | list):
        for each in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from float_tensors(each)
