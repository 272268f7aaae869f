"""Whether two models behave the same on given inputs: outputs and gradients, in train and in eval mode."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxsparse.graph.clone import isolated_clone
from fxsparse.graph.inputs import fresh_inputs, tensors_of
from fxsparse.graph.scopes import seeded

_SEED = 20240229
_TOLERATED_EPS = 64  # reductions may be ordered differently where kernels are not deterministic


@dataclass(frozen=True)
class Run:
    """One run: its outputs, the gradients and the buffers afterwards, by name; `error` when the model raised."""

    structure: str
    values: dict[str, torch.Tensor]
    error: str = ""


@dataclass(frozen=True)
class Runs:
    """The reference runs of a model, by mode (True = train), and what is needed to repeat them with another one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    written: Collection[str]
    runs: dict[bool, Run]


def reference_runs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], written: Collection[str] = ()
) -> Runs:
    """Run `model` in its own mode, and in the other one as well; `written` names parameters that it writes into."""
    modes = (model.training, not model.training)
    return Runs(args, kwargs, written, {mode: run(model, args, kwargs, mode, written) for mode in modes})


def run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, written: Collection[str] = ()
) -> Run:
    """Run a copy of `model` forward and backward, with fixed seeds; nothing of `model` is touched.

    The gradients are those of a fixed random combination of all floating-point outputs, with respect to every
    parameter and every input that requires gradients.
    """
    clone = isolated_clone(model, written)
    args, kwargs = fresh_inputs(args, kwargs)
    _same_modes(clone, training)
    try:
        with seeded(_SEED), torch.enable_grad(), contextlib.redirect_stderr(io.StringIO()):
            output = clone(*args, **kwargs)
            gradients = _gradients(clone, (args, kwargs), output)
    except Exception as error:  # the model's own failure is part of its behaviour
        return Run("", {}, f"{type(error).__name__}: {error}")
    leaves, spec = pytree.tree_flatten(output)
    outputs = {f"output {i}": leaf.detach() for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    buffers = {f"buffer `{name}`": buffer for name, buffer in clone.named_buffers()}
    shown = [type(leaf).__name__ if not isinstance(leaf, int | float | str | bool) else repr(leaf) for leaf in leaves]
    return Run(f"{spec} {shown}", {**outputs, **gradients, **buffers})


def _same_modes(clone: nn.Module, training: bool) -> None:
    if clone.training != training:
        clone.train(training)


def _gradients(model: nn.Module, inputs: Any, output: Any) -> dict[str, torch.Tensor]:
    outputs = [t for t in tensors_of(output) if t.is_floating_point() and t.requires_grad]
    wanted: dict[str, torch.Tensor] = {}
    wanted |= {f"gradient of `{name}`": p for name, p in model.named_parameters() if p.requires_grad}
    wanted |= {f"gradient of input {i}": t for i, t in enumerate(tensors_of(inputs)) if t.requires_grad}
    if not outputs or not wanted:
        return {}
    generator = torch.Generator().manual_seed(_SEED)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def differences(reference: Runs, model: nn.Module) -> str | None:
    """The first difference between `model` and the reference, in words, or None.

    A mode in which the reference itself raises is not compared.
    """
    for training, expected in reference.runs.items():
        if expected.error:
            continue
        found = run(model, reference.args, reference.kwargs, training, reference.written)
        difference = _difference(expected, found)
        if difference is not None:
            return f"{difference} in {'train' if training else 'eval'} mode"
    return None


def _difference(expected: Run, found: Run) -> str | None:
    if found.error:
        return f"it raises {found.error.splitlines()[0][:160]}"
    if expected.structure != found.structure:
        return "the structure of the output differs"
    if expected.values.keys() != found.values.keys():
        return f"{sorted(expected.values.keys() ^ found.values.keys())[0]} exists only once"
    for name, value in expected.values.items():
        if not _equal(value, found.values[name]):
            return f"{name} differs"
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.is_meta or a.numel() == 0:
        return True
    a, b = a.to_dense(), b.to_dense()  # gradients of nn.Embedding(sparse=True)
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True):
        return True
    scale = float(torch.nan_to_num(a).abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=_TOLERATED_EPS * torch.finfo(a.dtype).eps * scale, equal_nan=True)
