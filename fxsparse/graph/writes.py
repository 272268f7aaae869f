"""Writes into parameters during a run: noticed before they happen, undone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxsparse.graph.tree import parameters_of

_WRITERS = frozenset({"__setitem__", "_no_grad_embedding_renorm_"})
_WRITES_NOTHING = frozenset({"requires_grad_", "detach_", "share_memory_", "__invert__", "__index__", "__int__"})


class ParameterWrites:
    """Keeps the value of every parameter of `model` that a torch function is about to write into."""

    def __init__(self, model: nn.Module) -> None:
        self.storages = {storage_of(p): (name, p) for name, p in parameters_of(model) if not p.is_meta}
        self.saved: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def notice(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Save what `func` may write into; call it before `func` runs."""
        for tensor in _tensors((*args, *kwargs.values())) if _writes(func, kwargs) else ():
            found = self.storages.get(storage_of(tensor))
            if found is not None and found[0] not in self.saved:
                self.saved[found[0]] = (found[1], found[1].detach().clone())

    def undo(self) -> tuple[str, ...]:
        """Put the saved values back; the names of the parameters that had changed."""
        changed = [name for name, (p, value) in self.saved.items() if not torch.equal(p.detach(), value)]
        with torch.no_grad():
            for name in changed:
                parameter, value = self.saved[name]
                parameter.data.copy_(value)
        self.saved.clear()
        return tuple(changed)


class NoticingWrites(TorchFunctionMode):
    """Runs `writes.notice` before every torch function."""

    def __init__(self, writes: ParameterWrites) -> None:
        super().__init__()
        self.writes = writes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.writes.notice(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function may write values, by its name; tables are rescaled where `max_norm` asks for it."""
    name = getattr(func, "__name__", "")
    if name in ("embedding", "embedding_bag"):
        return kwargs.get("max_norm") is not None
    if name == "__set__":  # of a property, most of which are no values
        return getattr(getattr(func, "__self__", None), "__name__", "data") in ("data", "real", "imag")
    if name in _WRITES_NOTHING:
        return False
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name in _WRITERS


def _tensors(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for value in args:
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, torch.Tensor) and not item.is_meta:
                yield item


def storage_of(tensor: torch.Tensor) -> Any:
    """What two tensors share exactly when they see the same memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other layouts without a storage
        return id(tensor)
