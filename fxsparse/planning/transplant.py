"""Moving an optimizer from a model to its compacted copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fxsparse.errors import ConfigError
from fxsparse.passes.compact_apply import narrowed

Kept = Mapping[tuple[str, int], npt.NDArray[np.int64]]


class Transplant:
    """Lets an optimizer train another model with the same parameter names and shorter parameters.

    Parameter groups are changed in place, so that schedulers and whatever else holds the optimizer go on. State tensors
    that have an entry for every entry of a parameter, or one for every row or column of it (a factored second moment),
    are shortened like it; step counts and other scalars stay.

    Args:
        optimizer: any torch.optim optimizer.
        model: the model whose parameters it holds.

    Raises:
        ConfigError: no optimizer, one that keeps its state in one flat vector or shards it, or one that holds none of
            the model's parameters.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        kind = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"`optimizer` (={kind}) must be a torch.optim.Optimizer")
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                f"`optimizer` (={kind}) keeps one flat history of all parameters; make a new one afterwards"
            )
        if kind == "ZeroRedundancyOptimizer":
            raise ConfigError(f"`optimizer` (={kind}) shards its state over ranks; compact before, and make it anew")
        self.optimizer = optimizer
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(parameter) in self.names for parameter in held):
            raise ConfigError(f"`optimizer` (={kind}) holds no parameter of the model: give the one that trains it")

    def check(self, kept: Kept) -> None:
        """Raise ConfigError for a state that cannot be shortened; nothing has changed then."""
        dims = _by_name(kept)
        for parameter, state in self.optimizer.state.items():
            name = self.names.get(id(parameter))
            if name in dims:
                for key, value in state.items():
                    self._shortened(str(name), parameter, str(key), value, dims[str(name)])

    def commit(self, result: nn.Module, kept: Kept) -> None:
        """Let the optimizer train `result`."""
        dims, state = _by_name(kept), self.optimizer.state
        for group in self.optimizer.param_groups:
            for index, old in enumerate(group["params"]):
                name = self.names.get(id(old))
                if name is None:  # not of this model
                    continue
                new = result.get_parameter(name)
                group["params"][index] = new
                if old in state:
                    held = state.pop(old)
                    shorter = dims.get(name, {})
                    state[new] = {key: self._shortened(name, old, str(key), v, shorter) for key, v in held.items()}

    def _shortened(
        self, name: str, parameter: Tensor, key: str, value: Any, dims: Mapping[int, npt.NDArray[np.int64]]
    ) -> Any:
        if not isinstance(value, Tensor) or value.numel() <= 1 or not dims:
            return value
        if value.ndim == parameter.ndim and all(a in (b, 1) for a, b in zip(value.shape, parameter.shape, strict=True)):
            return narrowed(value, {dim: indices for dim, indices in dims.items() if value.shape[dim] > 1})
        raise ConfigError(
            f"`{key}` (={tuple(value.shape)}) of {type(self.optimizer).__name__} for `{name}` {tuple(parameter.shape)} "
            "has another shape than the parameter and cannot be shortened; compact without it, and make a new one"
        )


def _by_name(kept: Kept) -> dict[str, dict[int, npt.NDArray[np.int64]]]:
    result: dict[str, dict[int, npt.NDArray[np.int64]]] = {}
    for (name, dim), indices in kept.items():
        result.setdefault(name, {})[dim] = indices
    return result
