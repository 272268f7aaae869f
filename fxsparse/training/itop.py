"""In-time over-parameterization: long pauses between exchanges, so that more weights are tried for longer."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor

from fxsparse.sparsity.saliency import Gradient
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
    def needs_gradient(self) -> bool:
        """For growth by gradient."""
        return self.growth is Growth.GRADIENT or super().needs_gradient

    def grow_scores(self, state: WeightState) -> Tensor:
        """By `growth`; a unit was seen when any of its elements was ever alive."""
        if self.growth is Growth.GRADIENT:
            return state.scores(Gradient())
        drawn = state.draws("grow")
        if self.growth is Growth.RANDOM or state.explored is None:
            return drawn
        seen = state.units.pool(state.explored.double()) > 0
        return drawn + ~seen
