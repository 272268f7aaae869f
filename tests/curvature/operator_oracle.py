"""Slow dense references in float64: the whole matrix from rows of one sample at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.fisher_oracle import jacobian

with warnings.catch_warnings():  # torch compiles its forward rules by a deprecated function, at their first use
    warnings.simplefilter("ignore")
    torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))

Loss = Callable[[Tensor, Any], Tensor]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def rows(model: nn.Module, inputs: tuple[Any, ...], n: int) -> tuple[Tensor, Tensor]:
    """J of sample n [outputs, P] and its z [1, ...]."""
    found, z = jacobian(model, inputs, n)
    return torch.cat([found[name].reshape(z.numel(), p.numel()) for name, p in model.named_parameters()], 1), z


def output_matrix(loss: Loss, z: Tensor, y: Any, kind: str) -> Tensor:
    """The matrix at the outputs of one sample, by autograd or, for the true Fisher, by the sum over all labels."""
    size = z.numel()
    if kind == "fisher":
        p = z.flatten().softmax(0)
        slopes = [torch.func.grad(lambda out, c=c: loss(out, torch.tensor([c])))(z).flatten() for c in range(size)]
        return sum(p[c] * torch.outer(slopes[c], slopes[c]) for c in range(size))
    if kind == "empirical":
        slope = torch.func.grad(lambda out: loss(out, y))(z).flatten()
        return torch.outer(slope, slope)
    return torch.func.hessian(lambda out: loss(out, y))(z).reshape(size, size)


def dense(model: nn.Module, inputs: tuple[Any, ...], y: Tensor, loss: Loss, kind: str = "ggn") -> Tensor:
    """(1/N) sum J^T B J, P x P."""
    size = sum(p.numel() for p in model.parameters())
    total = torch.zeros(size, size, dtype=torch.float64)
    for n in range(len(y)):
        j, z = rows(model, inputs, n)
        total += j.T @ output_matrix(loss, z, y[n : n + 1], kind) @ j
    return total / len(y)


def hessian_product(model: nn.Module, inputs: tuple[Any, ...], y: Tensor, loss: Loss, v: Tensor) -> Tensor:
    """The Hessian of the mean of the samples' losses times v, by two reverse passes for each sample."""
    parameters = list(model.parameters())
    parts = v.split([p.numel() for p in parameters])
    total = torch.zeros_like(v)
    for n in range(len(y)):
        value = loss(model(*(x[n : n + 1] for x in inputs)), y[n : n + 1])
        slope = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        along = sum((g * part.view_as(g)).sum() for g, part in zip(slope, parts, strict=True))
        found = torch.autograd.grad(along, parameters, allow_unused=True, materialize_grads=True)
        total += torch.cat([each.flatten() for each in found])
    return total / len(y)


def golden_mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """2-tanh(3)-3 with parameters a cos(b k + c), four inputs and labels."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    values = ((0.9, 1, 0), (0.3, 1, 1), (0.8, 1, 2), (0.2, 1, 3))
    with torch.no_grad():
        for parameter, (a, b, c) in zip(model.parameters(), values, strict=True):
            k = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((a * torch.cos(b * k + c)).view_as(parameter))
    n = torch.arange(4, dtype=torch.float64)
    return model, torch.stack([torch.sin(n + 1), torch.cos(2 * n)], 1), torch.tensor([0, 1, 2, 0])
