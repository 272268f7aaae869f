"""Masks beside the parameters of any module: installing, loading, tying, removing them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as _PRESERVED
from torch.nn.parameter import is_lazy

from fxsparse.errors import ConfigError
from fxsparse.nn.resu_state import ALIVE, load_companions, read_phase
from fxsparse.nn.select import keep_
from fxsparse.nn.shared import close_path
from fxsparse.nn.shared_packed import load_packed_, packed_path
from fxsparse.nn.slot import SHARED, SLOTS, MaskSlot, slots_of
from fxsparse.nn.spec import Guard, MaskSpec


def mask_name(attribute: str) -> str:
    """The name of the mask buffer of a parameter."""
    return f"{attribute}_mask"


def row_order_name(attribute: str) -> str:
    """The name of the row order buffer of a parameter."""
    return f"{attribute}_row_order"


def mask_spec(module: nn.Module, attribute: str) -> MaskSpec | None:
    """The spec of the mask of this parameter of the module itself, or None where it has no mask."""
    slot = slots_of(module).get(attribute)
    return None if slot is None else slot.spec


def check_mask(name: str, weight: Tensor, spec: MaskSpec, mask: object, row_order: Tensor | None = None) -> None:
    """Raise ConfigError unless the pattern fits the weight and the mask is bool, of its shape, and legal or full."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(f"the mask of `{name}` (={kind}) must be a bool tensor; compare your values to make one")
    if mask.shape != weight.shape:
        shape = tuple(weight.shape)
        raise ConfigError(f"the mask of `{name}` (={tuple(mask.shape)}) must have the shape of the weight, {shape}")
    check_pattern(name, weight, spec, row_order)
    try:
        if not mask.is_meta and not bool(mask.all()):
            spec.pattern.check(mask, spec.layout, row_order)
    except ConfigError as error:
        raise ConfigError(f"the mask of `{name}` does not fit: {error}") from error


def check_pattern(name: str, weight: Tensor, spec: MaskSpec, row_order: Tensor | None = None) -> None:
    """Raise ConfigError unless the pattern fits the weight."""
    try:
        spec.pattern.units(weight.shape, spec.layout, row_order)
    except ConfigError as error:
        raise ConfigError(f"the mask of `{name}` does not fit: {error}") from error


def install_mask(
    module: nn.Module,
    attribute: str,
    spec: MaskSpec | None = None,
    mask: Tensor | None = None,
    row_order: Tensor | None = None,
) -> None:
    """Give a parameter a mask: the persistent bool buffer `<attribute>_mask` beside it, and zeros at its dead entries.

    From then on a `state_dict` without masks loads strictly (the masks stay, dead entries become zero again) and one
    with masks restores them exactly, in place. With `Guard.GRADIENT` a hook masks the parameter's gradient after each
    backward pass; copies and unpickled modules have their own.

    Args:
        module: The module that holds the parameter.
        attribute: The parameter's name in that module.
        spec: What the mask is; an unstructured mask of a sparse module by default.
        mask: The initial mask, copied; all True by default.
        row_order: The initial row order of a `SharedSupport` mask, int64, copied.

    Raises:
        ConfigError: no such parameter, an uninitialised or integer one, one with a mask already, a name that is taken,
            or a mask of the wrong dtype, shape or pattern. Nothing has changed then.
    """
    spec = MaskSpec() if spec is None else dataclasses.replace(spec, row_order=None)
    parameter = _checked_parameter(module, attribute)
    if attribute in slots_of(module):
        raise ConfigError(f"`{attribute}` of {type(module).__name__} has a mask already; set its values with set_masks")
    if hasattr(module, mask_name(attribute)):
        raise ConfigError(f"`{mask_name(attribute)}` of {type(module).__name__} is taken; rename that attribute")
    buffer = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)  # the weight's strides, for its kernels
    if mask is None:
        check_pattern(attribute, parameter, spec, row_order)
    else:
        check_mask(attribute, parameter, spec, mask, row_order)
        buffer.copy_(mask)
    if not slots_of(module):
        module.__dict__[SLOTS] = {}
        if isinstance(module, fx.GraphModule):  # whose deep copies keep, of the plain attributes, only these
            module.meta[_PRESERVED] = {**module.meta.get(_PRESERVED, {}), SLOTS: module.__dict__[SLOTS]}
        module.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]  # untyped in torch
        module.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]  # untyped in torch
        if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
            module._register_state_dict_hook(_complete_state)  # type: ignore[no-untyped-call]  # untyped in torch
    module.register_buffer(mask_name(attribute), buffer)
    slots_of(module)[attribute] = MaskSlot(spec)
    if row_order is not None:
        _register_row_order(module, attribute, row_order)
    bind_guard(module, attribute)
    if mask is not None:
        zero_dead_(module, attribute)


def remove_mask(module: nn.Module, attribute: str) -> None:
    """Take a mask off: dead entries are zeroed once more, then buffer, hooks and record go; the parameter object stays.

    Raises:
        ConfigError: the parameter has no mask.
    """
    slot = slots_of(module).get(attribute)
    if slot is None:
        raise ConfigError(f"`{attribute}` of {type(module).__name__} has no mask")
    if packed_path(module) is not None:
        check_mask_edit(module)
    close_path(module)
    zero_dead_(module, attribute)
    slot.release()
    delattr(module, mask_name(attribute))
    for name in beside_mask(slot):
        delattr(module, name)
    del slots_of(module)[attribute]
    if not slots_of(module):
        del module.__dict__[SLOTS]
        if isinstance(module, fx.GraphModule):
            kept = {name: value for name, value in module.meta.get(_PRESERVED, {}).items() if name != SLOTS}
            if kept:
                module.meta[_PRESERVED] = kept
            else:
                module.meta.pop(_PRESERVED, None)
        drop_load_hooks(module)


def drop_load_hooks(module: nn.Module) -> None:
    """Remove the hooks that `install_mask` put on the module's loading."""
    for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks, module._state_dict_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_before_load, _after_load, _complete_state):
                del hooks[key]


def beside_mask(slot: MaskSlot) -> tuple[str, ...]:
    """The names of the further buffers that belong to a mask."""
    return slot.companions if slot.spec.row_order is None else (slot.spec.row_order, *slot.companions)


def mask_of(module: nn.Module, attribute: str) -> Tensor:
    """The mask buffer of this parameter of the module itself, through which its readers see the weight.

    Alive-only storage has none: it gives a mask that nobody holds, to be read.
    """
    path = packed_path(module)
    if path is not None:
        return path.dense_mask(module)
    mask = module._buffers[mask_name(attribute)]
    assert mask is not None
    return mask


def alive_of(module: nn.Module, attribute: str) -> Tensor:
    """Which entries are alive: the mask buffer, or in a resurrection phase, which opens it, the one that holds them."""
    if not slots_of(module)[attribute].open:
        return mask_of(module, attribute)
    alive = module._buffers[attribute + ALIVE]
    assert alive is not None
    return alive


def check_mask_edit(module: nn.Module) -> None:
    """Raise ConfigError where one of the module's own weights is in a resurrection phase, or stored alive only."""
    check_phase(module)
    if packed_path(module) is not None:
        raise ConfigError(f"`weight` of {type(module).__name__} is stored alive only; call restore_dense(handle) first")


def check_phase(module: nn.Module) -> None:
    """Raise ConfigError where one of the module's own weights is in a resurrection phase."""
    for attribute, slot in slots_of(module).items():
        if slot.open:
            raise ConfigError(
                f"`{attribute}` of {type(module).__name__} is in a resurrection phase (`mode` (=Mode.RESU)): "
                "commit or discard it first, or detach the method"
            )


def row_order_of(module: nn.Module, attribute: str) -> Tensor | None:
    """The row order buffer of this parameter, or None for the natural order."""
    return module._buffers.get(row_order_name(attribute))


def set_guard(module: nn.Module, attribute: str, guard: Guard) -> None:
    """Change what keeps the dead entries of a masked parameter out of the training.

    Raises:
        ConfigError: the parameter has no mask, or its route excludes the guard.
    """
    slot = slots_of(module).get(attribute)
    if slot is None:
        raise ConfigError(f"`{attribute}` of {type(module).__name__} has no mask")
    if packed_path(module) is not None:
        check_mask_edit(module)
    slot.spec = dataclasses.replace(slot.spec, guard=guard)
    bind_guard(module, attribute)


def bind_guard(module: nn.Module, attribute: str) -> None:
    """Make the guard of a mask watch the parameter and the buffer that the module holds now."""
    if packed_path(module) is None:
        slots_of(module)[attribute].bind(_checked_parameter(module, attribute), mask_of(module, attribute))
        mask_written(module)


def mask_written(module: nn.Module) -> None:
    """Tell the module's fast path, if it has one, that its mask, row order or phase may have changed."""
    path = module.__dict__.get(SHARED)
    if path is not None:
        path.refresh(module)


def share_mask(module: nn.Module, attribute: str, mask: Tensor) -> None:
    """Make this very tensor the module's mask buffer; it must equal the one it replaces."""
    module._buffers[mask_name(attribute)] = mask
    bind_guard(module, attribute)


def write_row_order_(module: nn.Module, attribute: str, row_order: Tensor) -> None:
    """Set the row order of a mask, in place where there is one."""
    present = row_order_of(module, attribute)
    if present is None:
        _register_row_order(module, attribute, row_order)
    else:
        present.copy_(row_order)


@torch.no_grad()
def zero_dead_(module: nn.Module, attribute: str) -> None:
    """Write zeros to the entries of a parameter that its readers do not see; in a resurrection phase there are none."""
    if packed_path(module) is not None:
        return
    gate = mask_of(module, attribute)
    parameter = _checked_parameter(module, attribute)
    if gate.device.type == "cpu" and bool(gate.all()):  # elsewhere the question would wait for the device
        return
    if parameter.device == gate.device:  # they differ while a model is half materialised
        keep_(parameter, gate)


def _checked_parameter(module: nn.Module, attribute: str) -> nn.Parameter:
    parameter = module._parameters.get(attribute)
    kind = type(module).__name__
    if parameter is None:
        raise ConfigError(f"`{attribute}` is not a parameter of {kind} itself; remove its parametrization first")
    if is_lazy(parameter):
        raise ConfigError(f"`{attribute}` of {kind} is not initialised; run the model once first")
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ConfigError(
            f"`{attribute}` of {kind} (={parameter.dtype}) must be floating point; prune before quantising"
        )
    return parameter


def _register_row_order(module: nn.Module, attribute: str, row_order: Tensor) -> None:
    name = row_order_name(attribute)
    module.register_buffer(name, row_order.detach().clone().to(mask_of(module, attribute).device))
    slot = slots_of(module)[attribute]
    slot.spec = dataclasses.replace(slot.spec, row_order=name)


def _before_load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object, strict: bool, *lists: list[str]
) -> None:
    """Put the incoming masks into the buffers there are, and the present ones where the state has none."""
    errors = lists[-1]
    for attribute, slot in slots_of(module).items():
        if packed_path(module) is not None:
            load_packed_(module, state_dict, prefix, errors, _checker(prefix + attribute, slot.spec))
            continue
        parameter = _checked_parameter(module, attribute)
        mask_key, order_key = prefix + mask_name(attribute), prefix + row_order_name(attribute)
        mask, order = mask_of(module, attribute), row_order_of(module, attribute)
        check_held = partial(check_mask, prefix + attribute, parameter, slot.spec)
        try:
            held_order = state_dict.get(order_key, order)
            load_companions(module, attribute, slot, state_dict, prefix, partial(check_held, row_order=held_order))
        except ConfigError as error:
            errors.append(str(error))
        incoming, incoming_order = state_dict.get(mask_key, mask), state_dict.get(order_key, order)
        try:
            check_mask(prefix + attribute, parameter, slot.spec, incoming, incoming_order)
        except ConfigError as error:
            errors.append(str(error))
            incoming, incoming_order = mask, order
        if mask.is_meta and incoming is not mask:
            continue  # load_state_dict(assign=True) brings the storage
        if incoming is not mask:
            mask.copy_(incoming)
        state_dict[mask_key] = mask
        if incoming_order is not None:
            write_row_order_(module, attribute, incoming_order)
            state_dict[order_key] = row_order_of(module, attribute)


def _checker(name: str, spec: MaskSpec) -> Callable[[Tensor, Tensor, Tensor | None], None]:
    def check(weight: Tensor, mask: Tensor, row_order: Tensor | None) -> None:
        check_mask(name, weight, spec, mask, row_order)

    return check


def _complete_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    """Add the masks where the module's own way of saving leaves buffers out."""
    for attribute, slot in slots_of(module).items():
        for name in (mask_name(attribute), *beside_mask(slot)):
            buffer = module._buffers.get(name)
            if buffer is not None:  # alive-only storage has no mask; it saves one all the same
                state_dict.setdefault(prefix + name, buffer.detach())


def _after_load(module: nn.Module, incompatible: object) -> None:
    for attribute, slot in slots_of(module).items():
        read_phase(module, attribute, slot)
        bind_guard(module, attribute)
        zero_dead_(module, attribute)
