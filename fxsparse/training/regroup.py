"""Learned row groups of shared supports: rows change groups at mask updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count
from fxsparse.sparsity.grouping import group_rows
from fxsparse.sparsity.saliency import Gradient, Saliency
from fxsparse.sparsity.shared_support import SupportUnits
from fxsparse.sparsity.top_k import segment_top_k
from fxsparse.sparsity.units import Pooling
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class Regroup:
    """Put rows into groups of similar saliency before a mask update exchanges positions.

    Rows are regrouped by their scores (those that alive weights are kept by), so that groups lose little to as many
    shared positions as the weight has in the end; see `fxsparse.sparsity.group_rows`. The mask is then built anew in
    the new groups, with as many positions as before, and the update goes on; all of it counts as one exchange.
    It pays where weights are dense at first, as in GMP and AC/DC: later on the rows of a group share their fate.

    Attributes:
        every: Mask updates from one regrouping to the next, at least 1.
        until: Number of the last update that regroups; None = all do.
        growth: How much the gradient of dead weights says in which group a row belongs, at least 0: |G| joins the
            scores, scaled so that at 1 its mean square is that of the alive scores. Needs a method that reads G.
    """

    every: int = 1
    until: int | None = None
    growth: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.every, "every", 1)
        if self.until is not None:
            check_count(self.until, "until", 0)
        if not self.growth >= 0:
            raise ConfigError(f"`growth` (={self.growth}) must be at least 0")

    def due(self, update: int) -> bool:
        """Whether the update of this number (from 1 on) regroups."""
        return update % self.every == 0 and (self.until is None or update <= self.until)

    def applied(self, state: WeightState, saliency: Saliency) -> WeightState:
        """The weight in its new groups, with the mask built anew; the same state where nothing is to be gained.

        Raises:
            DataError: a score is NaN or infinite.
        """
        units = state.units
        if not isinstance(units, SupportUnits) or not bool(state.mask.any()):
            return state
        alive = state.alive.sum(1)
        kept = int(alive[0]) if state.target is None else min(int(alive[0]), int(units.counts(state.target)[0]))
        order = new_row_order(units, self._profile(state, saliency), kept, saliency.pooling)
        if order is None:
            return state
        moved = state.replaced(row_order=order)  # a new object: nothing cached of the old groups travels
        return moved.replaced(mask=moved.units.spread(segment_top_k(moved.scores(saliency), alive)))

    def _profile(self, state: WeightState, saliency: Saliency) -> Float[Tensor, "*shape"]:
        scores = state.element_scores(saliency) * state.mask
        if not self.growth or state.gradient is None:
            return scores
        wished = Gradient().score(state.weight, state.gradient) * ~state.mask
        have, wish = (each.double().square().sum().sqrt() for each in (scores, wished))
        alive, dead = state.mask.sum(), (~state.mask).sum().clamp(min=1)
        scale = self.growth * (have / alive.sqrt()) / (wish / dead.sqrt()) if bool(wish) else 0.0
        return scores + wished * scale


def new_row_order(
    units: SupportUnits, scores: Float[Tensor, "*shape"], k: int, pooling: Pooling
) -> Int64[Tensor, " rows"] | None:
    """A row order with better groups by these element scores, or None where the present one stays.

    Rows keep to their part of the weight (an expert; q, k or v) and to their group of a grouped convolution.
    """
    rows = units.rows(scores).double()
    wanted = (rows.square() if pooling is Pooling.RMS else rows.abs()).sum(2).sqrt()
    parts = units.layout.parts(units.shape) * units.layout.groups
    count = len(wanted) // parts
    if units.layout.groups > 1 and count % units.group:
        return None
    present = torch.arange(len(wanted), device=wanted.device) if units.row_order is None else units.row_order
    present = present.to(wanted.device)
    found = [group_rows(part, units.group, k) + i * count for i, part in enumerate(wanted.reshape(parts, count, -1))]
    order = present[torch.cat(found)]
    return None if torch.equal(order, present) else order
