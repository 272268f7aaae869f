"""GMP: gradual pruning by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_sparsity
from fxsparse.sparsity.schedule import CubicSparsity, Sparsities
from fxsparse.training.scheduled import Scheduled


@dataclass(frozen=True)
class GMP(Scheduled):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): the sparsity rises, dead weights stay dead.

    Masks are nested. The schedule is cubic from `initial_sparsity` at `start` to `sparsity` at `end`, unless another
    one is given. A model that is sparse already is pruned on from there.

    Attributes:
        start: Step t0 of the schedule.
        initial_sparsity: Sparsity before the first update.
    """

    start: int = 0
    initial_sparsity: float = 0.0

    grows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        if self.schedule is None and self.initial_sparsity > self.sparsity:
            raise ConfigError(
                f"`initial_sparsity` (={self.initial_sparsity}) must be at most `sparsity` (={self.sparsity})"
            )

    def planned(self, end: int) -> Sparsities:
        """Cubic."""
        return CubicSparsity(self.initial_sparsity, self.sparsity, min(self.start, end), end)
