"""Alive-only storage: the parameter of a layer holds its alive values alone, and no mask stands beside it.

The `state_dict` keeps its keys and dense shapes, so checkpoints fit either storage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn.sharded import is_sharded
from fxsparse.nn.shared import ROW_ORDER, SharedPath, path_of
from fxsparse.nn.shared_gradient import MASK, WEIGHT
from fxsparse.nn.shared_index import held_index
from fxsparse.nn.shared_product import Index, read_alive, spread_values


def packed_path(module: nn.Module) -> SharedPath | None:
    """The fast path of a module whose parameter holds the alive values alone, else None."""
    path = path_of(module)
    return path if path is not None and path.packed else None


@torch.no_grad()
def pack_(module: nn.Module) -> None:
    """Turn a dense parameter with a fast path, and its gradient, into the alive values; the object stays.

    Raises:
        ConfigError: the layer has no sparse product now; the message says why.
    """
    path = path_of(module)
    if path is None:
        raise ConfigError(f"`weight` of {type(module).__name__} has no fast path; call accelerate first")
    path.refresh(module)
    if path.packed:
        return
    if path.reason is not None:
        raise ConfigError(f"`weight` of {type(module).__name__} cannot be stored alive only: {path.reason}")
    parameter = _parameter(module)
    replace_(parameter, lambda dense: path.pack(module, dense))
    path.packed = True
    path.forget()
    del module._buffers[MASK]
    module._register_state_dict_hook(_dense_state)  # type: ignore[no-untyped-call]  # untyped in torch


@torch.no_grad()
def unpack_(module: nn.Module) -> None:
    """Undo `pack_`: the dense parameter and its mask are back."""
    path = packed_path(module)
    if path is None:
        return
    mask = path.dense_mask(module)
    replace_(_parameter(module), lambda values: path.spread(module, values))
    path.packed = False
    module.register_buffer(MASK, mask)
    for key, hook in list(module._state_dict_hooks.items()):
        if hook is _dense_state:
            del module._state_dict_hooks[key]
    path.refresh(module)


@torch.no_grad()
def write_packed_mask_(module: nn.Module, mask: Tensor, row_order: Tensor | None, loading: bool = False) -> None:
    """Give alive-only storage another legal mask: kept weights keep value, gradient and state, grown ones are zero.

    Args:
        module: The layer.
        mask: The new mask.
        row_order: The new row order; the present one stays by default, and it is in its buffer already.
        loading: Whether a checkpoint is being loaded, which may have brought the optimizer's state before.

    Raises:
        ConfigError: the parameter is spread over ranks.
    """
    path, parameter = packed_path(module), _parameter(module)
    assert path is not None
    if is_sharded(parameter):
        raise ConfigError(f"`weight` of {type(module).__name__} is sharded: its alive entries cannot move; use DDP")
    before, rows, held = held_index(module), path.rows, parameter.shape
    old = Index(*(each.clone() for each in before))
    order = module._buffers.get(ROW_ORDER) if row_order is None else row_order
    path.place(module, mask, order)
    new = held_index(module)

    def moved(values: Tensor) -> Tensor:
        dense = spread_values(values, old, rows, path.shape)
        return read_alive(dense, new.positions, new.rows, path.rows)

    replace_(parameter, moved)
    for mover in list(path.movers):
        mover.moved(parameter, held, moved, loading)


def replace_(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Change what a parameter and its gradient hold, in place where the shape stays."""
    gradient, value = parameter.grad, change(parameter.detach()).contiguous()
    changed = None if gradient is None else change(gradient.detach()).contiguous()
    if value.shape == parameter.shape:
        parameter.copy_(value)
        if gradient is not None and changed is not None:
            gradient.copy_(changed)
        return
    parameter.grad = None
    other = torch.float32 if value.dtype is torch.float64 else torch.float64
    parameter.data = value.new_empty(0, dtype=other)  # torch forgets what accumulates gradients of the old shape
    parameter.data = value
    parameter.grad = changed


@torch.no_grad()
def load_packed_(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    errors: list[str],
    check: Callable[[Tensor, Tensor, Tensor | None], None],
) -> None:
    """Turn the dense weight and mask of an incoming `state_dict` into what the module holds.

    Args:
        module: The layer.
        state_dict: The incoming state; its mask is taken out, its weight becomes alive values.
        prefix: Of its keys.
        errors: Where what is wrong is told; the module stays as it is then.
        check: Raises ConfigError for a mask that does not fit a weight, under a row order.
    """
    path = packed_path(module)
    assert path is not None
    given = state_dict.pop(prefix + MASK, None)
    dense, order = state_dict.get(prefix + WEIGHT), state_dict.get(prefix + ROW_ORDER)
    mask = path.dense_mask(module) if given is None else given
    try:
        check(torch.empty(path.shape, device="meta"), mask, module._buffers.get(ROW_ORDER) if order is None else order)
    except ConfigError as error:
        errors.append(str(error))
        state_dict[prefix + WEIGHT] = _parameter(module).detach()
        return
    if given is not None or order is not None:
        device = _parameter(module).device
        write_packed_mask_(module, mask.to(device), None if order is None else order.to(device), loading=True)
    if isinstance(dense, Tensor) and dense.shape == path.shape:
        state_dict[prefix + WEIGHT] = path.pack(module, dense.to(_parameter(module).device))


def _dense_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    """Save the dense weight and the mask, as dense storage does."""
    path = packed_path(module)
    if path is not None:
        state_dict[prefix + WEIGHT] = path.dense_weight(module).detach()
        state_dict[prefix + MASK] = path.dense_mask(module)


def _parameter(module: nn.Module) -> nn.Parameter:
    parameter = module._parameters[WEIGHT]
    assert parameter is not None
    return parameter
