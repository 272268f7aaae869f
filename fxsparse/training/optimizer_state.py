"""The state of any torch.optim optimizer under a mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from fxsparse.errors import ConfigError


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
        value.masked_fill_(where, 0)


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
