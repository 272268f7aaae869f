"""The modes of a resurrection unit, and what its `state_dict` must hold."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from fxsparse.errors import ConfigError

FORWARD_MASK, TRAINABLE = "weight_forward_mask", "weight_trainable"
_KEYS = ("weight_mask", FORWARD_MASK, TRAINABLE, "_extra_state")


class Mode(enum.Enum):
    """What the forward of a resurrection unit reads."""

    DENSE = "dense"
    """W_eff = W; the mask is full."""
    SPARSE = "sparse"
    """W_eff = where(M, W, 0)."""
    RESU = "resu"
    """W_eff = W: the dead positions hold the resurrection parameters theta."""


_MODES = tuple(Mode)


def pack_mode(mode: Mode, freeze_active: bool) -> Tensor:
    """The extra state of a unit, uint8 [2]."""
    return torch.tensor([_MODES.index(mode), int(freeze_active)], dtype=torch.uint8)


def unpack_mode(state: Tensor) -> tuple[Mode, bool]:
    """Mode and `freeze_active` from an extra state."""
    mode, freeze_active = state.tolist()
    return _MODES[mode], bool(freeze_active)


def complete_state(state: dict[str, Any], prefix: str, present: dict[str, Tensor], mode: Mode) -> None:
    """Complete the state of one unit: a dense one keeps what the unit has, a plain sparse one means mode SPARSE.

    Args:
        state: The incoming `state_dict`; missing keys are added.
        prefix: The unit's prefix in it.
        present: What the unit has now, by key.
        mode: The unit's mode now.

    Raises:
        ConfigError: masks without a mode or the reverse, masks that contradict the mode or the shape of the weight, or
            weights without masks for a unit in RESU. Nothing has changed then.
    """
    missing = [key for key in _KEYS if prefix + key not in state]
    added: dict[str, Tensor] = {}
    if missing == list(_KEYS):
        if mode is Mode.RESU:
            raise ConfigError(f"`{prefix}mode` (={mode}) cannot take weights without masks: commit or discard first")
        added = dict(present)
    elif missing == list(_KEYS[1:]):
        mask = state[prefix + "weight_mask"]
        dead = torch.zeros_like(mask)
        added = {FORWARD_MASK: mask, TRAINABLE: dead, "_extra_state": pack_mode(Mode.SPARSE, True)}
    elif missing:
        raise ConfigError(f"the state of `{prefix}weight` lacks {', '.join(missing)}: not a whole RESU checkpoint")
    whole = {key: added.get(key, state.get(prefix + key)) for key in _KEYS}
    problem = _problem(whole, present["weight_mask"].shape)
    if problem is not None:
        raise ConfigError(f"the state of `{prefix}weight` cannot be right: {problem}; take an intact checkpoint")
    state.update({prefix + key: value for key, value in added.items()})


def _problem(state: dict[str, Any], shape: torch.Size) -> str | None:
    for key in _KEYS[:-1]:
        value = state[key]
        if not isinstance(value, Tensor) or value.dtype is not torch.bool or value.shape != shape:
            return f"{key} is not a bool tensor of shape {tuple(shape)}"
    extra = state["_extra_state"]
    if (
        not isinstance(extra, Tensor)
        or extra.dtype is not torch.uint8
        or extra.shape != (2,)
        or extra[0] >= len(_MODES)
    ):
        return f"its mode (={extra}) is none of {[mode.value for mode in _MODES]}"
    mask, forward, trainable = (state[key] for key in _KEYS[:-1])
    if mask.is_meta:
        return None
    mode, _ = unpack_mode(extra)
    if mode is Mode.RESU:
        fits = bool(forward.all()) and not bool(mask.all()) and not bool((trainable & mask).any())
    else:
        fits = (mode is Mode.SPARSE or bool(mask.all())) and torch.equal(forward, mask) and not bool(trainable.any())
    return None if fits else f"its masks contradict its mode (={mode})"
