"""SET: drop the smallest weights, grow at random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction, fraction_count
from fxsparse.sparsity.pattern import Pattern, Unstructured
from fxsparse.sparsity.schedule import DropFraction, DropKind, UpdateSteps
from fxsparse.sparsity.top_k import top_k
from fxsparse.training.grown import GrownValue, Zero
from fxsparse.training.state import WeightState
from fxsparse.training.updater import NEVER, Method


@dataclass(frozen=True)
class SET(Method):
    """Sparse evolutionary training (Mocanu et al., arXiv 1707.04780): every `every` steps a fraction moves.

    Attributes:
        alpha: Fraction of alive units exchanged at `start`, in [0, 1].
        every: Steps between updates; the paper uses the steps of an epoch.
        start: First step that may update.
        end: Step from which masks stay; None = never.
        decay: How the fraction falls from `start` to `end`.
        regrow_dropped: Whether a weight may be dropped and grown in the same update.
        grown: The first value of a grown weight.
        sign_split: Drop the n(f, A+) smallest weights >= 0 and the n(f, A-) negative ones nearest 0; unstructured.
    """

    alpha: float = 0.3
    every: int = 100
    start: int = 0
    end: int | None = None
    decay: DropKind = DropKind.CONSTANT
    regrow_dropped: bool = True
    grown: GrownValue = Zero()
    sign_split: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.alpha, "alpha")
        UpdateSteps(self.every, self.start, NEVER if self.end is None else self.end)

    def timed(self, total_steps: int | None) -> Self:
        """`end` is the last step; without it a constant fraction goes on for ever.

        Raises:
            ConfigError: the fraction decays and nobody says until when.
        """
        if self.end is None and total_steps is None and self.decay is not DropKind.CONSTANT:
            raise ConfigError(f"`decay` (={self.decay}) needs an end: give attach `total_steps`, or SET an `end`")
        return replace(self, end=(NEVER if total_steps is None else total_steps) if self.end is None else self.end)

    def check(self, pattern: Pattern) -> None:
        """Sign splitting needs weights that have a sign of their own; every exchange a count to conserve."""
        if self.sign_split and not isinstance(pattern, Unstructured):
            raise ConfigError(f"`sign_split` (=True) needs Unstructured(): a unit of {pattern} has no sign")
        if getattr(pattern, "exact", True) is False:
            raise ConfigError(f"{pattern} has no count per group that an exchange could conserve; use exact=True")

    def update_due(self, step: int) -> bool:
        """Every `every` steps before `end`."""
        return UpdateSteps(self.every, self.start, NEVER if self.end is None else self.end)(step)

    def drop_fraction(self, step: int) -> float:
        """`alpha`, decayed."""
        return DropFraction(self.decay, self.alpha, self.start, NEVER if self.end is None else self.end)(step)

    def drop_count(self, state: WeightState) -> int | None:
        """n(f, A+) + n(f, A-) with `sign_split`."""
        return self._sign_losers(state)[1] if self.sign_split else None

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
