"""Guards around a trace: refuse what it would change, inline or lose without a word."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import is_
from types import FrameType
from typing import Any

import torch
from torch import nn

from fxsparse.graph.tree import modules_of

PATCH_LOCK = threading.RLock()
NOTHING = "nothing to mend: its weights can be masked all the same"


class Untraceable(Exception):
    """Why a module cannot be a graph; caught by capture and turned into a refusal.

    Attributes:
        reason: why.
        mend: what to do about it.
        within: modules that cannot be graphs either for the same reason, as far as they are known: they were running
            where it lies, and come there too when they are traced on their own.
    """

    def __init__(self, reason: str, mend: str, within: Sequence[nn.Module] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.mend = mend
        self.within = within


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Refuse a trace that changed plain attributes of a module, and put them back."""
    before = [
        (path, module, dict(module.__dict__), _contents(module))
        for path, module in modules_of(root)
        if not isinstance(module, torch.jit.ScriptModule)  # which look their methods up when they are first read
    ]
    found = ""
    try:
        yield
    finally:
        for path, module, state, contents in before:
            name = _changed(module, state, contents)
            if name is None:
                continue
            found = found or f"{path}.{name}".lstrip(".")
            module.__dict__.clear()
            module.__dict__.update(state)
            for key, value in contents.items():
                _refill(module.__dict__[key], value)
    if found:
        raise Untraceable(
            f"calling it changes the attribute `{found}`", "keep state in buffers that are updated in place"
        )


def _contents(module: nn.Module) -> dict[str, Any]:
    return {key: value.copy() for key, value in module.__dict__.items() if type(value) in (list, dict, set)}


def _changed(module: nn.Module, state: dict[str, Any], contents: dict[str, Any]) -> str | None:
    """The first attribute that is not as it was."""
    now = module.__dict__
    if not _same_items(now, state):
        missing = object()
        changed = (key for key in {**state, **now} if state.get(key, missing) is not now.get(key, missing))
        return next(changed, next(iter(state), ""))  # or only their order
    for key, value in contents.items():
        container = state[key]
        if (container or value) and not _same_container(container, value):
            return key
    return None


def _same_items(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    if len(now) != len(before) or not all(map(is_, now.values(), before.values())):
        return False
    return all(map(is_, now, before)) or all(map(_same_key, now, before))


def _same_key(key: Any, other: Any) -> bool:
    return key is other or hash(key) == hash(other)


def _same_container(now: Any, before: Any) -> bool:
    """Whether both hold the same objects in the same order."""
    if isinstance(now, dict):
        return _same_items(now, before)
    return len(now) == len(before) and all(map(is_, now, before))


def _refill(container: Any, held: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(held)
    else:
        container.update(held)


def _refusal(reason: str, mend: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Untraceable(reason, mend, within=running_modules(sys._getframe(1)))

    return refuse


def running_modules(frame: FrameType | None) -> list[nn.Module]:
    """The modules whose forward is running at `frame`, the innermost last."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return _modules_in(reversed(frames))


def raising_modules(error: BaseException | None) -> list[nn.Module]:
    """The modules whose forward was running when `error` was raised, the innermost last."""
    return [] if error is None else _modules_in(frame for frame, _ in traceback.walk_tb(error.__traceback__))


def _modules_in(frames: Iterable[FrameType]) -> list[nn.Module]:
    held = (frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "forward")
    return [value for value in held if isinstance(value, nn.Module)]


@contextmanager
def noticing_modes(read: set[str], noted: Callable[[nn.Module], None] = lambda module: None) -> Iterator[None]:
    """While tracing, note "training" when a module's flag is read, and "gradients" for ``torch.is_grad_enabled``.

    Args:
        read: what was read.
        noted: called with each module whose flag is read.
    """
    with modes_watched():
        _watchers.append((read, noted))
        try:
            yield
        finally:
            _watchers.pop()


_watchers: list[tuple[set[str], Callable[[nn.Module], None]]] = []


@contextmanager
def modes_watched() -> Iterator[None]:
    """What `noticing_modes` needs, put in place once for all of them inside."""
    if isinstance(nn.Module.__dict__.get("training"), _WatchedFlag):
        yield
        return
    is_grad_enabled = torch.is_grad_enabled

    def enabled() -> bool:
        for read, _ in _watchers[-1:]:
            read.add("gradients")
        return is_grad_enabled()

    with PATCH_LOCK:
        nn.Module.training = _WatchedFlag(_get_training, _set_training)  # type: ignore[assignment]  # taken off below
        torch.is_grad_enabled = enabled
        try:
            yield
        finally:
            del nn.Module.training
            torch.is_grad_enabled = is_grad_enabled


class _WatchedFlag(property):
    pass


def _get_training(module: nn.Module) -> bool:
    for read, noted in _watchers[-1:]:
        read.add("training")
        noted(module)
    known = module.__dict__
    return bool(known["training"] if "training" in known else module.__getattr__("training"))  # scripted modules


def _set_training(module: nn.Module, flag: bool) -> None:
    module.__dict__["training"] = flag


@contextmanager
def patching(owner: type, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute of a class for a while."""
    with PATCH_LOCK:
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
    with PATCH_LOCK, ExitStack() as stack:
        for owner, name, replacement in patches:
            if owner in kept:
                continue
            stack.callback(setattr, owner, name, owner.__dict__[name])
            setattr(owner, name, replacement)
        yield
