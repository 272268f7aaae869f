"""GMP: gradual pruning by magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_sparsity
from fxsparse.sparsity.distribution import Distribution, Global, Target, Uniform, WeightSpec
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.saliency import Magnitude, Saliency
from fxsparse.sparsity.schedule import CubicSparsity, CustomSparsity, SparsitySchedule, UpdateSteps
from fxsparse.sparsity.top_k import segment_top_k
from fxsparse.training.state import WeightState
from fxsparse.training.updater import Method, resolved_end

_BELOW_ALL = -1e-300  # lower than any saliency of an alive weight, and nothing to a norm


@dataclass(frozen=True)
class GMP(Method):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): the sparsity rises, dead weights stay dead.

    Masks are nested. The schedule is cubic from `initial_sparsity` at `start` to `sparsity` at `end`, unless another
    one is given, which then says its own steps. A model that is sparse already is pruned on from there.

    Attributes:
        every: Steps between updates.
        start: Step t0 of the schedule.
        end: Step t1, always an update; None = `end_fraction` of the training.
        end_fraction: `end` as a share of the whole training, where `end` is None.
        initial_sparsity: Sparsity before the first update.
        schedule: Another schedule; its final value must be `sparsity`.
        drop: The saliency; the lowest alive weights die.
    """

    distribution: Distribution = field(default_factory=Uniform)
    every: int = 100
    start: int = 0
    end: int | None = None
    end_fraction: float = 0.75
    initial_sparsity: float = 0.0
    schedule: SparsitySchedule | CustomSparsity | None = None
    drop: Saliency = Magnitude()

    any_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        if self.schedule is not None and self.schedule.final != self.sparsity:
            raise ConfigError(f"`sparsity` (={self.sparsity}) must be the schedule's final (={self.schedule.final})")
        if self.schedule is None and self.initial_sparsity > self.sparsity:
            raise ConfigError(
                f"`initial_sparsity` (={self.initial_sparsity}) must be at most `sparsity` (={self.sparsity})"
            )

    def timed(self, total_steps: int | None) -> Self:
        """The schedule with its steps.

        Raises:
            ConfigError: neither `end`, a schedule nor the length of the training is known.
        """
        if self.schedule is not None:
            return self
        end = resolved_end(self, self.end, self.end_fraction, total_steps)
        return replace(self, schedule=CubicSparsity(self.initial_sparsity, self.sparsity, min(self.start, end), end))

    def check(self, pattern: Pattern) -> None:
        """Every sparsity on the way must be one that the pattern can have."""
        for sparsity in [self.sparsity_at(0), *(self.sparsity_at(step) for step in self._steps().steps())]:
            try:
                pattern.check_sparsity(sparsity)
            except ConfigError as error:
                raise ConfigError(f"GMP passes through other sparsities unless `start` = `end`: {error}") from error

    def initial_saliency(self) -> Saliency:
        """The saliency that goes on pruning."""
        return self.drop

    def sparsity_at(self, step: int) -> float:
        """The schedule's."""
        return self._timed_schedule()(step)

    def update_due(self, step: int) -> bool:
        """Every `every` steps from the schedule's start, and at its end; a start at 0 counts from the first step."""
        return self._steps()(step)

    def targets(self, states: Sequence[WeightState]) -> Mapping[str, Target]:
        """The distribution's targets at this sparsity, never below the final ones."""
        weights = [WeightSpec(state.name, tuple(state.weight.shape), state.layout, state.pattern) for state in states]
        ranked = isinstance(self.distribution, Global)
        scores = {state.name: self._alive_scores(state) for state in states} if ranked else None
        now = self.distribution.targets(weights, self.sparsity_at(states[0].step), scores)
        if ranked:
            return now
        final = self.distribution.targets(weights, self.sparsity)
        return {name: max(now[name], final[name], key=lambda target: target.alive) for name in now}

    def exchanged(self, state: WeightState, target: Target | None) -> Tensor:
        """The best alive units; nothing grows."""
        assert target is not None
        if getattr(state.pattern, "exact", True) is False:
            return state.pattern.mask(self._alive_scores(state), target, state.layout) & state.mask
        counts = state.units.counts(target).to(state.alive.device)
        keep = segment_top_k(self.drop_scores(state), torch.minimum(counts, state.alive.sum(1)), state.alive)
        return state.units.spread(keep)

    def _alive_scores(self, state: WeightState) -> Tensor:
        scores = state.element_scores(self.drop).double()
        return torch.where(state.mask, scores, _BELOW_ALL)

    def _timed_schedule(self) -> SparsitySchedule | CustomSparsity:
        if self.schedule is None:
            raise ConfigError("`schedule` (=None) has no steps yet; call timed(total_steps) first, as attach does")
        return self.schedule

    def _steps(self) -> UpdateSteps:
        schedule = self._timed_schedule()
        return UpdateSteps(self.every, schedule.start, schedule.end, inclusive_end=True)
