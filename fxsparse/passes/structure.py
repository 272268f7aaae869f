"""Structural equality: names, objects and flags that a rewrite must keep."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fxsparse.errors import PassError
from fxsparse.graph.tree import places_of_modules
from fxsparse.nn.masked import beside_mask, mask_name
from fxsparse.nn.slot import slots_of
from fxsparse.passes.snapshot import join


def check_same_names(before: nn.Module, after: nn.Module, new: Iterable[str] = ()) -> None:
    """Raise PassError unless both models hold the same parameters, and the same state apart from masks.

    Parameters must be the same objects under the same names; the keys of `state_dict` must be the same in the same
    order once masks and what belongs to them are left out; the training flags must agree.

    Args:
        before: The model before.
        after: The model after.
        new: Names of mask buffers that must be there afterwards.
    """
    old = {name: id(parameter) for name, parameter in before.named_parameters(remove_duplicate=False)}
    found = {name: id(parameter) for name, parameter in after.named_parameters(remove_duplicate=False)}
    changed = [name for name in old | found if old.get(name) != found.get(name)]
    if changed:
        raise PassError(f"parameter `{changed[0]}` is not the same object as before")
    check_same_state(before, after)
    missing = set(new) - {name for name, _ in after.named_buffers(remove_duplicate=False)}
    if missing:
        raise PassError(f"mask `{min(missing)}` is missing")


def check_same_state(before: nn.Module, after: nn.Module) -> None:
    """Raise PassError unless the keys of `state_dict`, masks left out, and the training flags agree."""
    old, found = _state_names(before), _state_names(after)
    if old != found:
        changed = sorted(set(old) ^ set(found)) or ["their order"]
        raise PassError(f"the keys of `state_dict` changed: {', '.join(changed[:5])}")
    flags = {path: module.training for path, module in places_of_modules(before)}
    for path, module in places_of_modules(after):
        if flags.get(path, module.training) != module.training:
            raise PassError(f"`{path or 'the root'}` changed its training flag")


def _state_names(model: nn.Module) -> list[str]:
    masks = set()
    for path, module in places_of_modules(model):
        for attribute, slot in slots_of(module).items():
            masks |= {join(path, name) for name in (mask_name(attribute), *beside_mask(slot))}
    return [name for name in model.state_dict(keep_vars=True) if name not in masks]
