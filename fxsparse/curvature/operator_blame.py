"""Where in a model a derivative failed: the module in whose call it was raised, or whose operator has none."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_BACKWARD = re.compile(r"_*([a-z][a-z0-9_]*?)(?:_dense|_double)*_backward")


def place_of(model: nn.Module, error: BaseException, run: Callable[[], object]) -> str:
    """The module's path and class, in words to put behind "differentiated", and the mend; empty where it is not known.

    Args:
        model: The model.
        error: What was raised.
        run: Runs the model forward; asked for an operator that the error's message names.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    raised = found = _innermost((frame for frame, _ in traceback.walk_tb(error.__traceback__)), paths)
    names = _BACKWARD.findall(str(error))
    if found is None and names:
        caller = _Caller(names[-1], paths)
        try:
            with torch.no_grad(), caller:
                run()
        except (RuntimeError, NotImplementedError, ValueError):
            return ""
        found = caller.found
    if found is None:
        return ""
    place = f" at `{paths[id(found)] or 'model'}` ({type(found).__name__})"
    mend = ", whose operator has no such derivative; leave the parameters there and in front of it out with `params`"
    return place + mend if raised is None else place


def caller_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The module whose code is running, by path; the model itself where there is none."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = _innermost(reversed(list(_frames())), paths) or model
    return paths[id(found)], found


class _Caller(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its __init_subclass__ so
    """Notes the module that calls an operator first."""

    def __init__(self, name: str, paths: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.name, self.paths = name, paths
        self.found: nn.Module | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is None and self.name in func.__name__:
            self.found = _innermost(reversed(list(_frames())), self.paths)
        return func(*args, **(kwargs or {}))


def _frames() -> Iterable[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _innermost(frames: Iterable[FrameType], paths: dict[int, str]) -> nn.Module | None:
    """The last module that runs among frames, the outermost first."""
    found = None
    for frame in frames:
        own = frame.f_locals.get("self")
        if isinstance(own, nn.Module) and id(own) in paths:
            found = own
    return found
