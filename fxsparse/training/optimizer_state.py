"""The state of any torch.optim optimizer under a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.utils.hooks import RemovableHandle

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight
from fxsparse.nn.sharded import fill_zeros_
from fxsparse.nn.shared import path_of


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside wrappers that keep it in their attribute `optimizer`, as Accelerate's and Lightning's do."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def check_optimizer(optimizer: object) -> None:
    """Raise ConfigError for an optimizer whose state cannot follow a mask; the message names it and the reason."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"`optimizer` (={kind}) must be a torch.optim.Optimizer: its step hooks drive the masks")
    if isinstance(optimizer, SparseAdam):
        raise ConfigError(
            f"`optimizer` (={kind}) takes sparse gradients only, masked weights have dense ones; use Adam"
        )
    if kind == "ZeroRedundancyOptimizer":
        raise ConfigError(f"`optimizer` (={kind}) shards its state over ranks; use the plain optimizer under DDP")


@torch.no_grad()
def zero_state_(optimizer: Optimizer, weight: Tensor, where: Bool[Tensor, "*shape"]) -> None:
    """Write zeros into every state tensor shaped like the weight, where the mask is True."""
    for value in shaped_state(optimizer, weight).values():
        fill_zeros_(value, where)


@torch.no_grad()
def reset_state_(optimizer: Optimizer, weight: Tensor, changed: Bool[Tensor, "*shape"]) -> list[str]:
    """Reset the state of weights that died or came alive; step counts stay.

    Args:
        optimizer: Any torch.optim optimizer.
        weight: A parameter of it.
        changed: True where the mask changed.

    Returns:
        The names of state that has another shape than the weight (factored, flattened) and was reset as a whole.
    """
    zero_state_(optimizer, weight, changed)
    if isinstance(optimizer, LBFGS):  # one flat history of all parameters, filed under the first
        whole = sorted({key for state in optimizer.state.values() for key in state})
        optimizer.state.clear()
        return whole
    shaped = shaped_state(optimizer, weight)
    whole = []
    for key, value in optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and key not in shaped and value.ndim > 0:
            value.zero_()
            whole.append(key)
    return whole


def shaped_state(optimizer: Optimizer, weight: Tensor) -> dict[str, Shaped[Tensor, "*shape"]]:
    """The state tensors that have an entry for every entry of the weight."""
    state = optimizer.state.get(weight, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == weight.shape}


class StateMover:
    """Moves an optimizer's state along where the alive entries of a weight in alive-only storage move."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._brought = False

    def follow(self, weights: Iterable[MaskedWeight]) -> None:
        """Watch those of the weights that have a fast path; nobody but the caller keeps the mover alive."""
        for weight in weights:
            path = path_of(weight.owners[0][0])
            if path is not None:
                path.movers.add(self)

    def hooks(self) -> list[RemovableHandle]:
        """Watch whose state it is: that of the present positions, or what was loaded after the last step."""
        return [
            self.optimizer.register_load_state_dict_post_hook(lambda optimizer: self._bring(True)),
            self.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._bring(False)),
        ]

    def _bring(self, brought: bool) -> None:
        self._brought = brought

    @torch.no_grad()
    def moved(self, parameter: Tensor, held: torch.Size, move: Callable[[Tensor], Tensor], loading: bool) -> None:
        """Keep the state of weights that stay alive, zero for grown ones.

        Where a model's state is loaded after the optimizer's, that one is of the new positions already: it stays, and
        what does not fit them is dropped.
        """
        state = self.optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            if not isinstance(value, Tensor) or value.shape != held or value.ndim == 0:
                continue
            if not (loading and self._brought):
                made = move(value).contiguous()
                state[key] = value.copy_(made) if made.shape == value.shape else made
            elif value.shape != parameter.shape:
                del self.optimizer.state[parameter]
                return
