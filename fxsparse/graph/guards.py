"""Guards around a trace: refuse what it would change, inline or lose without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_PATCH_LOCK = threading.RLock()
NOTHING = "nothing to mend: its weights can be masked all the same"


class Untraceable(Exception):
    """Why a module cannot be a graph; caught by capture and turned into a refusal."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.mend = mend


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Refuse a trace that changed plain attributes of a module, and put them back."""
    before = [(path, module, dict(module.__dict__), _contents(module)) for path, module in root.named_modules()]
    try:
        yield
        for path, module, state, contents in before:
            now = module.__dict__
            changed = [key for key in {**state, **now} if state.get(key, root) is not now.get(key, root)]
            changed += [key for key, value in contents.items() if value != _shallow(module.__dict__[key])]
            if changed:
                raise Untraceable(
                    f"calling it changes the attribute `{f'{path}.{changed[0]}'.lstrip('.')}`",
                    "keep state in buffers that are updated in place",
                )
    finally:
        for _, module, state, contents in before:
            module.__dict__.clear()
            module.__dict__.update(state)
            for key, value in contents.items():
                _refill(module.__dict__[key], value)


def _contents(module: nn.Module) -> dict[str, Any]:
    return {key: _shallow(value) for key, value in module.__dict__.items() if type(value) in (list, dict, set)}


def _shallow(value: Any) -> list[tuple[int, int]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [_Held(key, item) for key, item in items]


class _Held(tuple[int, int]):
    """Identities of a key and its value, which it keeps alive."""

    held: tuple[Any, Any]

    def __new__(cls, key: Any, item: Any) -> _Held:
        result = super().__new__(cls, (hash(key), id(item)))
        result.held = (key, item)
        return result


def _refill(container: Any, held: list[Any]) -> None:
    container.clear()
    for entry in held:
        key, item = entry.held
        if isinstance(container, dict):
            container[key] = item
        elif isinstance(container, set):
            container.add(item)
        else:
            container.append(item)


def _refusal(reason: str, mend: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Untraceable(reason, mend)

    return refuse


@contextmanager
def noticing_modes(read: set[str], noted: Callable[[nn.Module], None] = lambda module: None) -> Iterator[None]:
    """While tracing, note "training" when a module's flag is read, and "gradients" for ``torch.is_grad_enabled``.

    Args:
        read: what was read.
        noted: called with each module whose flag is read.
    """

    def get(module: nn.Module) -> bool:
        read.add("training")
        noted(module)
        flag: bool = module.__dict__["training"]
        return flag

    def put(module: nn.Module, flag: bool) -> None:
        module.__dict__["training"] = flag

    is_grad_enabled = torch.is_grad_enabled

    def enabled() -> bool:
        read.add("gradients")
        return is_grad_enabled()

    with _PATCH_LOCK:
        nn.Module.training = property(get, put)  # type: ignore[assignment]  # taken off below
        torch.is_grad_enabled = enabled
        try:
            yield
        finally:
            del nn.Module.training
            torch.is_grad_enabled = is_grad_enabled


@contextmanager
def patching(owner: type, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute of a class for a while."""
    with _PATCH_LOCK:
        before = owner.__dict__[name]
        setattr(owner, name, replacement)
        try:
            yield
        finally:
            setattr(owner, name, before)


@contextmanager
def refusing_contexts(kept: Collection[type] = ()) -> Iterator[None]:
    """While tracing, refuse what would be inlined or lost silently: custom autograd and autograd contexts.

    Args:
        kept: those that the graph can hold.
    """
    lost = "a graph would lose it"
    patches: tuple[tuple[type, str, Any], ...] = (
        (
            torch.autograd.Function,
            "apply",
            classmethod(_refusal("it calls a torch.autograd.Function, whose backward a graph would lose", NOTHING)),
        ),
        (torch.no_grad, "__enter__", _refusal(f"it runs under torch.no_grad: {lost}", "use `.detach()`")),
        (torch.enable_grad, "__enter__", _refusal(f"it runs under torch.enable_grad: {lost}", NOTHING)),
        (torch.set_grad_enabled, "__init__", _refusal(f"it calls torch.set_grad_enabled: {lost}", NOTHING)),
        (torch.inference_mode, "__enter__", _refusal(f"it runs under torch.inference_mode: {lost}", NOTHING)),
        (torch.amp.autocast, "__enter__", _refusal(f"it enters torch.autocast: {lost}", "enter it around the model")),
        (
            torch.autograd.graph.saved_tensors_hooks,
            "__enter__",
            _refusal(f"it saves tensors by hooks (activation checkpointing): {lost}", NOTHING),
        ),
    )
    with _PATCH_LOCK, ExitStack() as stack:
        for owner, name, replacement in patches:
            if owner in kept:
                continue
            stack.callback(setattr, owner, name, owner.__dict__[name])
            setattr(owner, name, replacement)
        yield
