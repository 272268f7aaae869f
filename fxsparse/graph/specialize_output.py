"""Outputs of any class, taken apart into tensors at capture and built anew by a specialised graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxsparse.graph.guards import NOTHING, Untraceable
from fxsparse.graph.specialize_calls import PLAIN, Placeholder, Rebuild
from fxsparse.graph.specialize_functions import name_of


def rebuilding(output: Any, known: Iterable[torch.Tensor]) -> tuple[Rebuild, list[torch.Tensor]]:
    """What makes the like of `output` from tensors, and the tensors that are in `output`.

    Args:
        output: what a model returned.
        known: every tensor that may be in it.

    Raises:
        Untraceable: when it holds another tensor, or cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): _Marker(tensor) for tensor in known}
    used: dict[Any, list[_Marker]] = {_Marker: []}
    try:
        with _RefusingCopies():
            marked = copy.deepcopy(output, memo)
        skeleton = copy.deepcopy(marked, used)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(f"its output, a {type(output).__name__}, cannot be copied ({error})", NOTHING) from error
    found = used[_Marker]
    return Rebuild(skeleton, [marker.place for marker in found]), [marker.tensor for marker in found]


class _Marker:
    """Stands for a tensor while its output is copied."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.place = Placeholder()

    def __deepcopy__(self, memo: dict[Any, Any]) -> Placeholder:
        used: list[_Marker] = memo[_Marker]
        self.place.key = len(used)
        used.append(self)
        return self.place


class _RefusingCopies(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if name_of(func) == "__deepcopy__":
            raise Untraceable("its output holds a tensor that no recorded function made", NOTHING)
        return func(*args, **(kwargs or {}))


def is_native(value: Any) -> bool:
    """Whether fx can write the output down as it is."""
    if type(value) in (tuple, list):
        return all(map(is_native, value))
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(is_native, value.values()))
    return value is None or isinstance(value, (torch.Tensor, *PLAIN))
