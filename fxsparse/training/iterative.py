"""Pruning in rounds: scores are taken anew from what the round before has left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fxsparse.sparsity.counts import check_count
from fxsparse.training.calibration import Calibration
from fxsparse.training.pruning import Masks, Pruning
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class Iterative(Pruning):
    """Round e of n keeps the density rho^(e/n) among the survivors, so that no layer is cut off.

    Attributes:
        rounds: n; patterns that exclude the densities between, such as `NByM`, need 1.
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.rounds, "rounds", 1)

    def densities(self) -> tuple[float, ...]:
        """rho^(e/n) for e = 1 ... n."""
        rho = 1 - self.sparsity
        return tuple(rho ** (e / self.rounds) for e in range(1, self.rounds + 1))

    def masks(self, calibration: Calibration, states: Sequence[WeightState]) -> Masks:
        """The last round's; rows are regrouped in it."""
        between = dataclasses.replace(self, regroup=None)
        for density in self.densities()[:-1]:
            found = between.best(states, self.scores(calibration, states), 1 - density)
            states = [dataclasses.replace(state, mask=found[state.name][0]) for state in states]
        return super().masks(calibration, states)
