"""Walks over a module tree, in the order of `nn.Module`'s own but without a generator for each level."""

from __future__ import annotations

from torch import nn


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, under its first path, as `named_modules` yields them."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        path, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        if module._modules:
            prefix = f"{path}." if path else ""
            ahead += [(prefix + name, child) for name, child in module._modules.items() if child is not None][::-1]
    return found


def places_of_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its paths, as `named_modules(remove_duplicate=False)` yields them."""
    found: list[tuple[str, nn.Module]] = []
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        path, module = ahead.pop()
        found.append((path, module))
        if module._modules:
            prefix = f"{path}." if path else ""
            ahead += [(prefix + name, child) for name, child in module._modules.items() if child is not None][::-1]
    return found


def parameters_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter once, under its first name, as `named_parameters` yields them."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in modules_of(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter))
    return list(found.values())
