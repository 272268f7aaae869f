"""The state in which the Fisher is collected, given back afterwards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.kept_state import kept_attributes
from fxsparse.errors import ConfigError
from fxsparse.graph.scopes import mode_of, preserved_rng
from fxsparse.graph.tree import modules_of
from fxsparse.nn.recurrence import differentiable_recurrence

POLICIES = ("freeze", "raise")


@contextlib.contextmanager
def collecting_scope(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on, no autocast, no compiled code; all is as it was afterwards, come what may.

    Restored are the training flag of each module, buffers and all other attributes (see `kept_attributes`), random
    generators and switches. Parameters, their flags and their gradients are not touched at all.
    """
    modules = [module for _, module in modules_of(model)]
    places = {each.device.type for module in modules for each in module._parameters.values() if each is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(mode_of(model, False, modules))
        stack.enter_context(differentiable_recurrence(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device in sorted(places | {"cpu"}):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(kept_attributes(model, modules))
        yield


def check_batch_norms(model: nn.Module, policy: str) -> None:
    """Apply the policy about BatchNorm.

    Raises:
        CoupledSamples: a norm takes its statistics from the batch even in evaluation mode; or one is in training mode
            and the policy is "raise" instead of "freeze".
        ConfigError: an unknown policy.
    """
    if policy not in POLICIES:
        raise ConfigError(f"`bn` (={policy!r}) must be one of {', '.join(map(repr, POLICIES))}")
    for path, module in modules_of(model):
        if not isinstance(module, _BatchNorm):
            continue
        kind = type(module).__name__
        if module.running_mean is None:
            raise CoupledSamples(
                f"`{path}` ({kind}, track_running_stats=False) takes its statistics from the batch, so that no sample "
                "has a gradient of its own; give it running statistics, or use GroupNorm"
            )
        if policy == "raise" and module.training:
            raise CoupledSamples(
                f"`{path}` ({kind}) is in training mode, where it couples samples; call eval() or take `bn` (='freeze')"
            )
