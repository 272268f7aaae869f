"""Gradients of the loss: summed over all batches, and of single samples."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fxsparse.curvature.diagonal import ROW_BUDGET
from fxsparse.curvature.operator_checks import check_count
from fxsparse.curvature.operator_data import Batch, Data
from fxsparse.curvature.operator_engine import Engine
from fxsparse.curvature.operator_output import OutputCurvature
from fxsparse.curvature.operator_scope import apart


def summed_gradient(
    engine: Engine, curvature: OutputCurvature, batches: Iterable[Batch]
) -> tuple[Float[Tensor, " P"], int]:
    """The gradient of the sum of the losses of all units, float64, and their number; for use inside the scope."""
    sums = torch.zeros(engine.space.size, dtype=torch.float64, device=engine.space.device)
    units = 0
    for batch in batches:
        units += curvature.units(engine.outputs(batch), batch)
        found = engine.gradient(batch, lambda z, b=batch: curvature.slope(z, b))  # type: ignore[misc]  # default
        sums += engine.space.flat(found).double()
    return sums, units


def sample_gradients(
    engine: Engine, curvature: OutputCurvature, data: Data, most: int | None, chunk: int | None
) -> Iterator[dict[str, Float[Tensor, "n ..."]]]:
    """The gradients of single samples, by parameter, of at most `chunk` and `most` samples at a time.

    The scope is left before each of them is given out: its receiver goes on in the state that is its own.
    """
    if chunk is not None:
        check_count("chunk", chunk)
    size = min(chunk or max(1, ROW_BUDGET // max(engine.space.size, 1)), most or sys.maxsize)
    return _gradients(engine, curvature, data, size)


def _gradients(engine: Engine, curvature: OutputCurvature, data: Data, size: int) -> Iterator[dict[str, Tensor]]:
    for given in apart(data):
        with engine.scope():
            batch = engine.settled(given)
        for piece in batch.pieces(size):
            with engine.scope():
                slope = curvature.slope(engine.outputs(piece), piece)
                rows = engine.rows(piece, slope[None], engine.space.names)
            yield {name: row[0] for name, row in rows.items()}
