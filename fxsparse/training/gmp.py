"""GMP: gradual pruning by magnitude."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_sparsity
from fxsparse.sparsity.schedule import CubicSparsity, CustomSparsity, SparsitySchedule, UpdateSteps
from fxsparse.training.scheduled import Scheduled
from fxsparse.training.updater import resolved_end


@dataclass(frozen=True)
class GMP(Scheduled):
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
    """

    every: int = 100
    start: int = 0
    end: int | None = None
    end_fraction: float = 0.75
    initial_sparsity: float = 0.0
    schedule: SparsitySchedule | CustomSparsity | None = None

    grows: ClassVar[bool] = False

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

    def sparsities(self) -> Iterable[float]:
        """At the start and at each update."""
        return [self.sparsity_at(0), *(self.sparsity_at(step) for step in self._steps().steps())]

    def sparsity_at(self, step: int) -> float:
        """The schedule's."""
        return self._timed_schedule()(step)

    def update_due(self, step: int) -> bool:
        """Every `every` steps from the schedule's start, and at its end; a start at 0 counts from the first step."""
        return self._steps()(step)

    def _timed_schedule(self) -> SparsitySchedule | CustomSparsity:
        if self.schedule is None:
            raise ConfigError("`schedule` (=None) has no steps yet; call timed(total_steps) first, as attach does")
        return self.schedule

    def _steps(self) -> UpdateSteps:
        schedule = self._timed_schedule()
        return UpdateSteps(self.every, schedule.start, schedule.end, inclusive_end=True)
