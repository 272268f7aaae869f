"""SET: drop the smallest weights, grow at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import fraction_count
from fxsparse.sparsity.pattern import Pattern, Unstructured
from fxsparse.sparsity.top_k import top_k
from fxsparse.training.drop_grow import DropGrow
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class SET(DropGrow):
    """Sparse evolutionary training (Mocanu et al., arXiv 1707.04780): the smallest |w| go, others come at random.

    The paper updates once an epoch: give `every` the steps of one.

    Attributes:
        sign_split: Drop the n(f, A+) smallest weights >= 0 and the n(f, A-) negative ones nearest 0; unstructured.
    """

    sign_split: bool = False

    def check(self, pattern: Pattern) -> None:
        """Sign splitting needs weights that have a sign of their own."""
        super().check(pattern)
        if self.sign_split and not isinstance(pattern, Unstructured):
            raise ConfigError(f"`sign_split` (=True) needs Unstructured(): a unit of {pattern} has no sign")

    def drop_counts(self, states: Sequence[WeightState]) -> Mapping[str, int]:
        """n(f, A+) + n(f, A-) with `sign_split`."""
        return {state.name: self._sign_losers(state)[1] for state in states} if self.sign_split else {}

    def drop_scores(self, state: WeightState) -> Tensor:
        """|w|; with `sign_split` those to drop of each sign come last."""
        scores = super().drop_scores(state)
        return torch.where(self._sign_losers(state)[0], -1.0, scores) if self.sign_split else scores

    def _sign_losers(self, state: WeightState) -> tuple[Tensor, int]:
        scores, positive = super().drop_scores(state), state.units.collect(state.weight >= 0)
        losers, count = torch.zeros_like(state.alive), 0
        for side in (state.alive & positive, state.alive & ~positive):
            alive = int(side.sum())
            dropped = fraction_count(self.drop_fraction(state.step), alive)
            losers |= side & ~top_k(scores, alive - dropped, side)
            count += dropped
        return losers, count
