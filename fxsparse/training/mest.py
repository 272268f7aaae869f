"""MEST: elastic mutation, with or without a soft memory bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target, check_fraction, keep_count
from fxsparse.sparsity.n_by_m import NByM
from fxsparse.sparsity.pattern import Pattern
from fxsparse.training.drop_grow import Periodic
from fxsparse.training.exchange import of_weight
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class MEST(Periodic):
    """Memory-economic sparse training (Yuan et al., arXiv 2110.14032): at each event some go, others come at random.

    EM prunes to sparsity s + p and grows back to s at once. EM&S (`soft`) prunes to s and grows to s - p, so that
    between two events more is alive than the target says. p falls in phases, the last one has p = 0.

    Attributes:
        every: Steps between events.
        p: The extra fraction of each phase; the last must be 0.
        boundaries: Steps at which phases end, one fewer than phases; None = `boundary_fractions` of the training.
        boundary_fractions: `boundaries` as shares of the whole training.
        soft: EM&S instead of EM.
        gradient: Factor lambda of |G| in the drop score |w| + lambda |G|; G as the optimizer was given it.
    """

    p: tuple[float, ...] = (0.02, 0.01, 0.0)
    boundaries: tuple[int, ...] | None = None
    boundary_fractions: tuple[float, ...] = (0.5625, 0.75)
    soft: bool = False
    gradient: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for extra in self.p:
            check_fraction(extra, "p")
        if not self.p or self.p[-1] != 0:
            raise ConfigError(f"`p` (={self.p}) must end in 0: the training ends at the target sparsity")
        ends = self.boundary_fractions if self.boundaries is None else self.boundaries
        if len(ends) != len(self.p) - 1 or list(ends) != sorted(ends):
            raise ConfigError(f"`boundaries` (={ends}) must ascend and be one fewer than the phases of `p` (={self.p})")
        if not self.gradient >= 0:
            raise ConfigError(f"`gradient` (={self.gradient}) must be at least 0")

    @property
    def needs_gradient(self) -> bool:
        """With a gradient in the drop score."""
        return self.gradient > 0 or super().needs_gradient

    def timed(self, total_steps: int | None) -> Self:
        """`boundaries` in steps.

        Raises:
            ConfigError: neither they nor the length of the training are known.
        """
        timed = super().timed(total_steps)
        if self.boundaries is not None:
            return timed
        if total_steps is None:
            raise ConfigError("`total_steps` (=None) must be given to attach with MEST, or `boundaries` to MEST(...)")
        return replace(timed, boundaries=tuple(int(share * total_steps + 1e-6) for share in self.boundary_fractions))

    def check(self, pattern: Pattern) -> None:
        """EM&S needs a pattern that can have other densities between events."""
        super().check(pattern)
        if self.soft and isinstance(pattern, NByM):
            raise ConfigError(f"`soft` (=True) has more alive between events, which {pattern} excludes; use soft=False")

    def extra(self, step: int) -> float:
        """P at a step."""
        ends = self.boundaries or ()
        return self.p[sum(step >= end for end in ends)]

    def update_due(self, step: int) -> bool:
        """At events; with `soft` also where p becomes 0."""
        return super().update_due(step) or (self.soft and step > 0 and step in (self.boundaries or ())[-1:])

    def targets(self, states: Sequence[WeightState]) -> Mapping[str, Target]:
        """With `soft`, s - p of every weight."""
        if not self.soft:
            return {}
        return {
            state.name: _shifted(state.target, state.weight.numel(), -self.extra(state.step))
            for state in states
            if state.target is not None
        }

    def drop_counts(self, states: Sequence[WeightState]) -> Mapping[str, int]:
        """K(s) - K(s + p); with `soft` what is alive beyond s."""
        return {state.name: 0 if state.target is None else self._dropped(state, state.target) for state in states}

    def _dropped(self, state: WeightState, target: Target) -> int:
        alive = state.alive if of_weight(state.units) else state.alive[:1]
        if self.soft:
            return max(0, int(alive.sum()) - int(state.units.counts(target)[: len(alive)].sum()))
        further = _shifted(target, state.weight.numel(), self.extra(state.step))
        return keep_count(alive.numel(), target.sparsity) - keep_count(alive.numel(), further.sparsity)

    def drop_scores(self, state: WeightState) -> Tensor:
        """|w| + lambda |G|."""
        if not self.gradient:
            return super().drop_scores(state)
        assert state.gradient is not None
        score = state.element_scores(self.drop) + self.gradient * (state.factor * state.gradient).abs()
        return state.pooled(score, self.drop.pooling)


def _shifted(target: Target, numel: int, extra: float) -> Target:
    """A target with another sparsity; a dense weight stays dense."""
    sparsity = target.sparsity + extra
    if extra == 0 or target.alive == numel:
        return target
    return Target.dense(numel) if sparsity <= 0 else Target.of(numel, min(sparsity, 1 - 1 / (2 * numel)))
