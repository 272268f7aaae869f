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
        ConfigError: not a module; a model that is compiled or spread over devices, or has a part that is; a model with
            masks or with inference tensors.
        CaptureError: a scripted model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "`model` is scripted, its code cannot be rewritten; give the module from before torch.jit.script"
        )
    _check_wrappers(model)
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and parameter.is_inference():
            raise ConfigError(f"`{name}` was made under torch.inference_mode, which cannot be trained; make it outside")
    present = [name for name in masked_weights(model)]
    if present:
        raise ConfigError(
            f"`model` has {len(present)} masks already (`{present[0]}`...); change them with set_masks, or take them "
            "off with finalize"
        )


def _check_wrappers(model: nn.Module) -> None:
    """Raise ConfigError where the model, or a part of it, is compiled or distributed: its code or hooks are fixed."""
    for path, module in model.named_modules():
        kind, here = type(module).__name__, f"`{path}`" if path else "`model`"
        bases = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")}
        if "OptimizedModule" in bases | {kind}:
            inner = "model._orig_mod" if not path else f"model.{path}._orig_mod"
            raise ConfigError(f"{here} (={kind}) is compiled; give `{inner}` and compile the result")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ConfigError(f"{here} (={kind}) is compiled in place; transform before `.compile()`")
        wrappers = bases & {"DistributedDataParallel", "FullyShardedDataParallel"}
        if wrappers or (not path and "DataParallel" in bases):
            inner = "model.module" if not path else f"model.{path}.module"
            raise ConfigError(f"{here} (={kind}) is a wrapper; give `{inner}` and wrap the result")
        if "FSDPModule" in bases:
            raise ConfigError(f"{here} (={kind}) is sharded; transform before `fully_shard`")


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
        if bool(torch.isfinite(values.sum())):  # one cheap read; a sum that overflows needs the exact look
            continue
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise DataError(f"`{weight.name}` holds {bad} NaN or infinite values; repair or exclude it")


def quantised_parts(model: nn.Module) -> tuple[Refusal, ...]:
    """Quantised modules: they hold packed weights, which no mask reaches."""
    return tuple(
        Refusal(path, f"{type(module).__name__} holds packed quantised weights", "prune first, quantise afterwards")
        for path, module in model.named_modules()
        if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch.ao.")
    )
