"""The companions of a mask in resurrection: their names, and what a `state_dict` must hold of them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn.slot import MaskSlot

ALIVE, TRAINABLE, RESURRECTING = "_alive_mask", "_trainable", "_resurrecting"
COMPANIONS = (ALIVE, TRAINABLE, RESURRECTING)
"""Endings of the companions' names: M and T of a resurrection phase (bool, all False outside), and whether there is one
(bool scalar)."""

_MASK = "_mask"


class Mode(enum.Enum):
    """What the readers of a masked weight see."""

    DENSE = "dense"
    """W: every weight is alive."""
    SPARSE = "sparse"
    """where(M, W, 0)."""
    RESU = "resu"
    """W: the dead positions hold the resurrection parameters theta."""


def has_companions(slot: MaskSlot, attribute: str) -> bool:
    """Whether the buffers of resurrection phases are installed beside this mask."""
    return attribute + ALIVE in slot.companions


def load_companions(
    module: nn.Module,
    attribute: str,
    slot: MaskSlot,
    state_dict: dict[str, Any],
    prefix: str,
    check_held: Callable[[Tensor], None],
) -> None:
    """Complete and check the part of an incoming `state_dict` that belongs to one weight with companions.

    A state without masks keeps what the module has, one with a plain mask leads out of a resurrection phase.
    `check_held` raises ConfigError for an M that does not fit the weight.

    Raises:
        ConfigError: companions without all the others or without the mask, masks that contradict each other or the
            shape of the weight, or weights without masks for a module in a resurrection phase. The state then holds
            what the module has, so that loading it changes nothing of this weight.
    """
    if not has_companions(slot, attribute):
        return
    names = [attribute + ending for ending in (_MASK, *COMPANIONS)]
    present = {prefix + name: module._buffers[name] for name in names}
    try:
        state_dict.update(_complete(state_dict, present, prefix + attribute, slot))
        held = state_dict[prefix + attribute + ALIVE]
        if not held.is_meta and bool(held.any()):
            check_held(held)
    except ConfigError:
        state_dict.update({**present, prefix + attribute: module._parameters[attribute]})
        raise
    for key in list(present)[1:]:
        buffer = present[key]
        if buffer is not None and not buffer.is_meta:
            state_dict[key] = buffer.copy_(state_dict[key])  # in place, with load_state_dict(assign=True) too


def read_phase(module: nn.Module, attribute: str, slot: MaskSlot) -> None:
    """Follow the buffer that says whether the weight is in a resurrection phase, after something wrote it."""
    if has_companions(slot, attribute):
        buffer = module._buffers[attribute + RESURRECTING]
        slot.open = buffer is not None and not buffer.is_meta and bool(buffer)


def _complete(
    state_dict: dict[str, Any], present: dict[str, Tensor | None], name: str, slot: MaskSlot
) -> dict[str, Any]:
    missing = [key for key in present if key not in state_dict]
    mask_key, alive_key, *_ = present
    if not missing:
        _check(name, [state_dict[key] for key in present], [value for value in present.values() if value is not None])
        return {}
    if mask_key not in missing and len(missing) == len(COMPANIONS):
        return {key: torch.zeros_like(value) for key, value in present.items() if value is not None and key in missing}
    if len(missing) < len(present):
        raise ConfigError(f"the state of `{name}` lacks {', '.join(missing)}: not a whole RESU checkpoint")
    if slot.open and name in state_dict:
        raise ConfigError(
            f"`{name}` is in a resurrection phase and takes no weights without masks: commit, discard or detach first"
        )
    return dict(present)


def _check(name: str, given: list[Any], present: list[Tensor]) -> None:
    for value, own in zip(given, present, strict=True):
        if not isinstance(value, Tensor) or value.dtype is not torch.bool or value.shape != own.shape:
            raise ConfigError(f"the state of `{name}` has no bool tensor of shape {tuple(own.shape)} for each mask")
    mask, alive, trainable, resurrecting = given
    if mask.is_meta:
        return
    if bool(resurrecting):
        fits = bool(mask.all()) and not bool(alive.all()) and not bool((trainable & alive).any())
    else:
        fits = not bool(alive.any()) and not bool(trainable.any())
    if not fits:
        raise ConfigError(f"the masks in the state of `{name}` contradict each other; take an intact checkpoint")
