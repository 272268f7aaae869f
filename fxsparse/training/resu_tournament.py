"""Amnesty: the tournament in which trained dead units win places of alive ones, and what it did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from fxsparse.sparsity.counts import fraction_count
from fxsparse.sparsity.n_by_m import GroupUnits
from fxsparse.sparsity.top_k import segment_top_k
from fxsparse.sparsity.units import Units
from fxsparse.training.exchange import best_over_weight, of_weight
from fxsparse.training.records import UpdateReport
from fxsparse.training.state import WeightState


def candidates(
    units: Units, alive: Bool[Tensor, "segments width"], *, dense: bool = False
) -> Bool[Tensor, "segments width"]:
    """Dead units that a phase may train: all; under N:M those of groups with a free place, unless it ends `dense`."""
    dead = ~alive if units.valid is None else ~alive & units.valid.to(alive.device)
    if dense or not isinstance(units, GroupUnits):
        return dead
    free = alive.sum(1) < units.limits().to(alive.device)
    return dead & free[:, None]


def reserved(
    units: Units,
    budget: float,
    counts: Int64[Tensor, " segments"],
    scores: Shaped[Tensor, "segments width"],
    trained: Bool[Tensor, "segments width"],
) -> Int64[Tensor, " segments"]:
    """k_R of each segment: n(r, K) in each group of a shared support, else n(r, K) of the weight for its best trained.

    Args:
        units: The pattern's view of the weight.
        budget: r.
        counts: K of each segment.
        scores: Scores of W_eff.
        trained: T.
    """
    if units.segments == 1 or not of_weight(units):
        return torch.tensor([fraction_count(budget, count) for count in counts.tolist()], device=counts.device)
    quota, total = torch.zeros_like(counts), fraction_count(budget, int(counts.sum()))
    if isinstance(units, GroupUnits) and not units.exact:
        quota[0] = total  # `tournament` holds it over the whole weight
        return quota
    able = segment_top_k(scores, torch.minimum(counts, trained.sum(1)), trained)
    return best_over_weight(units, able, scores, min(total, int(able.sum()))).sum(1)


def tournament(
    units: Units,
    scores: Shaped[Tensor, "segments width"],
    alive: Bool[Tensor, "segments width"],
    trained: Bool[Tensor, "segments width"],
    counts: Int64[Tensor, " segments"],
    quota: Int64[Tensor, " segments"],
) -> Bool[Tensor, "segments width"]:
    """The winners: in each segment the best K - k_R alive units and the best k_R trained ones.

    Where a side has too few, the shortfall is filled from the trained, then from the alive, then from the other dead
    units by index. Each side's winners are a prefix of its order.

    Args:
        units: The pattern's view of the weight.
        scores: Scores of W_eff.
        alive: A, the units alive before.
        trained: T, the dead units that were trained.
        counts: K of each segment.
        quota: k_R of each segment.

    Raises:
        ConfigError: a segment has fewer than K units.
        DataError: a score is NaN.
    """
    if isinstance(units, GroupUnits) and not units.exact and int(counts.sum()) < units.numel:
        return _capped(units, scores, alive, trained, int(counts.sum()), int(quota.sum()))
    counts, quota = counts.to(alive.device), quota.to(alive.device)
    from_alive = torch.minimum(counts - quota, alive.sum(1))
    from_trained = torch.minimum(counts - from_alive, trained.sum(1))
    from_alive = torch.minimum(counts - from_trained, alive.sum(1))
    chosen = segment_top_k(scores, from_alive, alive) | segment_top_k(scores, from_trained, trained)
    missing = counts - from_alive - from_trained
    if not bool(missing.any()):
        return chosen
    rest = candidates_outside(units, alive | trained)
    return chosen | segment_top_k(torch.zeros_like(scores), missing, rest)


def candidates_outside(units: Units, taken: Tensor) -> Tensor:
    """Units that exist and are not taken."""
    return ~taken if units.valid is None else ~taken & units.valid.to(taken.device)


def _capped(units: GroupUnits, scores: Tensor, alive: Tensor, trained: Tensor, count: int, quota: int) -> Tensor:
    """The same over a whole N:M weight with at most n in each group."""
    chosen = torch.zeros_like(alive)
    limits = units.limits().to(alive.device)
    rest = candidates_outside(units, alive | trained)
    for side, most in ((alive, count - quota), (trained, quota), (trained, count), (alive, count), (rest, count)):
        scores = torch.zeros_like(scores) if side is rest else scores
        left = min(most, count - int(chosen.sum()))
        open_units = side & ~chosen
        room = torch.minimum((limits - chosen.sum(1)).clamp(min=0), open_units.sum(1))
        allowed = segment_top_k(scores, room, open_units)
        chosen = chosen | best_over_weight(units, allowed, scores, min(left, int(allowed.sum())))
    return chosen


def _like_alive(state: WeightState, count: int) -> float:
    """The norm of so many weights of the alive ones' size."""
    alive = state.weight[state.mask].double()
    return float(alive.norm()) * math.sqrt(count / max(1, alive.numel()))


@dataclass(frozen=True)
class ResuRecord:
    """One weight at one COMMIT, counted in elements.

    Attributes:
        step: Completed optimizer steps.
        cycle: Number of the cycle, from 0.
        name: Name of the weight.
        alive: Alive afterwards, |M*|.
        trained: Size of T.
        won: Resurrected: in T and alive afterwards.
        displaced: Alive before and dead afterwards.
        earlier: Resurrected by the COMMIT before.
        survived: How many of those are alive after this tournament.
        movement: mu = |theta_end - theta_start| / |theta_start| over T. From a start at zero it is the root mean square
            of theta_end over that of the alive weights. NaN where nothing was trained, infinite where nothing is alive.
        numel: Elements in all.
    """

    step: int
    cycle: int
    name: str
    alive: int
    trained: int
    won: int
    displaced: int
    earlier: int
    survived: int
    movement: float
    numel: int

    @staticmethod
    def of(state: WeightState, cycle: int, mask: Tensor, revived: Tensor, start: Tensor) -> ResuRecord:
        """The record of one weight.

        Args:
            state: The weight before the COMMIT, T in its memory as "trained".
            cycle: Number of the cycle.
            mask: M*.
            revived: What the COMMIT before resurrected.
            start: Theta as the phase began, the shape of the weight.
        """
        trained = state.memory["trained"]
        size = float(start[trained].double().norm()) or _like_alive(state, int(trained.sum()))
        moved = float((state.weight - start)[trained].double().norm())
        unmoved = 0.0 if bool(trained.any()) else math.nan
        return ResuRecord(
            step=state.step,
            cycle=cycle,
            name=state.name,
            alive=int(mask.sum()),
            trained=int(trained.sum()),
            won=int((trained & mask).sum()),
            displaced=int((state.mask & ~mask).sum()),
            earlier=int(revived.sum()),
            survived=int((revived & mask).sum()),
            movement=moved / size if size else math.inf if moved else unmoved,
            numel=mask.numel(),
        )

    @property
    def lost(self) -> int:
        """Trained and dead afterwards."""
        return self.trained - self.won

    @property
    def churn(self) -> float:
        """Fraction of the mask's elements that are new, (won + displaced) / 2 |M*|."""
        return (self.won + self.displaced) / (2 * self.alive) if self.alive else 0.0

    @property
    def survival(self) -> float:
        """Fraction of the units resurrected before that this tournament kept; NaN where there were none."""
        return self.survived / self.earlier if self.earlier else math.nan


@dataclass(frozen=True)
class ResuReport(UpdateReport):
    """As `UpdateReport`, with a record per COMMIT and weight; `print` shows the updates, then the resurrections.

    Attributes:
        resurrections: In order of steps and weights.
    """

    resurrections: tuple[ResuRecord, ...] = ()

    def __str__(self) -> str:
        head = (
            f"{'step':>8} {'cycle':>5} {'weight':<28} {'trained':>9} {'won':>8} {'displaced':>9} {'churn':>7} "
            f"{'survived':>15} {'mu':>8}"
        )
        lines = [
            f"{row.step:>8} {row.cycle:>5} {row.name:<28} {row.trained:>9} {row.won:>8} {row.displaced:>9} "
            f"{row.churn:>7.4f} {f'{row.survived} of {row.earlier}':>15} {row.movement:>8.3g}"
            for row in self.resurrections
        ]
        return "\n".join([super().__str__(), "", head, *lines])

    def cycles(self) -> Iterator[tuple[int, tuple[ResuRecord, ...]]]:
        """The records of each cycle."""
        for cycle in dict.fromkeys(row.cycle for row in self.resurrections):
            yield cycle, tuple(row for row in self.resurrections if row.cycle == cycle)
