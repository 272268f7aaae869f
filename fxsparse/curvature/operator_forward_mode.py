"""One direction by forward mode inside an ordinary autograd graph: the model runs once for z, J v and J^T u."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxsparse.curvature.operator_data import Batch
from fxsparse.curvature.operator_forward import ModelFunction, Tensors, pulled
from fxsparse.curvature.operator_rules import CheapRules

Bend = Callable[[Tensor, Tensor], Tensor]
"""(outputs z [N, ...], tangent J v like z) -> H J v like z."""

make_dual: Any = forward_ad.make_dual  # untyped in torch
unpack_dual: Any = forward_ad.unpack_dual


def push(function: ModelFunction, batch: Batch, v: Tensors) -> tuple[Tensor, Tensor]:
    """The outputs z, and J v."""
    with torch.no_grad():
        return _dual_outputs(function, batch, v, function.point)


def product(function: ModelFunction, batch: Batch, v: Tensors, bend: Bend) -> Tensors:
    """J^T bend(z, J v).

    The reverse pass waits until the tangents are gone: beside them, it would be differentiated, too.
    """
    leaves = function.leaves()
    with torch.enable_grad():
        z, along = _dual_outputs(function, batch, v, leaves)
    with torch.no_grad():
        u = bend(z.detach(), along.detach())
    del along  # and with it what was kept for differentiating it
    return pulled([z], leaves, [u])


def _dual_outputs(function: ModelFunction, batch: Batch, v: Tensors, point: Tensors) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level(), CheapRules():
        z = function.forward(_duals(point, v), batch.inputs)
        primal = unpack_dual(z).primal
        return primal, _tangent(z)


def _duals(point: Tensors, v: Tensors) -> Tensors:
    return {name: make_dual(each, v[name].clone()) for name, each in point.items()}  # views would be copied


def _tangent(value: Tensor) -> Tensor:
    found: Tensor | None = unpack_dual(value).tangent
    return torch.zeros_like(value) if found is None else found
