"""Where a parameter or a module stands in a model, and putting another one there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxsparse.errors import ConfigError

_CONTAINERS = ("_parameters", "_buffers", "_modules")


def split_name(name: str) -> tuple[str, str]:
    """A parameter's name as (path of its module, attribute)."""
    path, _, attribute = name.rpartition(".")
    return path, attribute


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the attribute.

    Raises:
        ConfigError: the model has no parameter of that name.
    """
    path, attribute = split_name(name)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if module is None or dict(module._parameters.items()).get(attribute) is None:
        raise ConfigError(f"`{name}` is not a parameter of the model")
    return module, attribute


def places_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each parameter, in the order of `named_parameters` -> all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> int:
    """Put `new` wherever `old` stands below the root: as a submodule, or in containers among plain attributes.

    Returns:
        The number of places in the module tree.
    """
    return replace_modules(model, {old: new})


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> int:
    """`replace_module` for many at once, in one walk: old module -> the one to put there."""
    count = 0
    by_identity = {id(old): module for old, module in new.items()}
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if id(child) in by_identity:
                holder._modules[name] = by_identity[id(child)]
                count += 1
    replace_in_attributes(model, by_identity)
    return count


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` at every name of `old`, and in containers among plain attributes, as recurrent layers keep them."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
    replace_in_attributes(model, {id(old): new})


def replace_in_attributes(model: nn.Module, new: Mapping[int, object]) -> None:
    """Replace objects among the plain attributes of all modules, and in their lists, dicts and tuples.

    Args:
        model: the model, changed in place; its tables of parameters, buffers and modules stay as they are.
        new: id of an object -> what stands in its place.
    """
    for holder in model.modules():
        for name, value in holder.__dict__.items():
            if id(value) in new or (type(value) in (list, dict, tuple) and value and name not in _CONTAINERS):
                holder.__dict__[name] = _replaced(value, new)


def _replaced(value: Any, new: Mapping[int, object], depth: int = 3) -> Any:
    if id(value) in new:
        return new[id(value)]
    if not depth:
        return value
    if type(value) is list:
        value[:] = [_replaced(item, new, depth - 1) for item in value]
    elif type(value) is dict:
        value.update({key: _replaced(item, new, depth - 1) for key, item in value.items()})
    elif type(value) is tuple and any(id(item) in new for item in value):
        return tuple(new.get(id(item), item) for item in value)
    return value
