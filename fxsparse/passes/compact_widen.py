"""Running a model in a wider dtype without a wide copy of its large parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.errors import PassError

LARGE_MODEL = 1 << 22
"""Elements of all parameters from which on a wide copy of them is worth avoiding."""
LARGE_PARAMETER = 1 << 14
"""Elements of a parameter from which on it stays narrow."""


class Widen(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Every operator reads wide copies of some narrow tensors; each lives as long as its operator.

    Args:
        narrow: the tensors.
        dtype: what the operators see them in.
    """

    def __init__(self, narrow: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.narrow = {id(tensor): tensor for tensor in narrow}
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator.

        Raises:
            PassError: it would write into one of the tensors.
        """
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._check_writes(func, args, kwargs)
        return func(*pytree.tree_map(self._wide, args), **pytree.tree_map(self._wide, kwargs))

    def _wide(self, value: Any) -> Any:
        return value.to(self.dtype) if id(value) in self.narrow else value

    def _check_writes(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.is_write and any(id(each) in self.narrow for each in pytree.tree_leaves(value)):
                raise PassError(f"`{func}` writes into a parameter")


def streamable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a parameter is large and narrower than `dtype`, and an operator's argument like any other."""
    plain = type(tensor) is nn.Parameter and tensor.ndim > 1 and tensor.numel() >= LARGE_PARAMETER
    return plain and tensor.is_floating_point() and tensor.dtype != dtype and not tensor.is_meta


def worth_streaming(model: nn.Module) -> bool:
    """Whether the model is so large that wide copies of its parameters matter."""
    return sum(parameter.numel() for parameter in model.parameters()) >= LARGE_MODEL


def widened(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """A scope in which operators read the floating parameters of the model in `dtype`; None changes nothing."""
    if dtype is None:
        return nullcontext()
    narrow: list[Tensor] = [each for each in model.parameters() if each.is_floating_point() and each.dtype != dtype]
    return Widen(narrow, dtype) if narrow else nullcontext()
