"""Copies of a model: structural (tensors shared) and isolated (nothing that a run could change is shared)."""

from __future__ import annotations

import copy
import copyreg
import types
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fxsparse.errors import CaptureError
from fxsparse.graph.captured import GRAPH_STATE, CapturedModule
from fxsparse.graph.tree import modules_of, parameters_of
from fxsparse.graph.writes import storage_of
from fxsparse.nn.slot import slots_of

M = TypeVar("M", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def structural_clone(model: M) -> M:
    """Copy the module tree and share every tensor.

    Containers, plain attributes and hooks are fresh; parameters, buffers and tensors in plain attributes are the same
    objects, so that an optimizer of `model` trains the clone as well, and ties and cross references survive.

    Raises:
        CaptureError: when an attribute cannot be copied, or a parameter has no shape yet (lazy modules).
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
    memo.update((id(module), module) for module in model.modules() if isinstance(module, torch.jit.ScriptModule))
    return _copy(model, memo)


def isolated_clone(model: M, copied: Collection[str] = (), *, to_run: bool = False) -> M:
    """Copy the model for a run that must leave no trace.

    Parameters are new objects without gradients and hooks that alias the storage of the originals (no memory), except
    those named in `copied`, whose values are copied too; buffers are copied.

    Args:
        model: the model; it stays as it is.
        copied: names of parameters into which the forward pass writes.
        to_run: whether the copy is only run, while the model stays as it is: captured graphs and their code are then
            shared.

    Raises:
        CaptureError: as `structural_clone`.
    """
    names = {id(parameter): name for name, parameter in parameters_of(model)}
    chosen = frozenset(copied)
    memo: dict[int, Any] = {}
    tensors = list(_tensors(model))
    held = Counter(storage_of(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
    for tensor in tensors:
        if id(tensor) in memo:
            continue
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = _alias(tensor, names.get(id(tensor), "") in chosen)
        elif not tensor.is_leaf or tensor.requires_grad or _is_alone(tensor, held):
            memo[id(tensor)] = tensor.detach().clone()
    return _copy(model, memo, to_run)


def _is_alone(tensor: torch.Tensor, held: Counter[Any]) -> bool:
    """Whether a clone is all that deepcopy would make of `tensor`: nothing shares its memory, nothing hangs on it."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.__dict__ or tensor.is_meta:
        return False
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return whole and held[storage_of(tensor)] == 1


def _alias(parameter: nn.Parameter, copied: bool) -> nn.Parameter:
    value = parameter.detach().clone() if copied else parameter.detach()
    alias = nn.Parameter(value, requires_grad=parameter.requires_grad)
    alias.__dict__.update(parameter.__dict__)
    return alias


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for path, module in modules_of(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        held: dict[str, Any] = dict(module._parameters)
        for name, parameter in held.items():
            if isinstance(parameter, nn.UninitializedParameter):
                full = f"{path}.{name}".lstrip(".")
                raise CaptureError(f"parameter `{full}` has no shape yet (lazy module): run one forward pass before")
        for value in module.__dict__.values():
            if type(value) in _ATOMIC or value is module._modules:
                continue
            if type(value) not in _EMPTYING or value:
                yield from _tensors_in(value)


def _tensors_in(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item, depth - 1)


def _copy(model: M, memo: dict[int, Any], to_run: bool = False) -> M:
    try:
        with torch.no_grad():  # with gradients on, torch copies the parameters of scripted modules as non-leaf tensors
            _copy_plain(model, memo, to_run)
            clone: M = copy.deepcopy(model, memo)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"`{_culprit(model, memo)}` cannot be copied ({error}): remove it before, or define its `__deepcopy__`"
        ) from error
    modules = modules_of(model)
    for path, module in modules:  # torch's own GraphModule drops these when it is copied
        if isinstance(module, fx.GraphModule) and not isinstance(module, CapturedModule):
            twin = clone.get_submodule(path)
            twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
            for hooks in _HOOKS:
                setattr(twin, hooks, copy.copy(getattr(module, hooks)))
    for path, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            for (_, old), (_, new) in zip(
                module.named_parameters(), clone.get_submodule(path).named_parameters(), strict=True
            ):
                new.requires_grad_(old.requires_grad)
    for _, module in modules:
        copied = memo.get(id(module))  # a class that is rebuilt from its arguments forgets the mode
        if isinstance(copied, nn.Module) and copied.training is not module.training:
            copied.training = module.training
    _rebind_hooks(clone, memo)
    return clone


def _copy_plain(model: nn.Module, memo: dict[int, Any], to_run: bool) -> None:
    """Copy every module that has no copying protocol of its own into `memo`, as `copy.deepcopy` does but faster."""
    modules = [module for _, module in modules_of(model)]
    for module in modules:
        specs = (slot.spec for slot in slots_of(module).values())
        memo.update((id(spec), spec) for spec in specs)  # which nobody changes
    plain = {kind: _is_plain(kind) for kind in {type(module) for module in modules}}
    twins = [
        (module, object.__new__(type(module)))
        for module in reversed(modules)  # children first: a parent's own protocol may look at them
        if id(module) not in memo and (plain[type(module)] or (to_run and isinstance(module, CapturedModule)))
    ]
    memo.update((id(module), twin) for module, twin in twins)
    for module, twin in twins:
        shared = GRAPH_STATE if isinstance(module, CapturedModule) else ()
        state: dict[str, Any] = {}
        for key, value in module.__dict__.items():
            kind = type(value)
            if kind in _ATOMIC or key in shared:
                state[key] = value
            elif kind not in _TABLES or value or id(value) in memo:
                state[key] = _copied(value, memo)
            else:
                state[key] = memo[id(value)] = kind()
        if isinstance(module, CapturedModule):
            twin.__dict__.update(state)
        elif type(module).__setstate__ is nn.Module.__setstate__:
            twin.__dict__.update(state)
        else:
            twin.__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it so


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether deepcopy of a `kind` copies its ``__dict__`` and nothing else."""
    if any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _PROTOCOL):
        return False
    if kind.__setstate__ is not nn.Module.__setstate__ and not kind.__setstate__.__module__.startswith("torch.nn."):
        return False
    return kind not in copyreg.dispatch_table and not any(base.__dict__.get("__slots__") for base in kind.__mro__)


_PROTOCOL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__")
_ATOMIC = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type})
_TABLES = frozenset({dict, OrderedDict})
_EMPTYING = frozenset({dict, OrderedDict, set, list, tuple})


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMIC or (kind is tuple and all(type(item) in _ATOMIC for item in value)):
        return value
    if kind is set and id(value) not in memo and all(type(item) in _ATOMIC for item in value):
        memo[id(value)] = twin_set = set(value)
        return twin_set
    if kind is list and id(value) not in memo:
        twin_list: list[Any] = []
        memo[id(value)] = twin_list
        twin_list.extend(_copied(item, memo) for item in value)
        return twin_list
    if kind not in _TABLES or id(value) in memo:
        return copy.deepcopy(value, memo)
    twin = memo[id(value)] = kind()
    if not value:
        return twin
    for key, item in value.items():
        known = memo.get(id(item))
        twin[_copied(key, memo)] = _copied(item, memo) if known is None else known
    return twin


def _rebind_hooks(clone: nn.Module, memo: dict[int, Any]) -> None:
    """Let hooks that close over the original (``lambda m, i, o: self.features.append(o)``) see the copy instead."""
    for _, module in modules_of(clone):
        for hooks in _HOOKS:
            table = module.__dict__.get(hooks) or {}
            for key, hook in list(table.items()):
                if isinstance(hook, types.FunctionType) and hook.__closure__:
                    table[key] = _rebound(hook, memo)


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    closure = tuple(_rebound_cell(cell, memo) for cell in function.__closure__ or ())
    code, names, defaults = function.__code__, function.__globals__, function.__defaults__
    twin = types.FunctionType(code, names, function.__name__, defaults, closure)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    return twin


def _rebound_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        copied = memo.get(id(cell.cell_contents))
    except ValueError:  # an empty cell
        return cell
    return cell if copied is None else types.CellType(copied)


def _culprit(model: nn.Module, memo: dict[int, Any]) -> str:
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"{path}.{name}".lstrip(".")
    return type(model).__name__
