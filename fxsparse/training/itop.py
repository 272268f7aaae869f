"""In-time over-parameterization: long pauses between exchanges, so that more weights are tried for longer."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor

from fxsparse.sparsity.saliency import Gradient, Saliency
from fxsparse.training.drop_grow import DropGrow
from fxsparse.training.state import WeightState


class Growth(enum.Enum):
    """Which weights grow."""

    RANDOM = "random"
    GRADIENT = "gradient"  # the largest |G|
    UNSEEN = "unseen"  # at random, those first that were never alive


@dataclass(frozen=True)
class ITOP(DropGrow):
    """ITOP (Liu et al., arXiv 2102.02887); `Handle.report().explored` is its rate R_s of weights that were ever alive.

    Attributes:
        alpha: Fraction of alive units exchanged.
        every: Steps between updates; the paper uses 1500 to 4000.
        growth: Which weights grow.
    """

    alpha: float = 0.5
    every: int = 1500
    growth: Growth = Growth.UNSEEN

    @property
    def grow(self) -> Saliency | None:
        """|G| or at random, by `growth`."""
        return Gradient() if self.growth is Growth.GRADIENT else None

    def grow_scores(self, state: WeightState) -> Tensor:
        """Those first that were never alive, where asked for; a unit was seen when any of its elements was."""
        scores = super().grow_scores(state)
        if self.growth is not Growth.UNSEEN or state.explored is None:
            return scores
        return scores + ~(state.units.pool(state.explored.double()) > 0)
