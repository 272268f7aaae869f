"""A slow reference: one sample at a time, dense, by torch.func in float64; nothing of fxsparse is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp

Loss = Callable[[Tensor, Any], Tensor]


def jacobian(model: nn.Module, inputs: tuple[Any, ...], n: int) -> tuple[dict[str, Tensor], Tensor]:
    """dz/dtheta of sample n alone, [C, *shape] by name with z flattened, and z."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    one = tuple(x[n : n + 1] for x in inputs)
    z, pull = vjp(lambda own: functional_call(model, own, one), params)
    rows = []
    for c in range(z.numel()):
        unit = torch.zeros(z.numel(), dtype=z.dtype)
        unit[c] = 1.0
        rows.append(pull(unit.view_as(z))[0])
    return {name: torch.stack([row[name] for row in rows]) for name in params}, z


def fisher(model: nn.Module, inputs: tuple[Any, ...], y: Tensor, loss: Loss, kind: str) -> dict[str, Tensor]:
    """The diagonal by parameter, mean over samples.

    Args:
        model: in evaluation mode.
        inputs: each with the samples along axis 0.
        y: targets.
        loss: of (z [1, ...], y [1, ...]), a scalar.
        kind: "empirical": squares of J^T dl/dz; "true": J^T H J with H by two derivatives.
    """
    total: dict[str, Tensor] = {}
    for n in range(len(y)):
        j, z = jacobian(model, inputs, n)
        target = y[n : n + 1]
        if kind == "empirical":
            slope = grad(lambda out, target=target: loss(out, target))(z).flatten()
            values = {name: torch.tensordot(slope, rows, 1).square() for name, rows in j.items()}
        else:
            h = jacrev(grad(lambda out, target=target: loss(out, target)))(z).reshape(z.numel(), z.numel())
            values = {name: (rows * torch.tensordot(h, rows, 1)).sum(0) for name, rows in j.items()}
        for name, value in values.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value
    return {name: value / len(y) for name, value in total.items()}
