"""One exchange with the same number of inputs for every unit, in which units can be ablated and revived."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from fxsparse.sparsity.counts import fraction_count
from fxsparse.sparsity.fan_in import RowUnits
from fxsparse.sparsity.top_k import segment_top_k, top_k
from fxsparse.training.exchange import best_over_weight


def ablate(
    units: RowUnits,
    alive: Bool[Tensor, "rows fan_in"],
    drop: Shaped[Tensor, "rows fan_in"],
    grow: Shaped[Tensor, "rows fan_in"],
    fraction: float,
    budget: int,
    gamma: float,
) -> Bool[Tensor, "rows fan_in"]:
    """The seven steps of one tensor; numbers as in the algorithm of arXiv 2305.02299.

    Args:
        units: The rows.
        alive: Alive weights.
        drop: Scores by which alive weights are kept.
        grow: Scores by which weights grow.
        fraction: Drop fraction f in (0, 1].
        budget: K, the alive weights that the rows share.
        gamma: Rows with fewer than gamma k salient weights are ablated, k the present fan-in.
    """
    had, k = int(alive.sum()), int(alive.sum(1).max())
    exchanged = min(fraction_count(fraction, had), int((~alive).sum()))  # 1
    kept = best_over_weight(units, alive, drop, had - exchanged)
    salient = (kept | best_over_weight(units, ~alive, grow, exchanged)).sum(1)  # 2
    fewest = -(-budget // units.width)
    active = salient >= max(1, fraction_count(gamma, k))  # 3
    if int(active.sum()) < fewest:
        active = top_k(salient, fewest)
    fan_in = min(units.width, budget // int(active.sum()))  # 4
    candidates = alive & active[:, None]
    kept = best_over_weight(units, candidates, drop, min(had - exchanged, int(candidates.sum())))  # 5
    kept = segment_top_k(drop, kept.sum(1).clamp(max=fan_in), kept)  # 6
    missing = torch.where(active, fan_in - kept.sum(1), 0)
    return kept | segment_top_k(grow, missing, ~kept)  # 7
