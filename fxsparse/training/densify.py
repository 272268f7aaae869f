"""RESU in reverse: a sparse model becomes denser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.nn import ThetaInit
from fxsparse.sparsity.counts import check_sparsity
from fxsparse.sparsity.n_by_m import GroupUnits
from fxsparse.training.resu import RESU
from fxsparse.training.resu_phases import Cycle, Lengths, Timeline, grow_cycles
from fxsparse.training.resu_subset import AllDead, Subset
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class Densify(RESU):
    """RESU in reverse: a sparse model becomes denser; no alive weight is lost.

    Cycle i trains at `path[i]`, trains the dead positions, and commits at `path[i + 1]`: all alive
    weights stay and the best of the trained join them. A last sparsity of 0 makes every weight alive with its theta.

    Its other defaults are those of `RESU.frozen`.

    Attributes:
        path: Falling sparsities, the initial one first; `sparsity` is the last one.
        initial: A saliency to draw the first masks by; a sparse model keeps its own.
    """

    sparsity: float = 0.0
    path: tuple[float, ...] = (0.7, 0.5, 0.3, 0.1, 0.0)

    cycles: int = 5
    lengths: Lengths = Lengths(0.6, 0.1, 0.3)
    final_fraction: float = 0.5
    subset: Subset = AllDead()
    init: ThetaInit = ThetaInit.NORMAL
    freeze_active: bool = True
    budget: tuple[float, float] = (0.10, 0.02)

    grows: ClassVar[bool] = True

    def _check_sparsities(self) -> None:
        if len(self.path) < 2 or any(a <= b for a, b in zip(self.path, self.path[1:], strict=False)):
            raise ConfigError(f"`path` (={self.path}) must list at least 2 falling sparsities")
        for value in self.path:
            check_sparsity(value, "path")
        if self.path[-1] != self.sparsity:
            raise ConfigError(f"`sparsity` (={self.sparsity}) must be the path's last (={self.path[-1]})")
        if self.lengths.resu == 0:
            raise ConfigError("`lengths.resu` (=0) must be positive: only a RESU phase makes a model denser")

    @property
    def _cycle_count(self) -> int:
        return len(self.path) - 1

    def _made(self, ends: tuple[int, ...]) -> Timeline:
        return grow_cycles(self.path, self.lengths, ends)

    def _every_sparsity(self) -> tuple[float, ...]:
        return self.path

    def sparsity_at(self, step: int) -> float:
        """The path's first, then what the last COMMIT led to."""
        return self.timeline.sparsity(step, self.path[0])

    def _places(
        self, state: WeightState, cycle: Cycle, scores: Tensor, trained: Tensor, states: Sequence[WeightState]
    ) -> tuple[Tensor, Tensor]:
        """K of the next sparsity, never below what is alive; k_A = A."""
        ranked = {each.name: each.element_scores(self.score) for each in states}
        target = self.distribution.targets([each.spec for each in states], cycle.committed, ranked)[state.name]
        alive = state.alive.sum(1)
        if isinstance(state.units, GroupUnits) and not (state.units.exact or state.units.is_dense(target)):
            more = max(0, state.units.alive_elements(target) - int(alive.sum()))
            quota = torch.zeros_like(alive)
            quota[0] = more  # `tournament` holds it over the whole weight
            return alive + quota, quota
        counts = state.units.counts(target).to(alive.device).maximum(alive)
        return counts, counts - alive
