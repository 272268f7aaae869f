"""What products give: the product over a batch, columns of the matrix, and its diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fxsparse.curvature.operator_data import Batch
from fxsparse.curvature.operator_engine import Engine
from fxsparse.curvature.operator_forward import Tensors
from fxsparse.curvature.operator_output import Curvature, OutputCurvature
from fxsparse.curvature.operator_space import ParameterSpace

_MANY = 64  # products at once
Products = Callable[[Tensor], Tensor]
"""Columns V [P, k] -> G V."""


def batch_product(
    engine: Engine, curvature: OutputCurvature, batch: Batch, tangents: Tensors, divisor: int
) -> tuple[Shaped[Tensor, "P k"], int]:
    """The products over a batch, divided at the outputs, where there are few numbers; and its units."""
    counts: list[int] = []

    def bend(z: Tensor, along: Tensor) -> Tensor:
        counts[:] = [curvature.units(z, batch)]
        return curvature.bend(z, along, batch) / divisor

    def total(z: Tensor) -> Tensor:
        counts[:] = [curvature.units(z, batch)]
        return curvature.total(z, batch) / divisor

    if curvature.kind is Curvature.HESSIAN:
        found = engine.second(batch, tangents, total)
    else:
        found = engine.product(batch, tangents, bend)
    parts = [found[name] for name in engine.space.names]
    if all(len(part) == 1 for part in parts):  # of vectors, not of columns with steps between their entries
        return torch.cat([part.reshape(-1) for part in parts])[:, None], counts[0]
    shapes = engine.space.shapes.values()
    return torch.cat([each.reshape(len(each), s.numel()).mT for each, s in zip(parts, shapes, strict=True)]), counts[0]


def diagonal_of_products(
    products: Products, space: ParameterSpace, samples: int | None, source: torch.Generator
) -> Float[Tensor, " P"]:
    """The diagonal: column by column, or as the mean of r * G r over random signs r (Hutchinson)."""
    if samples is not None:
        signs = torch.randint(2, (space.size, samples), generator=source).mul_(2).sub_(1)
        signs = signs.to(dtype=space.dtype, device=space.device)
        return space.project((products(signs) * signs).mean(1))
    found = torch.zeros(space.size, dtype=space.dtype, device=space.device)
    active = torch.arange(space.size, device=space.device)
    active = active if space.support is None else active[space.support]
    for index in torch.split(active, _MANY):
        found[index] = products(_units_of(space, index)).gather(0, index[None])[0]
    return found


def block_of_products(products: Products, space: ParameterSpace, index: Tensor) -> Float[Tensor, "b b"]:
    """The rows and columns of some coordinates."""
    parts = [products(_units_of(space, part))[index] for part in torch.split(index, _MANY)]
    return torch.cat(parts, 1)


def _units_of(space: ParameterSpace, index: Tensor) -> Tensor:
    basis = torch.zeros(space.size, len(index), dtype=space.dtype, device=space.device)
    basis[index, torch.arange(len(index), device=space.device)] = 1.0
    return basis
