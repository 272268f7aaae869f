"""Single weights removed where the rows lose least, row by row with a support of its own."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from fxsparse.curvature.compensate_solve import inverse, obs_scores, of_equal_size


def best_of_segments(
    scores: Shaped[Tensor, "rows columns"],
    segment: Int64[Tensor, "rows columns"],
    counts: Int64[Tensor, " segments"],
) -> Bool[Tensor, "rows columns"]:
    """The `counts[i]` elements of highest score in segment i; among equals the lower index. -inf is never taken.

    Args:
        scores: A score of each element.
        segment: The segment of each element, from 0 on.
        counts: How many each segment keeps.
    """
    of = segment.flatten()
    ranked = scores.flatten().sort(descending=True, stable=True).indices
    ranked = ranked[of[ranked].sort(stable=True).indices]  # by segment, the best first
    sizes = of.bincount(minlength=len(counts))
    rank = torch.arange(len(of), device=of.device) - (sizes.cumsum(0) - sizes)[of[ranked]]
    alive = torch.zeros(len(of), dtype=torch.bool, device=of.device)
    alive[ranked[rank < counts[of[ranked]]]] = True
    return alive.reshape(scores.shape) & (scores > -torch.inf)


def eliminate_elements(
    weight: Float64[Tensor, "rows n"],
    gram: Float64[Tensor, "classes n n"],
    of_row: Int64[Tensor, " rows"],
    segment: Int64[Tensor, "rows n"],
    counts: Int64[Tensor, " segments"],
    rounds: int,
) -> Bool[Tensor, "rows n"]:
    """The mask in which segment i keeps `counts[i]` elements, removed a few at a time where their row loses least.

    In every round the costs w_q^2 / (2 [H^-1]_qq) are those of the compensated row, with H on what is still alive; the
    numbers fall by a constant factor. A round factors one matrix for each row.

    Args:
        weight: The rows.
        gram: H, positive definite.
        of_row: Class of every row.
        segment: Which elements compete: one segment for a whole weight, one a row, one a group of m.
        counts: Elements that each segment keeps.
        rounds: Rounds of removal.

    Raises:
        DataError: a matrix is not positive definite.
    """
    sizes = segment.flatten().bincount(minlength=len(counts))
    alive = torch.ones_like(weight, dtype=torch.bool)
    costs = obs_scores(weight, inverse(gram), of_row)
    target = torch.empty_like(weight)
    for place, matrix in enumerate(gram):
        target[of_row == place] = weight[of_row == place] @ matrix
    for number in range(1, rounds + 1):
        share = (sizes * (counts / sizes.clamp(min=1)) ** (number / rounds)).round().long()
        now = counts if number == rounds else torch.maximum(counts, share)
        kept = best_of_segments(costs, segment, now)
        if number < rounds and not torch.equal(kept, alive):
            costs = _costs(target, gram, of_row, kept)
        alive = kept
    return alive


def _costs(target: Tensor, gram: Tensor, of_row: Tensor, alive: Tensor) -> Float64[Tensor, "rows n"]:
    """Costs of the alive elements of compensated rows, -inf elsewhere; `target` is w H."""
    costs = torch.full_like(target, -torch.inf)
    sizes = alive.sum(1)
    for rows in of_equal_size(sizes):
        k = int(sizes[rows].max())
        if k == 0:
            continue
        places = alive[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
        real = torch.arange(k, device=places.device) < sizes[rows][:, None]
        matrices = gram[of_row[rows][:, None, None], places[:, :, None], places[:, None, :]]
        both = real[:, :, None] & real[:, None, :]
        inverses = inverse(torch.where(both, matrices, torch.diag_embed((~real).to(gram.dtype))))
        wanted = torch.where(real, target[rows].gather(1, places), 0.0)
        now = (inverses @ wanted[..., None])[..., 0]
        found = now.square() / (2 * inverses.diagonal(dim1=1, dim2=2))
        costs[rows] = costs[rows].scatter(1, places, torch.where(real, found, -torch.inf))
    return costs
