"""One set-up for many symbolic traces.

Each `torch.fx` trace patches `nn.Module` and wraps the functions of `math` and those registered by `fx.wrap`. Changing
`nn.Module` walks all of its subclasses, which are thousands where model libraries are loaded; within `tracing` it
happens once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import _symbolic_trace as fx_trace

from fxsparse.graph.guards import PATCH_LOCK, modes_watched

_METHODS = ("__getattr__", "__call__")


class _SharedPatcher(fx_trace._Patcher):
    """A patcher that outlives the traces: the methods of nn.Module lead to those of the trace that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = {name: getattr(nn.Module, name) for name in _METHODS}
        self.current = dict(self.plain)

    def __enter__(self) -> _SharedPatcher:
        for name in _METHODS:
            super().patch_method(nn.Module, name, self._leading(name), deduplicate=False)
        return self

    def _leading(self, name: str) -> Callable[..., Any]:
        current = self.current
        if name == "__getattr__":
            return lambda module, attribute: current["__getattr__"](module, attribute)
        return lambda module, *args, **kwargs: current["__call__"](module, *args, **kwargs)

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        """A method of nn.Module holds until the trace ends, others until the session does."""
        if cls is nn.Module and name in self.current:
            self.current[name] = new_fn
        else:
            super().patch_method(cls, name, new_fn, deduplicate)

    def finish(self) -> None:
        """The trace has ended."""
        self.current.update(self.plain)


@contextmanager
def tracing() -> Iterator[None]:
    """Share the set-up of all traces made inside, one after the other; a session inside a session is the outer one."""
    if getattr(fx_trace._new_patcher, "shared", False):
        yield
        return
    with PATCH_LOCK, _SharedPatcher() as patcher, modes_watched():
        new_patcher, patch_wrapped = fx_trace._new_patcher, fx_trace._patch_wrapped_functions
        fx_trace._new_patcher = _sharing(patcher, new_patcher)
        fx_trace._patch_wrapped_functions = _once(patch_wrapped)  # type: ignore[assignment]  # the same but in name
        try:
            yield
        finally:
            fx_trace._new_patcher, fx_trace._patch_wrapped_functions = new_patcher, patch_wrapped


def _sharing(patcher: _SharedPatcher, new_patcher: Callable[[], Any]) -> Callable[[], Any]:
    @contextmanager
    def shared() -> Iterator[Any]:
        if fx_trace.CURRENT_PATCHER is not None:  # a trace inside a trace
            with new_patcher() as inner:
                yield inner
            return
        fx_trace.CURRENT_PATCHER = patcher
        try:
            yield patcher
        finally:
            fx_trace.CURRENT_PATCHER = None
            patcher.finish()

    shared.shared = True  # type: ignore[attr-defined]  # read above
    return shared


def _once(patch_wrapped: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap the registered functions, again only where more have been registered since."""
    done: dict[str, int] = {}

    def patch(patcher: Any) -> None:
        registered = len(fx_trace._wrapped_fns_to_patch) + len(fx_trace._wrapped_methods_to_patch)
        if not isinstance(patcher, _SharedPatcher) or done.get("registered") != registered:
            patch_wrapped(patcher)
        if isinstance(patcher, _SharedPatcher):
            done["registered"] = registered

    return patch
