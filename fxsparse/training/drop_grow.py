"""What all drop-and-grow methods share: when alive weights are exchanged, and how many."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.schedule import DropFraction, DropKind, UpdateSteps
from fxsparse.training.grown import GrownValue, Zero
from fxsparse.training.updater import NEVER, Method


@dataclass(frozen=True)
class Periodic(Method):
    """Every `every` steps some alive units are dropped and others grow.

    Attributes:
        every: Steps between updates.
        start: First step that may update.
        end: Step from which masks stay; None = the end of the training.
        regrow_dropped: Whether a weight may be dropped and grown in the same update.
        grown: The first value of a grown weight.
    """

    every: int = 100
    start: int = 0
    end: int | None = None
    regrow_dropped: bool = True
    grown: GrownValue = Zero()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps()

    def timed(self, total_steps: int | None) -> Self:
        """`end` is the last step; without it updates go on for ever."""
        return replace(self, end=(NEVER if total_steps is None else total_steps) if self.end is None else self.end)

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
        if self.end is None and total_steps is None and self.decay is not DropKind.CONSTANT:
            name = type(self).__name__
            raise ConfigError(f"`decay` (={self.decay}) needs an end: give attach `total_steps`, or {name} an `end`")
        return super().timed(total_steps)

    def drop_fraction(self, step: int) -> float:
        """`alpha`, decayed."""
        return DropFraction(self.decay, self.alpha, self.start, NEVER if self.end is None else self.end)(step)
