"""GMP: gradual pruning by magnitude."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction, check_sparsity
from fxsparse.sparsity.schedule import CubicSparsity, DropFraction, DropKind, Sparsities
from fxsparse.training.scheduled import Scheduled


@dataclass(frozen=True)
class GMP(Scheduled):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): the sparsity rises, dead weights stay dead.

    Masks are nested. The schedule is cubic from `initial_sparsity` at `start` to `sparsity` at `end`, unless another
    one is given. A model that is sparse already is pruned on from there.

    With `alpha` weights come back (GraNet, Liu et al., arXiv 2106.10404: `grow` by the gradient, `alpha` .5): what an
    update leaves alive gives that fraction up, the lowest by `drop`, for as many dead units, the highest by `grow`.

    Attributes:
        start: Step t0 of the schedule.
        initial_sparsity: Sparsity before the first update.
        alpha: Fraction of the alive units that is exchanged at `start`, in [0, 1].
        decay: How the fraction falls from `start` to `end`, where it is 0.
    """

    start: int = 0
    initial_sparsity: float = 0.0
    alpha: float = field(default=0.0, kw_only=True)
    decay: DropKind = field(default=DropKind.COSINE, kw_only=True)

    grows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        if self.schedule is None and self.initial_sparsity > self.sparsity:
            raise ConfigError(
                f"`initial_sparsity` (={self.initial_sparsity}) must be at most `sparsity` (={self.sparsity})"
            )
        check_fraction(self.alpha, "alpha")
        if self.grow is not None and not self.alpha:
            raise ConfigError(f"`alpha` (={self.alpha}) must be positive with `grow` (={self.grow}): GMP(alpha=0.5)")

    def drop_fraction(self, step: int) -> float:
        """`alpha`, decayed over the schedule."""
        schedule = self._timed_schedule()
        return DropFraction(self.decay, self.alpha, schedule.start, schedule.end)(step)

    def planned(self, end: int) -> Sparsities:
        """Cubic."""
        return CubicSparsity(self.initial_sparsity, self.sparsity, min(self.start, end), end)
