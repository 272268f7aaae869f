"""Example inputs: how they are written, split and copied."""

from __future__ import annotations

from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxsparse.errors import ConfigError


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and keyword arguments.

    Args:
        example_inputs: a tuple (or list) of positional inputs, or a pair ``(args, kwargs)`` of a tuple and a dict.

    Returns:
        ``(args, kwargs)``.

    Raises:
        ConfigError: when `example_inputs` is neither.
    """
    if not isinstance(example_inputs, tuple | list):
        shown = type(example_inputs).__name__
        raise ConfigError(
            f"`example_inputs` (={shown}) must be a tuple of positional inputs, or (args, kwargs): write `(x,)` for one"
        )
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple | list) and _is_keywords(example_inputs[1]):
        return tuple(example_inputs[0]), dict(example_inputs[1])
    return tuple(example_inputs), {}


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value)


def fresh_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy every tensor in `args` and `kwargs`, so that a forward pass cannot write into the caller's inputs.

    Copies are leaves with the same `requires_grad`, dtype, device and memory format.
    """

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        return value

    new_args, new_kwargs = pytree.tree_map(copy, (args, dict(kwargs)))
    return new_args, new_kwargs


def opened(value: Any, depth: int = 4) -> Any:
    """The same with generators run to their end, and with objects that pytree does not know as dicts of their fields.

    For what a model returns: dataclasses, distributions and records of the user's hold tensors too.
    """
    return pytree.tree_map(lambda leaf: _opened_leaf(leaf, depth), value)


def _opened_leaf(leaf: Any, depth: int) -> Any:
    if depth == 0 or isinstance(leaf, _CLOSED):
        return leaf
    if isinstance(leaf, GeneratorType):
        return [opened(item, depth - 1) for item in leaf]
    fields = getattr(leaf, "__dict__", None)
    if not isinstance(fields, dict):
        return leaf
    return {"type": type(leaf).__qualname__, **{str(name): opened(item, depth - 1) for name, item in fields.items()}}


_CLOSED = (torch.Tensor, torch.nn.Module, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Every tensor of a nested structure (tuples, lists, dicts, registered classes), in its order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
