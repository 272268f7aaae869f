"""What methods share whose masks follow a sparsity over time."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction
from fxsparse.sparsity.distribution import Distribution, Global, Target, Uniform
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.saliency import Magnitude, Saliency
from fxsparse.sparsity.schedule import Sparsities, UpdateSteps
from fxsparse.training.exchange import exchange
from fxsparse.training.state import WeightState
from fxsparse.training.updater import Method, resolved_step

_BELOW_ALL = -1e-300  # lower than any saliency of an alive weight, and nothing to a norm


@dataclass(frozen=True)
class Scheduled(Method):
    """At each update the best units of every weight stay, as many as the distribution gives it at `sparsity_at(step)`.

    Attributes:
        distribution: How the sparsity is shared among the weights.
        drop: The saliency; the lowest alive weights die.
        every: Steps between updates.
        end: Last step of the schedule, always an update; None = `end_fraction` of the training.
        end_fraction: `end` as a share of the whole training, where `end` is None.
        schedule: Another schedule than the method's, which says its own steps; its final value must be `sparsity`.
        grow: The saliency by which dead weights come alive, the highest first; None = at random.
    """

    distribution: Distribution = field(default_factory=Uniform)
    drop: Saliency = Magnitude()
    every: int = 100
    end: int | None = None
    end_fraction: float = 0.75
    schedule: Sparsities | None = None
    grow: Saliency | None = field(default=None, kw_only=True)

    any_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.end_fraction, "end_fraction")
        if self.schedule is not None and self.schedule.final != self.sparsity:
            raise ConfigError(f"`sparsity` (={self.sparsity}) must be the schedule's final (={self.schedule.final})")

    @abc.abstractmethod
    def planned(self, end: int) -> Sparsities:
        """The method's own schedule, which ends at a step."""

    def timed(self, total_steps: int | None) -> Self:
        """The schedule with its steps.

        Raises:
            ConfigError: neither `end`, a schedule nor the length of the training is known.
        """
        if self.schedule is not None:
            return self
        end = resolved_step(self, self.end_fraction, total_steps) if self.end is None else self.end
        return replace(self, end=end, schedule=self.planned(end))

    def sparsity_at(self, step: int) -> float:
        """The schedule's."""
        return self._timed_schedule()(step)

    def update_due(self, step: int) -> bool:
        """Every `every` steps from the schedule's start, and at its end; a start at 0 counts from the first step."""
        return self._steps()(step)

    def check(self, pattern: Pattern) -> None:
        """Every sparsity on the way must be one that the pattern can have, and growth needs a count."""
        grows = self.grow is not None or self.drop_fraction(self._timed_schedule().start) > 0
        if grows and getattr(pattern, "exact", True) is False:
            raise ConfigError(f"{pattern} has no count per group that growth could fill; use exact=True")
        for step in (0, *self._steps().steps()):
            try:
                pattern.check_sparsity(self.sparsity_at(step))
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
        scores, alive = self.ranked_to_drop(state), state.alive
        counts = state.units.counts(target).to(alive.device)
        if not self.grows:
            counts = torch.minimum(counts, alive.sum(1))
        fraction = self.drop_fraction(state.step)
        grow = self.ranked_to_grow(state) if self.grows or fraction else scores
        chosen = exchange(state.units, alive, scores, grow, target=counts)
        if fraction:
            chosen = exchange(state.units, chosen, scores, grow, fraction)
        return state.units.spread(chosen)

    def alive_scores(self, state: WeightState) -> Tensor:
        """Scores of elements, dead ones below all others."""
        return torch.where(state.mask, state.element_scores(self.drop).double(), _BELOW_ALL)

    def _timed_schedule(self) -> Sparsities:
        if self.schedule is None:
            raise ConfigError("`schedule` (=None) has no steps yet; call timed(total_steps) first, as attach does")
        return self.schedule

    def _steps(self) -> UpdateSteps:
        schedule = self._timed_schedule()
        return UpdateSteps(self.every, schedule.start, schedule.end, inclusive_end=True)
