"""SNFS: growth by momentum, and budgets that move to the layers with most of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target
from fxsparse.sparsity.pattern import Pattern, Unstructured
from fxsparse.sparsity.schedule import DropKind
from fxsparse.training.budgets import Move, moves
from fxsparse.training.momentum import Smoothed, mean_smooth, smooth_of
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class SNFS(Smoothed):
    """Sparse momentum (Dettmers and Zettlemoyer, arXiv 1907.04840), with exact budgets.

    Dead weights with the largest |m| grow; what all layers drop is shared by the mean |m| of their alive weights.

    Attributes:
        alpha: Fraction of alive weights exchanged at `start`.
        redistribute: Whether budgets move between layers, which needs `Unstructured()`; else each weight keeps its own.
    """

    alpha: float = 0.5
    decay: DropKind = DropKind.COSINE
    redistribute: bool = True

    def check(self, pattern: Pattern) -> None:
        """Single weights move between layers."""
        super().check(pattern)
        if self.redistribute and not isinstance(pattern, Unstructured):
            raise ConfigError(
                f"SNFS moves single weights between layers, {pattern} counts others; use redistribute=False"
            )

    def grow_scores(self, state: WeightState) -> Tensor:
        """|m|."""
        return state.pooled(smooth_of(state))

    def drop_counts(self, states: Sequence[WeightState]) -> Mapping[str, int]:
        """k_l, less where a nearly dense weight has more than its share."""
        return {name: move.dropped for name, move in self._moves(states).items()}

    def targets(self, states: Sequence[WeightState]) -> Mapping[str, Target]:
        """What is kept and the budget that is shared out; the sum over all weights stays."""
        sizes, after = {state.name: state.mask.numel() for state in states}, self._moves(states)
        return {name: Target(1 - move.alive / sizes[name], move.alive) for name, move in after.items() if move.alive}

    def _moves(self, states: Sequence[WeightState]) -> dict[str, Move]:
        wants = [mean_smooth(state) for state in states]
        return moves(states, wants, self.drop_fraction(states[0].step)) if self.redistribute else {}
