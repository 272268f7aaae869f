"""What all drop-and-grow methods share: when alive weights are exchanged, and how many."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.schedule import DropFraction, DropKind, UpdateSteps
from fxsparse.training.grown import GrownValue, Zero
from fxsparse.training.updater import NEVER, Method, resolved_step


@dataclass(frozen=True)
class Periodic(Method):
    """Every `every` steps some alive units are dropped and others grow.

    Attributes:
        every: Steps between updates.
        start: First step that may update.
        end: Step from which masks stay; None = `end_fraction` of the training.
        regrow_dropped: Whether a weight may be dropped and grown in the same update.
        grown: The first value of a grown weight.
        end_fraction: `end` as a share of the whole training, in [0, 1]; at 1 updates go on for as long as it lasts.
    """

    every: int = 100
    start: int = 0
    end: int | None = None
    regrow_dropped: bool = True
    grown: GrownValue = Zero()
    end_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.end_fraction, "end_fraction")
        self._steps()

    def timed(self, total_steps: int | None) -> Self:
        """`end` in steps; without it and the length of the training updates go on for ever.

        Raises:
            ConfigError: `end` is a share of the training and nobody says how long that is.
        """
        if self.end is not None:
            return self
        endless = total_steps is None and self.end_fraction == 1
        return replace(self, end=NEVER if endless else resolved_step(self, self.end_fraction, total_steps))

    def check(self, pattern: Pattern) -> None:
        """Every exchange needs a count to conserve."""
        if getattr(pattern, "exact", True) is False:
            raise ConfigError(f"{pattern} has no count per group that an exchange could conserve; use exact=True")

    def update_due(self, step: int) -> bool:
        """Every `every` steps before `end`."""
        return self._steps()(step)

    def _steps(self) -> UpdateSteps:
        return UpdateSteps(self.every, self.start, NEVER if self.end is None else self.end)


@dataclass(frozen=True)
class DropGrow(Periodic):
    """A fraction of the alive units is exchanged; their count stays.

    Attributes:
        alpha: Fraction of alive units exchanged at `start`, in [0, 1].
        decay: How the fraction falls from `start` to `end`.
    """

    alpha: float = 0.3
    decay: DropKind = DropKind.CONSTANT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.alpha, "alpha")

    def timed(self, total_steps: int | None) -> Self:
        """See `Periodic`.

        Raises:
            ConfigError: the fraction decays and nobody says until when.
        """
        timed = super().timed(total_steps)
        if timed.end == NEVER and self.decay is not DropKind.CONSTANT:
            name = type(self).__name__
            raise ConfigError(f"`decay` (={self.decay}) needs an end: give attach `total_steps`, or {name} an `end`")
        return timed

    def drop_fraction(self, step: int) -> float:
        """`alpha`, decayed."""
        return DropFraction(self.decay, self.alpha, self.start, NEVER if self.end is None else self.end)(step)
