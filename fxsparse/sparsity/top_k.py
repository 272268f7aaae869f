"""The one order rule: score descending, then flat index ascending."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError, DataError


def order_scores(scores: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Scores as they are compared: detached, at least float32, -0 as +0. Infinities are legal.

    Raises:
        DataError: a score is NaN or complex.
    """
    scores = scores.detach()
    if scores.is_complex():
        raise DataError(f"scores of `dtype` (={scores.dtype}) have no order; score their absolute values")
    if not scores.is_floating_point():
        return scores.to(torch.int64) if scores.dtype == torch.bool else scores
    ordered = scores.to(torch.promote_types(scores.dtype, torch.float32)) + 0.0
    if bool(ordered.sum().isnan()) and (nan := int(ordered.isnan().sum())):  # a sum is NaN for inf - inf, too
        raise DataError(f"{nan} of {ordered.numel()} scores are NaN; mend the weights or gradients that they come from")
    return ordered


def top_k(
    scores: Shaped[Tensor, "*shape"], k: int, candidates: Bool[Tensor, "*shape"] | None = None
) -> Bool[Tensor, "*shape"]:
    """The `k` best candidates: higher scores first, among ties the lower flat index.

    Args:
        scores: Any shape; compared in at least float32.
        k: Number of elements to pick, from 0 to the number of candidates.
        candidates: Where True may be; everywhere when None.

    Raises:
        ConfigError: there are fewer than `k` candidates.
        DataError: a score is NaN.
    """
    flat = None if candidates is None else candidates.reshape(1, -1)
    return segment_top_k(scores.reshape(1, -1), k, flat).reshape(scores.shape)


def segment_top_k(
    scores: Shaped[Tensor, "segments units"],
    counts: Tensor | int,
    candidates: Bool[Tensor, "segments units"] | None = None,
) -> Bool[Tensor, "segments units"]:
    """`top_k` in every row: row i gets exactly `counts[i]` True.

    Raises:
        ConfigError: a row has fewer candidates than its count.
        DataError: a score is NaN.
    """
    ordered = order_scores(scores)
    per_row = torch.as_tensor(counts, dtype=torch.int64, device=scores.device).expand(scores.shape[0])
    _check_counts(per_row, scores.shape[1], candidates)
    if scores.numel() == 0:
        return torch.zeros_like(ordered, dtype=torch.bool)
    low, high = (int(bound) for bound in per_row.aminmax())
    if candidates is not None and scores.shape[0] == 1:
        chosen = _common(ordered.masked_select(candidates)[None], low)[0]
        return torch.zeros_like(candidates).masked_scatter_(candidates, chosen)
    return _common(ordered, low) if candidates is None and low == high else _ranked(ordered, per_row, candidates)


def _check_counts(per_row: Tensor, width: int, candidates: Tensor | None) -> None:
    room = torch.full_like(per_row, width) if candidates is None else candidates.sum(1)
    bad = ((per_row < 0) | (per_row > room)).nonzero()
    if bad.numel():
        row = int(bad[0, 0])
        raise ConfigError(
            f"`k` (={int(per_row[row])}) must be from 0 to the candidates (={int(room[row])}) of segment {row}"
        )


def _common(ordered: Tensor, k: int) -> Tensor:
    """The same count in every row, without a sort where selection is exact and cheaper."""
    width = ordered.shape[1]
    if k in (0, width):
        return torch.full_like(ordered, k == width, dtype=torch.bool)
    if ordered.device.type != "cpu":  # kthvalue is not deterministic on accelerators
        return _ranked(ordered, torch.full_like(ordered[:, 0], k, dtype=torch.int64), None)
    kth = ordered.kthvalue(width - k + 1, dim=1, keepdim=True).values
    above, tied = ordered > kth, ordered == kth
    missing = k - above.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) == missing).all()):
        return above | tied
    return above | (tied & (tied.cumsum(1) <= missing))


def _ranked(ordered: Tensor, per_row: Tensor, candidates: Tensor | None) -> Tensor:
    """Any counts: a stable sort, then the first candidates of every row."""
    order = ordered.sort(dim=1, descending=True, stable=True).indices
    if candidates is None:
        chosen = torch.arange(ordered.shape[1], device=ordered.device) < per_row[:, None]
    else:
        alive = candidates.gather(1, order)
        chosen = alive & (alive.cumsum(1) <= per_row[:, None])
    return torch.zeros_like(chosen).scatter_(1, order, chosen)
