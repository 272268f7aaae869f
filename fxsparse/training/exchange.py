"""One exchange on one weight: drop the worst alive units, grow the best of the others."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from fxsparse.sparsity.counts import fraction_count
from fxsparse.sparsity.fan_in import RowUnits
from fxsparse.sparsity.n_by_m import GroupUnits
from fxsparse.sparsity.shared_support import SupportUnits
from fxsparse.sparsity.top_k import segment_top_k, top_k
from fxsparse.sparsity.units import Units


def exchange(
    units: Units,
    alive: Bool[Tensor, "segments width"],
    drop: Shaped[Tensor, "segments width"],
    grow: Shaped[Tensor, "segments width"],
    fraction: float = 0.0,
    *,
    dropped: int | None = None,
    target: Int64[Tensor, " segments"] | None = None,
    regrow_dropped: bool = True,
) -> Bool[Tensor, "segments width"]:
    """The alive units after one exchange.

    With A units alive and k = floor(f A + 1e-6): keep is the top-(A - k) of `drop` among the alive units, and each
    segment grows back the units that it lost, the best by `grow` outside keep. Patterns with a count per segment stay
    legal: `SharedSupport` drops n(f, k) positions in each group, N:M and constant fan-in drop over the whole weight.

    Args:
        units: The pattern's view of the weight.
        alive: Units that are alive.
        drop: Scores of the units, the lowest are dropped first.
        grow: Scores of the units, the highest are grown first.
        fraction: Drop fraction f in [0, 1].
        dropped: k where it is not n(f, A): over the whole weight, in each group of a `SharedSupport`.
        target: Units that each segment must have afterwards; as many as before by default.
        regrow_dropped: Whether a unit may be dropped and grown in the same exchange; otherwise k is at most the
            number of dead units.

    Returns:
        A new tensor; equal to `alive` when nothing is dropped and the target is what is alive.

    Raises:
        ConfigError: a segment cannot reach its target.
        DataError: a score is NaN.
    """
    had = alive.sum(1)
    wanted = had if target is None else target.to(alive.device)
    dead = ~alive if units.valid is None else ~alive & units.valid.to(alive.device)
    lost = _losses(units, alive, dead, drop, fraction, dropped, regrow_dropped)
    keep = segment_top_k(drop, torch.minimum(had - lost, wanted), alive)
    if bool((keep.sum(1) == wanted).all()):
        return keep
    return keep | segment_top_k(grow, wanted - keep.sum(1), dead | (alive & ~keep) if regrow_dropped else dead)


def _losses(
    units: Units, alive: Tensor, dead: Tensor, drop: Tensor, fraction: float, dropped: int | None, regrow: bool
) -> Tensor:
    """Units that each segment drops, int64 [segments]."""
    had, room = alive.sum(1), dead.sum(1)
    if not of_weight(units):
        counts = [fraction_count(fraction, n) if dropped is None else min(dropped, n) for n in had.tolist()]
        lost = torch.tensor(counts, device=alive.device)
    else:
        total = int(had.sum())
        k = fraction_count(fraction, total) if dropped is None else dropped
        k = k if regrow else min(k, int(room.sum()))
        if units.segments == 1:
            lost = torch.full_like(had, min(k, total))
        else:
            lost = had - best_over_weight(units, alive, drop, total - k).sum(1)
    return lost if regrow else torch.minimum(lost, room)


def of_weight(units: Units) -> bool:
    """Whether units are dropped over the whole weight, not in each segment (a group of a shared support) for itself."""
    return not isinstance(units, SupportUnits)


def best_over_weight(
    units: Units, candidates: Bool[Tensor, "segments width"], scores: Shaped[Tensor, "segments width"], count: int
) -> Bool[Tensor, "segments width"]:
    """The best candidates of the weight; ties go to the lower flat index of the weight, not of the unit matrix.

    Raises:
        ConfigError: there are fewer candidates than `count`.
        DataError: a score is NaN.
    """
    if not isinstance(units, (GroupUnits, RowUnits)):
        return top_k(scores, count, candidates)
    flat = units.pool(torch.arange(units.numel, device=scores.device).reshape(units.shape)).flatten()
    order = flat.argsort(stable=True)
    best = torch.zeros_like(candidates).flatten()
    best[order] = top_k(scores.flatten()[order], count, candidates.flatten()[order])
    return best.reshape(candidates.shape)
