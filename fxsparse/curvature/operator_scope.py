"""The state in which curvature is computed, given back afterwards."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from fxsparse.curvature.losses import CoupledSamples
from fxsparse.graph.scopes import mode_of, preserved_rng, seeded

T = TypeVar("T")


@contextlib.contextmanager
def curvature_scope(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, math attention, no autocast, no compiled code; all of it is as before afterwards, always.

    Fused attention kernels have no forward-mode derivative, and the fast path of MultiheadAttention has none at all.
    """
    _load_forward_rules()
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {parameter.device.type for parameter in model.parameters()} | {"cpu"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_attributes(model))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="There is a performance drop")  # what has no batching rule is looped
        stack.enter_context(preserved_rng())
        stack.enter_context(mode_of(model, False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.inference_mode(False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device in sorted(devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def apart(items: Iterable[T]) -> Iterator[T]:
    """The items, made outside of any scope; what making them draws is not taken from the caller's generators."""
    held = iter(items)
    for number in itertools.count():
        with seeded((torch.initial_seed() + number) % 2**32):
            item = next(held, _END)
        if isinstance(item, _End):
            return
        yield item


class _End:
    pass


_END = _End()


@contextlib.contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Give back every attribute of every module, and the contents of its lists, dicts and sets.

    Models store activations on themselves; those of a transformed run must not outlive it.
    """
    before = [(module.__dict__, _contents(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for own, contents in before:
            _restore(own, contents)


_Contents = list[tuple[str, Any, Any]]


def _contents(own: dict[str, Any]) -> _Contents:
    return [(n, v, v.copy() if type(v) in (list, dict, set, OrderedDict) else None) for n, v in own.items()]


def _restore(own: dict[str, Any], contents: _Contents) -> None:
    if len(own) != len(contents) or any(own.get(name) is not value for name, value, _ in contents):
        own.clear()
        own.update({name: value for name, value, _ in contents})
    for _, value, held in contents:
        if isinstance(value, list):
            if len(value) != len(held) or any(a is not b for a, b in zip(value, held, strict=True)):
                value[:] = held
        elif held is not None and (len(value) != len(held) or not _same(value, held)):
            value.clear()
            value.update(held)


def _same(value: Any, held: Any) -> bool:
    if isinstance(value, dict):
        return list(value) == list(held) and all(map(operator.is_, value.values(), held.values()))
    return bool(value == held)


@functools.cache
def _load_forward_rules() -> None:
    """Let torch load its forward-mode rules, which it compiles by a deprecated function, with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def check_uncoupled(model: nn.Module) -> None:
    """Raise CoupledSamples where a norm mixes the samples of a batch even in evaluation mode."""
    for path, module in model.named_modules():
        batch_norm = isinstance(module, _NormBase) and "Instance" not in type(module).__name__
        if batch_norm and module.running_mean is None:
            raise CoupledSamples(
                f"`{path}` ({type(module).__name__}, track_running_stats=False) takes its statistics from the batch, "
                "so that no sample has a gradient of its own; give it running statistics, or use GroupNorm"
            )
