"""Whether a compacted model computes the same: outputs of the same inputs, run in float64 where the model can."""

from __future__ import annotations

import gc
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import PassError
from fxsparse.graph import fresh_inputs, isolated_clone
from fxsparse.graph.inputs import tensors_of
from fxsparse.graph.scopes import mode_of, seeded
from fxsparse.graph.writes import storage_of
from fxsparse.passes.compact_widen import streamable, widened

_SEED = 20251
_LARGE = 1 << 22  # parameters whose copies are worth a collection of garbage


def owned_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy that shares no tensor with the model, its floating tensors in `dtype`."""
    kept = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if dtype is None or not parameter.is_floating_point() or parameter.dtype == dtype
    ]
    clone = isolated_clone(model, copied=kept)  # the others are copied when they are cast
    if dtype is not None:
        clone = clone._apply(partial(_cast, dtype=dtype))  # type: ignore[no-untyped-call]  # torch leaves it so
    return clone


def run_copy(model: nn.Module, dtype: torch.dtype, whole: Collection[str] = ()) -> nn.Module:
    """A copy to be shortened and run by `outputs` in `dtype`: like `owned_copy`, but large parameters stay narrow.

    They share the model's memory, and `outputs` casts each when an operator reads it.

    Args:
        model: the model; it stays as it is.
        dtype: the wider dtype.
        whole: names of parameters into which something is written: these are copies in `dtype`.
    """
    shared = {name for name, tensor in model.named_parameters() if streamable(tensor, dtype)} - {*whole}
    own = [name for name, tensor in model.named_parameters() if name not in shared and tensor.dtype == dtype]
    clone = isolated_clone(model, copied=own)
    narrow = {id(tensor) for name, tensor in clone.named_parameters() if name in shared}
    cast = partial(_cast, dtype=dtype)
    clone._apply(lambda tensor: tensor if id(tensor) in narrow else cast(tensor))  # type: ignore[no-untyped-call]  # torch leaves it so
    return clone


def own_tensors(copy: nn.Module, model: nn.Module) -> None:
    """Let `copy` share no parameter's memory with `model` any more."""
    shared = {storage_of(parameter) for parameter in model.parameters()}
    for parameter in copy.parameters():
        if storage_of(parameter) in shared:
            parameter.data = parameter.detach().clone()


def release(model: nn.Module) -> None:
    """Let the tensors of a copy go that is used no more: a graph holds itself, and they would wait."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module._parameters.clear()
            module._buffers.clear()


def sweep(model: nn.Module) -> None:
    """Collect garbage where copies of the model may be in it and are large: graphs hold themselves."""
    if sum(parameter.numel() for parameter in model.parameters()) >= _LARGE:
        gc.collect()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def outputs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool,
    dtype: torch.dtype | None,
    writes: bool = False,
) -> list[Tensor]:
    """The output tensors of one run on a copy, from a fixed seed; the model's buffers stay as they are.

    Parameters are shared with the copy, unless the run `writes` into them.
    """
    with seeded(_SEED), torch.no_grad():
        clone = owned_copy(model) if writes else isolated_clone(model, to_run=True)
        args, kwargs = fresh_inputs(args, kwargs)
        if dtype is not None:
            cast = partial(_cast, dtype=dtype)
            args, kwargs = pytree.tree_map(lambda v: cast(v) if isinstance(v, Tensor) else v, (args, kwargs))
        try:
            with mode_of(clone, training), widened(clone, dtype):
                return [tensor.detach() for tensor in tensors_of(clone(*args, **kwargs))]
        finally:
            release(clone)


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest absolute difference, relative to the largest absolute value of that output.

    Raises:
        PassError: another number of outputs, another shape or dtype, or not the same NaN.
    """
    if len(expected) != len(found):
        raise PassError(f"{len(found)} outputs instead of {len(expected)}")
    worst = 0.0
    for index, (old, new) in enumerate(zip(expected, found, strict=True)):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise PassError(f"output {index} is {tuple(new.shape)} instead of {tuple(old.shape)}")
        if not (old.is_floating_point() or old.is_complex()):
            if not torch.equal(old, new):
                raise PassError(f"output {index} differs in {int((old != new).sum())} of {old.numel()} entries")
            continue
        same = (old == new) | (old.isnan() & new.isnan())
        if bool(same.all()):
            continue
        gap = torch.where(same, 0.0, (old - new).abs().double())
        if not bool(gap.isfinite().all()):
            raise PassError(f"output {index} has NaN or infinity where the other has none")
        finite = old[old.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        if scale == 0.0:
            raise PassError(f"output {index} is zero in the model and differs by {float(gap.max()):.3g}")
        worst = max(worst, float(gap.max()) / scale)
    return worst
