"""What a specialised graph calls: its guards, the choice by mode, and what builds its inputs and outputs.

They are nodes like any other, so they survive copies, pickling and recompilation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from fxsparse.errors import CaptureError

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
MEND = "capture anew with inputs like these, or without `specialize=True`"


def describe(value: Any) -> str:
    """What of an input a specialised graph rests on: structure, shapes, dtypes, and values that are no tensors.

    >>> describe({"x": torch.zeros(2, 3), "scale": [1.5, None]})
    '{x: float32[2, 3], scale: [1.5, None]}'
    """
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, torch.Size | list):
        return f"[{', '.join(map(describe, value))}]"
    if type(value) is tuple:
        return f"({''.join(f'{describe(item)}, ' for item in value).rstrip()})"
    if type(value) is dict:
        return f"{{{', '.join(f'{key}: {describe(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, PLAIN):
        return repr(value)
    children, spec = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
    kind = type(value).__qualname__
    if len(children) == 1 and children[0] is value:
        return f"<{kind}>"
    return f"{kind}{spec.context}({', '.join(map(describe, children))})"


@has_side_effect
def check_inputs(values: tuple[Any, ...], names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """Raise CaptureError when an input is described in another way than that of the example.

    Args:
        values: the inputs.
        names: their arguments' names.
        expected: what `describe` said of the example inputs.
    """
    for value, name, was in zip(values, names, expected, strict=True):
        now = describe(value)
        if now != was:
            raise CaptureError(
                f"`{name}` (={now}) is not like the example input ({was}) to which the graph is specialised: {MEND}"
            )


@has_side_effect
def check_read(found: Any, expected: str, name: str) -> None:
    """Raise CaptureError when Python code would have read another value out of a tensor than at capture.

    Args:
        found: the value now.
        expected: `repr` of the value then.
        name: how it was read.
    """
    if repr(found) != expected:
        raise CaptureError(
            f"`{name}` (={found!r}) was {expected} when the graph was specialised, and Python code read it: {MEND}"
        )


def one_mode(flags: Mapping[str, bool]) -> bool:
    """The training flag that the modules share.

    Raises:
        CaptureError: when some are in train mode and others in eval mode.
    """
    first, *others = flags
    for other in others:
        if flags[other] is not flags[first]:
            raise CaptureError(
                f"`{other}` (={flags[other]}) differs from `{first}` (={flags[first]}), and the specialised graph has "
                "one mode for both: set all in train or all in eval mode, or capture without `specialize=True`"
            )
    return flags[first]


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """A constant that differs between train and eval mode."""
    return in_training if training else in_evaluation


class FunctionCall:
    """Calls a `torch.autograd.Function` with its own backward.

    Args:
        function: the class.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Its `apply`."""
        apply: Any = self.function.apply  # torch leaves it untyped
        return apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionCall:
        return self


class Placeholder:
    """Where a tensor goes in the output of a specialised graph."""

    def __init__(self) -> None:
        self.key = -1

    def __repr__(self) -> str:
        return f"%{self.key}"


class Rebuild:
    """Makes an output of any class from its tensors: everything else is as the model returned it at capture.

    Args:
        skeleton: the output with placeholders instead of tensors.
        places: the placeholders, in the order of the tensors.
    """

    def __init__(self, skeleton: Any, places: list[Placeholder]) -> None:
        self.skeleton = skeleton
        self.places = places
        self.__name__ = "rebuild"
        self.__module__ = __name__

    def __call__(self, *tensors: Any) -> Any:
        """A fresh copy of the output."""
        memo = {id(place): tensor for place, tensor in zip(self.places, tensors, strict=True)}
        return copy.deepcopy(self.skeleton, memo)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rebuild) and repr(other.skeleton) == repr(self.skeleton)

    def __hash__(self) -> int:
        return hash(repr(self.skeleton))

    def __deepcopy__(self, memo: dict[int, Any]) -> Rebuild:
        return self
