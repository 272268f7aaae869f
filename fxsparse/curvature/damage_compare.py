"""Comparing tasks by their Fishers, and masks by their overlap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fxsparse.curvature.arguments import shown
from fxsparse.curvature.damage_tensors import Tensors, check_tensors, pooled
from fxsparse.errors import ConfigError
from fxsparse.sparsity import Mask
from fxsparse.sparsity.counts import check_fraction, fraction_count
from fxsparse.sparsity.top_k import top_k


@dataclass(frozen=True)
class Overlap:
    """How much two masks share; the masks of several weights count as one.

    Attributes:
        jaccard: Shared over either, |A and B| / |A or B|; 1 where both are empty.
        dice: 2 |A and B| / (|A| + |B|); 1 where both are empty.
        coefficient: |A and B| / min(|A|, |B|); 1 where either is empty.
        chance: The Jaccard of two independent masks of these densities a and b: a b / (a + b - a b).
        densities: a and b.
    """

    jaccard: float
    dice: float
    coefficient: float
    chance: float
    densities: tuple[float, float]


@dataclass(frozen=True)
class TaskComparison:
    """Likeness of two Fishers over all shared entries pooled.

    Attributes:
        cosine: Of the vectors.
        pearson: Of the vectors, centred; 0 where one is constant.
        spearman: Of the average ranks; 0 where one is constant.
        overlap: Of the sets of the largest entries.
        bhattacharyya: sum sqrt(F_A F_B) of the Fishers with sum 1; 1 for proportional ones.
    """

    cosine: float
    pearson: float
    spearman: float
    overlap: Overlap
    bhattacharyya: float


def mask_overlap(a: Mapping[str, Tensor | Mask] | Tensor, b: Mapping[str, Tensor | Mask] | Tensor) -> Overlap:
    """Jaccard and related shares of two masks, with the level that chance alone would reach.

    Raises:
        ConfigError: other names or shapes, or no bool tensors.

    >>> A, B = torch.zeros(2, 10, dtype=torch.bool)
    >>> A[1:4], B[2:5] = True, True
    >>> mask_overlap(A, B).jaccard
    0.5
    """
    first_shapes, second_shapes = _shapes(a, "a"), _shapes(b, "b")
    for name in sorted({*first_shapes, *second_shapes}):
        if first_shapes.get(name) != second_shapes.get(name):
            shapes = f"{first_shapes.get(name, 'missing')} and {second_shapes.get(name, 'missing')}"
            raise ConfigError(f"masks `{name}` (={shapes}) do not match; compare the same weights")
    one, other = _flat(a), _flat(b)
    shared, either = int((one & other).sum()), int((one | other).sum())
    first, second, size = int(one.sum()), int(other.sum()), max(one.numel(), 1)
    p, q = first / size, second / size
    return Overlap(
        jaccard=shared / either if either else 1.0,
        dice=2 * shared / (first + second) if either else 1.0,
        coefficient=shared / min(first, second) if min(first, second) else 1.0,
        chance=p * q / (p + q - p * q) if either else 1.0,
        densities=(p, q),
    )


def compare_task_fisher(a: Tensors, b: Tensors, share: float = 0.1) -> TaskComparison:
    """Compare two Fishers over the names that both have, every entry with equal weight.

    Args:
        a: By name.
        b: By name.
        share: Size of the sets of largest entries that are compared, in (0, 1].

    Raises:
        ConfigError: no shared name, other shapes, or a share out of range.
        DataError: a value is negative or not finite.
    """
    check_fraction(share, "share")
    check_tensors(a, "a")
    check_tensors(b, "b")
    names = [name for name in a if name in b]
    for name in names:
        if a[name].shape != b[name].shape:
            raise ConfigError(f"`{name}` has shapes {tuple(a[name].shape)} and {tuple(b[name].shape)}")
    if not names or not share:
        raise ConfigError(f"`share` (={share}) must be positive and the Fishers must share names (={len(names)})")
    x, y = pooled({name: a[name] for name in names}), pooled({name: b[name] for name in names})
    k = max(fraction_count(share, x.numel()), 1)
    totals = float(x.sum()), float(y.sum())
    alike = float((x.sqrt() * y.sqrt()).sum()) / (totals[0] ** 0.5 * totals[1] ** 0.5) if all(totals) else 0.0
    return TaskComparison(
        cosine=_cosine(x, y),
        pearson=_cosine(x - x.mean(), y - y.mean()),
        spearman=spearman(x, y),
        overlap=mask_overlap(top_k(x, k), top_k(y, k)),
        bhattacharyya=alike,
    )


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation, equal values at their average rank; 0 where one side is constant."""
    first, second = _ranks(x), _ranks(y)
    return _cosine(first - first.mean(), second - second.mean())


def _ranks(x: Tensor) -> Float[Tensor, " n"]:
    _, inverse, counts = torch.unique(x.double(), sorted=True, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0).double() - (counts.double() - 1) / 2
    found: Tensor = ranks[inverse]
    return found


def _cosine(x: Tensor, y: Tensor) -> float:
    norms = float(x.norm()) * float(y.norm())
    return float(x @ y) / norms if norms else 0.0


def _shapes(mask: Mapping[str, Tensor | Mask] | Tensor, what: str) -> dict[str, tuple[int, ...]]:
    given = {"": mask} if isinstance(mask, Tensor) else mask
    if not isinstance(given, Mapping) or not all(isinstance(each, Tensor | Mask) for each in given.values()):
        raise ConfigError(f"`{what}` (={shown(mask)}) must be a mask, or a mapping of names to masks")
    return {name: tuple((each.tensor if isinstance(each, Mask) else each).shape) for name, each in given.items()}


def _flat(mask: Mapping[str, Tensor | Mask] | Tensor) -> Tensor:
    given = {"": mask} if isinstance(mask, Tensor) else {name: mask[name] for name in sorted(mask)}
    parts = [each.tensor if isinstance(each, Mask) else each for each in given.values()]
    for each in parts:
        if each.dtype is not torch.bool:
            raise ConfigError(f"a mask of `dtype` (={each.dtype}) must be torch.bool; compare your values to make one")
    return torch.cat([each.reshape(-1).cpu() for each in parts]) if parts else torch.zeros(0, dtype=torch.bool)
