"""Diagonals from per-sample rows: sum over samples n and columns k of (J_n^T a_nk)^2, squares first, sums second."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fxsparse.curvature.diagonal_layers import LayerSquares
from fxsparse.curvature.operator_data import Batch
from fxsparse.curvature.operator_engine import Engine
from fxsparse.curvature.operator_forward import Tensors
from fxsparse.curvature.operator_output import OutputCurvature
from fxsparse.curvature.taps_formulas import wide

ROW_BUDGET = 1 << 24
"""Elements of per-sample rows that are held at once."""


def squared_rows(
    engine: Engine,
    curvature: OutputCurvature,
    batch: Batch,
    chunk: int | None = None,
    layers: LayerSquares | None = None,
) -> tuple[Tensors, int]:
    """The exact sum over the batch, by parameter, and its number of units."""
    z = _outputs(engine, batch, layers)
    columns = curvature.columns(z, batch)
    return _squares(engine, batch, columns, chunk, z, layers), curvature.units(z, batch)


def sampled_diagonal(
    engine: Engine,
    curvature: OutputCurvature,
    batch: Batch,
    method: str,
    samples: int,
    source: torch.Generator,
    chunk: int | None = None,
    layers: LayerSquares | None = None,
) -> tuple[Tensors, int]:
    """An unbiased estimate of the sum over the batch: "mc" labels, or a "sketch" of random signs."""
    z = _outputs(engine, batch, layers)

    def draws() -> Iterator[Tensor]:
        for _ in range(samples):
            if method == "mc":
                local = source if z.device.type == "cpu" else _moved(source, z.device)
                yield curvature.sample(z, batch, local)
            else:
                signs = torch.randint(2, z.shape, generator=source).mul_(2).sub_(1).to(z)
                yield curvature.sketch(z, batch, signs)

    found = _squares(engine, batch, draws(), chunk, z, layers)
    return {name: each / samples for name, each in found.items()}, curvature.units(z, batch)


def gram_of_rows(
    engine: Engine, curvature: OutputCurvature, batches: Iterable[Batch], names: Sequence[str], keep: Tensor
) -> tuple[Float[Tensor, "b b"], int]:
    """R^T R in float64, R the rows of all samples and columns, flat over some parameters, where `keep` [b] is True."""
    gram = torch.zeros(len(keep), len(keep), dtype=torch.float64, device=keep.device)
    units = 0
    for batch in batches:
        units += curvature.units(engine.outputs(batch), batch)
        for rows in _stacked_rows(engine, curvature, batch, names):
            kept = torch.where(keep, rows, 0.0).double()
            gram.addmm_(kept.mT, kept)
    return gram, units


def _stacked_rows(
    engine: Engine, curvature: OutputCurvature, batch: Batch, names: Sequence[str]
) -> Iterator[Float[Tensor, "rows b"]]:
    """The rows J_n^T a_nk of all samples and columns, flat over some parameters, some at a time."""
    width = sum(engine.space.shapes[name].numel() for name in names)
    z = engine.outputs(batch)
    columns = curvature.columns(z, batch)
    size = max(1, min(batch.samples, ROW_BUDGET // max(width, 1)))
    many = max(1, ROW_BUDGET // max(width * size, 1))
    while held := list(itertools.islice(columns, many)):
        for first in range(0, batch.samples, size):
            last = min(first + size, batch.samples)
            u = torch.stack([each[first:last] for each in held])
            rows = engine.rows(batch.cut(first, last), u, names)
            sizes = [engine.space.shapes[name].numel() for name in names]
            yield torch.cat([rows[n].reshape(u.shape[0] * u.shape[1], s) for n, s in zip(names, sizes, strict=True)], 1)


def _outputs(engine: Engine, batch: Batch, layers: LayerSquares | None) -> Tensor:
    z = None if layers is None else layers.forward(batch)
    return engine.outputs(batch) if z is None else z


def _squares(
    engine: Engine,
    batch: Batch,
    columns: Iterable[Tensor],
    chunk: int | None,
    z: Tensor,
    layers: LayerSquares | None,
) -> Tensors:
    """Layers whose rows factorise by their inputs and output gradients, the rest by rows."""
    held = list(columns)
    dtype = torch.promote_types(z.dtype, torch.float32)
    sums = {name: torch.zeros(shape, dtype=dtype, device=z.device) for name, shape in engine.space.shapes.items()}
    if not held:
        return sums
    covered = frozenset() if layers is None else layers.add(held, sums)
    rest = [name for name in engine.space.names if name not in covered]
    if not rest:
        return sums
    width = sum(engine.space.shapes[name].numel() for name in rest)
    size = chunk or max(1, min(batch.samples, ROW_BUDGET // max(width, 1)))
    for first in range(0, batch.samples, size):
        last = min(first + size, batch.samples)
        piece = batch.cut(first, last)
        many = max(1, ROW_BUDGET // max(width * (last - first), 1))
        for start in range(0, len(held), many):
            u = torch.stack([each[first:last] for each in held[start : start + many]])
            for name, rows in engine.rows(piece, u, rest).items():
                sums[name] += wide(rows).square().flatten(0, 1).sum(0)  # rows may share memory
    return sums


def _moved(source: torch.Generator, device: torch.device) -> torch.Generator:
    seed = int(torch.randint(2**62, (), generator=source))
    return torch.Generator(device).manual_seed(seed)
