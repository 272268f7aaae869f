"""SNFS: growth by momentum, and budgets that move to the layers with most of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target, fraction_count
from fxsparse.sparsity.erk import share_out
from fxsparse.sparsity.pattern import Pattern, Unstructured
from fxsparse.sparsity.schedule import DropKind
from fxsparse.training.drop_grow import DropGrow
from fxsparse.training.state import WeightState

_EPSILON = 1e-8


@dataclass(frozen=True)
class SNFS(DropGrow):
    """Sparse momentum (Dettmers and Zettlemoyer, arXiv 1907.04840), with exact budgets.

    m is the smoothed dense gradient, kept as the optimizer would keep it: its momentum buffer where it has one, Adam's
    m / (sqrt(v) + 1e-8) where it has `betas`, else an average with decay `beta`. Dead weights with the largest |m|
    grow; what all layers drop is shared among them in proportion to the mean |m| of their alive weights. G is collected
    at every step, and one or two tensors of each weight's size are kept.

    Attributes:
        alpha: Fraction of alive weights exchanged at `start`.
        redistribute: Whether budgets move between layers, which needs `Unstructured()`; else each weight keeps its own.
        beta: Decay of m for optimizers without momentum.
    """

    alpha: float = 0.5
    decay: DropKind = DropKind.COSINE
    redistribute: bool = True
    beta: float = 0.9

    needs_gradient: ClassVar[bool] = True

    def watches(self, step: int) -> bool:
        """Every step until the last update."""
        return self.end is None or step < self.end

    def check(self, pattern: Pattern) -> None:
        """Single weights move between layers."""
        super().check(pattern)
        if self.redistribute and not isinstance(pattern, Unstructured):
            raise ConfigError(
                f"SNFS moves single weights between layers, {pattern} counts others; use redistribute=False"
            )

    def remember(self, state: WeightState) -> Mapping[str, Tensor]:
        """m, and v for Adam, as their optimizers average them."""
        assert state.gradient is not None
        g = state.factor * state.gradient.to(torch.promote_types(state.gradient.dtype, torch.float32))
        old = state.memory
        if "betas" in state.options:
            first, second = (float(beta) for beta in state.options["betas"][:2])
            m, v = old.get("m", torch.zeros_like(g)), old.get("v", torch.zeros_like(g))
            return {"m": first * m + (1 - first) * g, "v": second * v + (1 - second) * g * g}
        momentum = float(state.options.get("momentum", 0))
        if not momentum:
            return {"m": self.beta * old.get("m", torch.zeros_like(g)) + (1 - self.beta) * g}
        damped = 1 - float(state.options.get("dampening", 0))
        return {"m": momentum * old["m"] + damped * g if "m" in old else g}

    def grow_scores(self, state: WeightState) -> Tensor:
        """|m|."""
        return state.pooled(_smooth(state))

    def drop_counts(self, states: Sequence[WeightState]) -> Mapping[str, int]:
        """k_l, less where a nearly dense weight has more than its share."""
        return {name: k for name, (k, _) in self._moves(states).items()} if self.redistribute else {}

    def targets(self, states: Sequence[WeightState]) -> Mapping[str, Target]:
        """What is kept and the budget that is shared out; the sum over all weights stays."""
        if not self.redistribute:
            return {}
        after = {name: kept for name, (_, kept) in self._moves(states).items()}
        return {state.name: Target(1 - n / state.mask.numel(), n) for state in states if (n := after[state.name])}

    def _moves(self, states: Sequence[WeightState]) -> dict[str, tuple[int, int]]:
        """How many each weight drops, and how many are alive afterwards."""
        smooth = [float(_smooth(state)[state.mask].double().sum()) / max(1, int(state.mask.sum())) for state in states]
        shares = [each / sum(smooth) if sum(smooth) else 1 / len(smooth) for each in smooth]
        alive = [int(state.mask.sum()) for state in states]
        dropped = []
        for state, share, count in zip(states, shares, alive, strict=True):
            fraction, sparsity = self.drop_fraction(state.step), 1 - count / state.mask.numel()
            if sparsity < 0.2 and share > 1 / len(states):
                fraction = min(fraction, sparsity)
            dropped.append(min(fraction_count(fraction, count), max(0, count - 1)))
        room = [state.mask.numel() - count + k for state, count, k in zip(states, alive, dropped, strict=True)]
        grown = share_out(shares, sum(dropped), room)
        moves = zip(states, alive, dropped, grown, strict=True)
        return {state.name: (k, count - k + n) for state, count, k, n in moves}


def _smooth(state: WeightState) -> Tensor:
    """|m|, divided by sqrt(v) + 1e-8 where there is a v."""
    m = state.memory.get("m")
    if m is None:  # no gradient has ever reached this weight
        return torch.zeros_like(state.weight, dtype=torch.float32)
    return m.abs() / (state.memory["v"].sqrt() + _EPSILON) if "v" in state.memory else m.abs()
