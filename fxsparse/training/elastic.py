"""Elastic mutation: weights are pruned to one sparsity and grow to another at the same event."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target, keep_count
from fxsparse.sparsity.n_by_m import NByM
from fxsparse.sparsity.pattern import Pattern
from fxsparse.training.drop_grow import Periodic
from fxsparse.training.exchange import of_weight
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class Elastic(Periodic):
    """Each event prunes every weight, of sparsity s, to s + p and grows it back to s, for p = `extra(step)`.

    With a soft memory bound it prunes to s and grows to s - p, so that more is alive between two events.

    Attributes:
        soft: Whether the memory bound is soft.
    """

    soft: bool = False

    @abc.abstractmethod
    def extra(self, step: int) -> float:
        """P at a step, in [0, 1]."""

    def check(self, pattern: Pattern) -> None:
        """A soft bound needs a pattern that can have other densities between events."""
        super().check(pattern)
        if self.soft and isinstance(pattern, NByM):
            raise ConfigError(f"`soft` (=True) has more alive between events, which {pattern} excludes; use soft=False")

    def update_due(self, step: int) -> bool:
        """At events; with `soft` also where p becomes 0."""
        ends = self.soft and step > 0 and self.extra(step) == 0 != self.extra(step - 1)
        return ends or super().update_due(step)

    def targets(self, states: Sequence[WeightState]) -> Mapping[str, Target]:
        """With `soft`, s - p of every weight."""
        if not self.soft:
            return {}
        return {
            state.name: _shifted(state.target, state.shape.numel(), -self.extra(state.step))
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
        further = _shifted(target, state.shape.numel(), self.extra(state.step))
        return keep_count(alive.numel(), target.sparsity) - keep_count(alive.numel(), further.sparsity)


def _shifted(target: Target, numel: int, extra: float) -> Target:
    """A target with another sparsity; a dense weight stays dense."""
    sparsity = target.sparsity + extra
    if extra == 0 or target.alive == numel:
        return target
    return Target.dense(numel) if sparsity <= 0 else Target.of(numel, min(sparsity, 1 - 1 / (2 * numel)))
