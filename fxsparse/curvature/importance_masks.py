"""Shares, masks and directions by a Fisher: exact counts, ties by the one order rule."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from fxsparse.curvature.arguments import check_axis
from fxsparse.curvature.damage_tensors import Tensors, check_tensors, checked, pooled
from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction, fraction_count
from fxsparse.sparsity.quantile import exact_threshold
from fxsparse.sparsity.top_k import top_k


class Scope(enum.Enum):
    """Within what a fraction is counted."""

    GLOBAL = "global"
    """All entries of all parameters together, in the mapping's order."""
    TENSOR = "tensor"
    """Each parameter's own."""


@dataclass(frozen=True, eq=False)
class TopDirections:
    """The largest entries of a Fisher.

    Attributes:
        entries: (parameter, flat index) of each, the largest first.
        values: Their Fisher.
        share: Their share of the whole Fisher; 0 where that is 0.
    """

    entries: tuple[tuple[str, int], ...]
    values: Float64[Tensor, " k"]
    share: float


def fisher_importance(fisher: Tensors) -> dict[str, Float64[Tensor, "*shape"]]:
    """Each entry's share F / sum F; all shares add up to 1 (to 0 where every Fisher is 0).

    Raises:
        ConfigError: no entry.
        DataError: a Fisher is negative or not finite.

    >>> fisher_importance({"w": torch.tensor([3.0, 1.0])})["w"]
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    total = float(pooled(fisher).sum())
    return {name: checked(name, each) / (total or 1.0) for name, each in fisher.items()}


def fisher_pruning_masks(
    fisher: Tensors, sparsity: float, scope: Scope | str = Scope.GLOBAL, *, axis: int | None = None
) -> dict[str, Bool[Tensor, "*shape"]]:
    """Masks that prune exactly floor(s n + 1e-6) entries, the smallest Fishers, of equals the last ones first.

    Args:
        fisher: By parameter name.
        sparsity: The fraction to prune, in [0, 1].
        scope: Whether it is counted over all parameters or in each.
        axis: Prune whole slices along this axis by their sums, such as 0 for output channels; n counts slices then.

    Raises:
        ConfigError: an option out of range, a tensor without that axis, or no tensors.
        DataError: a Fisher is negative or not finite.

    >>> int(fisher_pruning_masks({"w": torch.ones(4)}, 0.5)["w"].sum())
    2
    """
    check_fraction(sparsity, "sparsity")
    check_tensors(fisher, "fisher")
    if not fisher:
        raise ConfigError("`fisher` (=empty) must have at least one entry")
    try:
        where = Scope(scope)
    except ValueError:
        raise ConfigError(f"`scope` (={scope!r}) must be global or tensor") from None
    scores = {name: _scored(name, each, axis) for name, each in fisher.items()}
    if where is Scope.TENSOR:
        found = {n: top_k(s, s.numel() - fraction_count(sparsity, s.numel())) for n, s in scores.items()}
    else:
        threshold = exact_threshold(lambda: iter(scores.values()), fraction=sparsity, dtype=torch.float64)
        found = dict(zip(scores, threshold.masks(scores.values()), strict=True))
    return {name: _spread(mask, fisher[name], axis) for name, mask in found.items()}


def top_fisher_directions(fisher: Tensors, k: int) -> TopDirections:
    """The k largest entries of all parameters together; of equals the first.

    Raises:
        ConfigError: k is not from 1 to the number of entries.
        DataError: a Fisher is negative or not finite.

    >>> found = top_fisher_directions({"w": torch.tensor([5.0, 1.0, 4.0])}, 2)
    >>> found.entries, found.share
    ((('w', 0), ('w', 2)), 0.9)
    """
    values = pooled(fisher)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= values.numel():
        raise ConfigError(f"`k` (={k!r}) must be an integer from 1 to the {values.numel()} entries")
    chosen = top_k(values, k).nonzero()[:, 0]
    order = values[chosen].sort(descending=True, stable=True).indices
    index = chosen[order]
    total = float(values.sum())
    share = float(values[index].sum()) / total if total else 0.0
    return TopDirections(_named(fisher, index), values[index], share)


def _named(fisher: Tensors, index: Int64[Tensor, " k"]) -> tuple[tuple[str, int], ...]:
    names = list(fisher)
    ends = torch.tensor([each.numel() for each in fisher.values()]).cumsum(0)
    owners = torch.searchsorted(ends, index, right=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return tuple((names[o], i - int(starts[o])) for o, i in zip(owners.tolist(), index.tolist(), strict=True))


def _scored(name: str, fisher: Tensor, axis: int | None) -> Float64[Tensor, " ..."]:
    wide = checked(name, fisher)
    if axis is None:
        return wide
    check_axis(axis, wide, name)
    return wide.movedim(axis, 0).reshape(wide.shape[axis], -1).sum(1)


def _spread(mask: Tensor, like: Tensor, axis: int | None) -> Bool[Tensor, "*shape"]:
    if axis is None:
        return mask
    shape = [1] * like.ndim
    shape[axis] = -1
    return mask.reshape(shape).expand(like.shape).clone()
