"""Which dead units are trained in a RESU phase."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count, check_fraction, fraction_count
from fxsparse.sparsity.saliency import Saliency
from fxsparse.sparsity.units import Units
from fxsparse.training.exchange import best_over_weight
from fxsparse.training.resu_tournament import candidates
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class Subset(abc.ABC):
    """Which dead units are trained in a phase; the others hold 0 and cannot win the tournament."""

    needs_gradient: ClassVar[bool] = False

    def scores(self, state: WeightState) -> Float[Tensor, "segments width"] | None:
        """What `chosen` may rank by: |G|, pooled, where it needs that."""
        given = state.gradient if self.needs_gradient else None
        return None if given is None else state.pooled(given.abs())

    @abc.abstractmethod
    def chosen(self, subject: Subject) -> Bool[Tensor, "segments width"]:
        """T, a subset of the candidates, in units of the pattern."""


@dataclass(frozen=True)
class Subject:
    """What a subset is chosen by.

    Attributes:
        units: The pattern's view of the weight.
        candidates: Dead units that may be trained.
        scores: What the subset's `scores` gave: |G| of the effective batch at whose end the phase begins, pooled.
        draws: U(0, 1), float64.
        phase: Number of the phase, from 0.
    """

    units: Units
    candidates: Bool[Tensor, "segments width"]
    scores: Float[Tensor, "segments width"]
    draws: Float[Tensor, "segments width"]
    phase: int

    def best(self, scores: Tensor, fraction: float) -> Tensor:
        """The top-max(1, n(fraction, p)) of the p candidates."""
        count = int(self.candidates.sum())
        most = min(max(1, fraction_count(fraction, count)), count)
        return best_over_weight(self.units, self.candidates, scores, most)


@dataclass(frozen=True)
class AllDead(Subset):
    """Every dead unit."""

    def chosen(self, subject: Subject) -> Tensor:
        """The candidates."""
        return subject.candidates.clone()


@dataclass(frozen=True)
class TopGradient(Subset):
    """MAGNITUDE: the `fraction` with the largest |G|.

    Attributes:
        fraction: alpha.
    """

    fraction: float = 0.2
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction(self.fraction, "fraction")

    def chosen(self, subject: Subject) -> Tensor:
        """The best by |G|."""
        return subject.best(subject.scores, self.fraction)


@dataclass(frozen=True)
class TopSaliency(Subset):
    """Those of the best scores by any saliency, such as `NewtonGain`.

    Attributes:
        by: The saliency, of dead weights.
        fraction: alpha.
    """

    by: Saliency
    fraction: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.by, Saliency):
            raise ConfigError(f"`by` (={self.by!r}) must be a Saliency")
        check_fraction(self.fraction, "fraction")
        object.__setattr__(self, "needs_gradient", self.by.needs_gradient)

    def scores(self, state: WeightState) -> Tensor:
        """The saliency's, pooled."""
        return state.scores(self.by)

    def chosen(self, subject: Subject) -> Tensor:
        """The best."""
        return subject.best(subject.scores, self.fraction)


@dataclass(frozen=True)
class AboveQuantile(Subset):
    """THRESHOLD: those above the q-quantile of |G|, an exact count whatever the ties.

    Attributes:
        quantile: q; the fraction is 1 - q.
    """

    quantile: float = 0.8
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction(self.quantile, "quantile")

    def chosen(self, subject: Subject) -> Tensor:
        """The best by |G|."""
        return subject.best(subject.scores, 1 - self.quantile)


@dataclass(frozen=True)
class RandomDead(Subset):
    """RANDOM: a `fraction` drawn anew in each phase.

    Attributes:
        fraction: alpha.
    """

    fraction: float = 0.2

    def __post_init__(self) -> None:
        check_fraction(self.fraction, "fraction")

    def chosen(self, subject: Subject) -> Tensor:
        """A random subset of exact size."""
        return subject.best(subject.draws, self.fraction)


@dataclass(frozen=True)
class CyclicDead(Subset):
    """CYCLIC: the i-th dead unit is trained in the phases equal to i modulo `period`.

    Attributes:
        period: Phases until all dead units had their turn.
    """

    period: int = 5

    def __post_init__(self) -> None:
        check_count(self.period, "period", 1)

    def chosen(self, subject: Subject) -> Tensor:
        """Every period-th candidate."""
        index = subject.candidates.flatten().cumsum(0).reshape(subject.candidates.shape) - 1
        return subject.candidates & (index % self.period == subject.phase % self.period)


def trained_units(subset: Subset, state: WeightState, phase: int, *, dense: bool = False) -> Bool[Tensor, "*shape"]:
    """T of one weight as a phase begins, the shape of the weight.

    Args:
        subset: The rule.
        state: The weight, with G of the effective batch at whose end the phase begins where the rule needs it.
        phase: Number of the phase, from 0.
        dense: Whether the phase ends in a dense weight, in which every unit has a place.
    """
    free = candidates(state.units, state.alive, dense=dense)
    if not bool(free.any()):
        return torch.zeros_like(state.mask)
    draws = state.draws("subset").to(free.device)
    scores = subset.scores(state)
    ranked = torch.zeros_like(draws) if scores is None else scores
    return state.units.spread(subset.chosen(Subject(state.units, free, ranked, draws, phase)))
