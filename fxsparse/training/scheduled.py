"""What methods share whose masks follow a sparsity over time."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.distribution import Distribution, Global, Target, Uniform
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.saliency import Magnitude, Saliency
from fxsparse.training.exchange import exchange
from fxsparse.training.state import WeightState
from fxsparse.training.updater import Method

_BELOW_ALL = -1e-300  # lower than any saliency of an alive weight, and nothing to a norm


@dataclass(frozen=True)
class Scheduled(Method):
    """At each update the best units of every weight stay, as many as the distribution gives it at `sparsity_at(step)`.

    Attributes:
        distribution: How the sparsity is shared among the weights.
        drop: The saliency; the lowest alive weights die.
    """

    distribution: Distribution = field(default_factory=Uniform)
    drop: Saliency = Magnitude()

    any_start: ClassVar[bool] = True

    @abc.abstractmethod
    def sparsities(self) -> Iterable[float]:
        """Every sparsity on the way."""

    def check(self, pattern: Pattern) -> None:
        """Every sparsity on the way must be one that the pattern can have."""
        for sparsity in self.sparsities():
            try:
                pattern.check_sparsity(sparsity)
            except ConfigError as error:
                name = type(self).__name__
                raise ConfigError(f"{name} passes through other sparsities unless `start` = `end`: {error}") from error

    def initial_saliency(self) -> Saliency:
        """The saliency that goes on pruning."""
        return self.drop

    def targets(self, states: Sequence[WeightState]) -> Mapping[str, Target]:
        """The distribution's targets at this sparsity; where nothing grows, never below the final ones."""
        weights = [state.spec for state in states]
        ranked = isinstance(self.distribution, Global)
        scores = {state.name: self.alive_scores(state) for state in states} if ranked else None
        now = self.distribution.targets(weights, self.sparsity_at(states[0].step), scores) if states else {}
        if ranked or self.grows:
            return now
        final = self.distribution.targets(weights, self.sparsity)
        return {name: max(now[name], final[name], key=lambda target: target.alive) for name in now}

    def exchanged(self, state: WeightState, target: Target | None = None, dropped: int | None = None) -> Tensor:
        """The best alive units, and where there are too few of them the best of the others if the method grows."""
        assert target is not None
        if getattr(state.pattern, "exact", True) is False:
            mask = state.pattern.mask(self.alive_scores(state), target, state.layout)
            return mask if self.grows else mask & state.mask
        scores, alive = self.drop_scores(state), state.alive
        counts = state.units.counts(target).to(alive.device)
        if not self.grows:
            counts = torch.minimum(counts, alive.sum(1))
        grow = self.grow_scores(state) if self.grows else scores
        return state.units.spread(exchange(state.units, alive, scores, grow, target=counts))

    def alive_scores(self, state: WeightState) -> Tensor:
        """Scores of elements, dead ones below all others."""
        return torch.where(state.mask, state.element_scores(self.drop).double(), _BELOW_ALL)
