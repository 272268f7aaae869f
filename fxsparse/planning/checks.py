"""What can be transformed, and what cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxsparse.errors import CaptureError, ConfigError, DataError
from fxsparse.graph import Refusal
from fxsparse.nn import masked_weights
from fxsparse.planning.routing import Weight
from fxsparse.sparsity import Distribution, Pattern


def check_options(pattern: object, distribution: object, fisher: object) -> None:
    """Raise ConfigError for options of the wrong kind."""
    if not isinstance(pattern, Pattern):
        raise ConfigError(f"`pattern` (={pattern!r}) must be a Pattern such as Unstructured() or NByM(2, 4)")
    if not isinstance(distribution, Distribution):
        raise ConfigError(f"`distribution` (={distribution!r}) must be a Distribution such as Uniform() or ERK()")
    if fisher is not None:
        raise ConfigError(f"`fisher` (={type(fisher).__name__}) is not available in this version; leave it None")


def check_model(model: object) -> None:
    """Raise unless the model is one that can be transformed.

    Raises:
        ConfigError: not a module, a wrapper, a model with masks or with inference tensors.
        CaptureError: a scripted model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "`model` is scripted, its code cannot be rewritten; give the module from before torch.jit.script"
        )
    kind = type(model).__name__
    if kind == "OptimizedModule":
        raise ConfigError(f"`model` (={kind}) is compiled; give `model._orig_mod` and compile the result")
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    if any(base.__name__ in wrappers and base.__module__.startswith("torch.") for base in type(model).__mro__):
        raise ConfigError(f"`model` (={kind}) is a wrapper; give `model.module` and wrap the result")
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and parameter.is_inference():
            raise ConfigError(f"`{name}` was made under torch.inference_mode, which cannot be trained; make it outside")
    present = [name for name in masked_weights(model)]
    if present:
        raise ConfigError(
            f"`model` has {len(present)} masks already (`{present[0]}`...); change them with set_masks, or take them "
            "off with finalize"
        )


def check_values(weights: Sequence[Weight], sparsity: float) -> None:
    """Raise DataError unless all values are finite, ConfigError where magnitudes are needed and there are none."""
    for weight in weights:
        values = weight.parameter.detach()
        if values.is_meta:
            if sparsity > 0:
                raise ConfigError(
                    f"`{weight.name}` is on the meta device and has no magnitudes; use `sparsity` 0 there"
                )
            continue
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise DataError(f"`{weight.name}` holds {bad} NaN or infinite values; repair or exclude it")


def quantised_parts(model: nn.Module) -> tuple[Refusal, ...]:
    """Quantised modules: they hold packed weights, which no mask reaches."""
    return tuple(
        Refusal(path, f"{type(module).__name__} holds packed quantised weights", "prune first, quantise afterwards")
        for path, module in model.named_modules()
        if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch.ao.")
    )
