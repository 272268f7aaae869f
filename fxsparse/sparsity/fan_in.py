"""Constant fan-in: the same number of inputs for every output unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target
from fxsparse.sparsity.layout import LINEAR, Layout
from fxsparse.sparsity.pattern import Pattern, checked_shape
from fxsparse.sparsity.top_k import order_scores
from fxsparse.sparsity.units import Pooling, Units


@dataclass(frozen=True)
class RowUnits(Units):
    """Every output unit is a segment, every element of it a unit; inactive rows keep nothing."""

    layout: Layout
    active: tuple[bool, ...] | None = None

    def pool(self, scores: Tensor, pooling: Pooling = Pooling.RMS) -> Tensor:
        """Shape -> [rows, fan_in]."""
        return self.layout.to_rows(order_scores(scores)).flatten(1)

    def spread(self, chosen: Tensor) -> Tensor:
        """[rows, fan_in] -> shape."""
        rows, inputs, kernel = self.layout.matrix_shape(self.shape)
        return self.layout.from_rows(chosen.reshape(rows, inputs, kernel), self.shape)

    def collect(self, mask: Tensor) -> Tensor:
        """Shape -> [rows, fan_in]."""
        return self.layout.to_rows(mask).flatten(1)

    def counts(self, target: float | Target) -> Tensor:
        """Fan-in k in every active row, 0 in the others."""
        rows = self.segments if self.active is None else sum(self.active)
        k = fan_in(self.segments, self.width, rows, self.target(target).alive)
        if self.active is None:
            return torch.full((self.segments,), k, dtype=torch.int64)
        return torch.tensor(self.active, dtype=torch.int64) * k

    def alive_elements(self, target: float | Target) -> int:
        """Exact: fan-in times active rows, fewer than `target.alive` by less than the number of active rows."""
        return int(self.counts(target).sum())


@dataclass(frozen=True)
class ConstantFanIn(Pattern):
    """Every active row has exactly k = min(F, floor(K / rows)) alive elements, ablated rows have none.

    Rows are output units, F the elements of a row (arXiv 2305.02299).
    """

    def units(
        self,
        shape: Sequence[int],
        layout: Layout = LINEAR,
        row_order: Tensor | None = None,
        active: Bool[Tensor, " rows"] | None = None,
    ) -> RowUnits:
        """One segment per output unit; `active` (default: all) says which rows are not ablated."""
        sizes = checked_shape(self, shape, row_order)
        rows, inputs, kernel = layout.matrix_shape(sizes)
        if active is not None and (active.dtype != torch.bool or active.shape != (rows,)):
            raise ConfigError(f"`active` of shape (={tuple(active.shape)}) must be a bool tensor of the {rows} rows")
        kept = None if active is None else tuple(active.tolist())
        return RowUnits(sizes, rows, inputs * kernel, layout, kept)

    def mask(
        self,
        scores: Tensor,
        target: float | Target,
        layout: Layout = LINEAR,
        pooling: Pooling = Pooling.RMS,
        row_order: Tensor | None = None,
        active: Bool[Tensor, " rows"] | None = None,
    ) -> Tensor:
        """As `Pattern.mask`; `active` (default: all) says which rows are not ablated."""
        if active is None:
            return super().mask(scores, target, layout, pooling, row_order)
        units = self.units(scores.shape, layout, row_order, active)
        return self._choose(units, scores, units.target(target), pooling)

    def _check_counts(self, chosen: Tensor, units: Units) -> None:
        alive = chosen.sum(1)
        k = int(alive.max())
        broken = ((alive != 0) & (alive != k)).nonzero()
        if k == 0:
            raise ConfigError(f"`mask` breaks {self}: no row has an alive element; keep at least one a row")
        if broken.numel():
            row = int(broken[0])
            raise ConfigError(
                f"`mask` breaks {self}: row {row} has {int(alive[row])} alive while another row has {k}; "
                "every row must have the same number, or none"
            )


def fan_in(rows: int, width: int, active: int, alive: int) -> int:
    """Alive elements of each active row, k = min(F, floor(K / active)).

    Args:
        rows: Output units R.
        width: Elements of a row, F.
        active: Rows that are not ablated.
        alive: Budget K of the weight, in elements.

    Raises:
        ConfigError: the budget leaves an active row empty, or does not fit into the active rows.
    """
    if active > alive:
        raise ConfigError(
            f"`active` rows (={active}) must be at most the alive elements (={alive}): a row would have none; "
            "lower the sparsity, ablate rows, or exclude this weight"
        )
    fewest = -(-alive // width)
    if active < fewest:
        raise ConfigError(
            f"`active` rows (={active}) must be at least {fewest} to hold {alive} alive elements of {width} a row; "
            "ablate fewer rows"
        )
    return min(width, alive // active)
