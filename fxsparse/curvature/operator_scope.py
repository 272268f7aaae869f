"""The state in which curvature is computed, given back afterwards."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from fxsparse.curvature.kept_state import kept_attributes
from fxsparse.curvature.losses import CoupledSamples
from fxsparse.graph.scopes import mode_of, preserved_rng, seeded
from fxsparse.graph.tree import modules_of
from fxsparse.nn.recurrence import differentiable_recurrence

T = TypeVar("T")


@contextlib.contextmanager
def curvature_scope(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, math attention, no autocast, no compiled code; all of it is as before afterwards, always.

    Fused attention kernels have no forward-mode derivative, and the fast path of MultiheadAttention has none at all.
    """
    _load_forward_rules()
    fast = torch.backends.mha.get_fastpath_enabled()
    modules = [module for _, module in modules_of(model)]
    devices = {each.device.type for module in modules for each in module._parameters.values() if each is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_attributes(model, modules))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="There is a performance drop")  # what has no batching rule is looped
        stack.enter_context(preserved_rng())
        stack.enter_context(mode_of(model, False, modules))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(differentiable_recurrence(model))
        stack.enter_context(torch.inference_mode(False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device in sorted(devices | {"cpu"}):
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
