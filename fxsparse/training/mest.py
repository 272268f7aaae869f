"""MEST: elastic mutation, with or without a soft memory bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction
from fxsparse.sparsity.saliency import Magnitude, MagnitudeAndGradient, Saliency
from fxsparse.sparsity.schedule import Phases
from fxsparse.training.elastic import Elastic
from fxsparse.training.updater import resolved_step


@dataclass(frozen=True)
class MEST(Elastic):
    """Memory-economic sparse training (Yuan et al., arXiv 2110.14032): at each event some go, others come at random.

    EM prunes to sparsity s + p and grows back to s at once, EM&S (`soft`) prunes to s and grows to s - p. p falls in
    phases, the last one has p = 0.

    Attributes:
        p: The extra fraction of each phase; the last must be 0.
        boundaries: Steps at which phases end, one fewer than phases; None = `boundary_fractions` of the training.
        boundary_fractions: `boundaries` as shares of the whole training.
        gradient: Factor lambda of |G| in the drop score |w| + lambda |G|; G as the optimizer was given it.
    """

    p: tuple[float, ...] = (0.02, 0.01, 0.0)
    boundaries: tuple[int, ...] | None = None
    boundary_fractions: tuple[float, ...] = (0.5625, 0.75)
    gradient: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for extra in self.p:
            check_fraction(extra, "p")
        if not self.p or self.p[-1] != 0:
            raise ConfigError(f"`p` (={self.p}) must end in 0: the training ends at the target sparsity")
        if not self.gradient >= 0:
            raise ConfigError(f"`gradient` (={self.gradient}) must be at least 0")
        self.extra(0)

    @property
    def drop(self) -> Saliency:
        """|w| + lambda |G|."""
        return MagnitudeAndGradient(self.gradient) if self.gradient else Magnitude()

    def timed(self, total_steps: int | None) -> Self:
        """`boundaries` in steps too; see `Periodic`."""
        ends = self.boundaries
        if ends is None:
            ends = tuple(resolved_step(self, share, total_steps, "boundaries") for share in self.boundary_fractions)
        return replace(super().timed(total_steps), boundaries=ends)

    def extra(self, step: int) -> float:
        """P of the phase."""
        return Phases(self.p, self.boundary_fractions if self.boundaries is None else self.boundaries)(step)
