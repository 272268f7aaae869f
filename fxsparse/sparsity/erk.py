"""Erdős–Rényi–Kernel densities and exact rounding of budgets."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import dead_count


@dataclass(frozen=True)
class ERKSolution:
    """Fixed point of the ERK rule.

    Attributes:
        epsilon: Common factor; density is epsilon p_l where a tensor is not dense. 0 when all are dense.
        dense: Indices of the dense tensors, in order.
        densities: Real-valued density of each tensor.
        alive: Alive elements of each tensor; they sum to the exact total.
    """

    epsilon: float
    dense: tuple[int, ...]
    densities: tuple[float, ...]
    alive: tuple[int, ...]


def erk_probability(shape: Sequence[int], power: float = 1.0, kernel: bool = True) -> float:
    """The factor p = (sum of dims / product of dims)^power; without `kernel` of the first two dims only (plain ER)."""
    dims = shape if kernel else shape[:2]
    return float((sum(dims) / math.prod(dims)) ** power)


def solve_erk(
    shapes: Sequence[Sequence[int]],
    sparsity: float,
    power: float = 1.0,
    forced_dense: Sequence[int] = (),
    kernel: bool = True,
) -> ERKSolution:
    """Densities d_l = epsilon p_l, at most 1, that meet the sparsity over all tensors (arXiv 1911.11134).

    While some density exceeds 1, all tensors that attain the largest p become dense and epsilon is solved again.

    Args:
        shapes: Shapes of the tensors, in order.
        sparsity: Dead fraction of all elements together, in [0, 1).
        power: Exponent of p_l.
        forced_dense: Indices of tensors to keep dense.
        kernel: Whether kernel dims enter p_l.

    Raises:
        ConfigError: the forced dense tensors alone exceed the budget.
    """
    sizes = [math.prod(shape) for shape in shapes]
    p = [erk_probability(shape, power, kernel) for shape in shapes]
    dead = [dead_count(n, sparsity) for n in sizes]
    total = sum(sizes) - sum(dead)
    forced = set(forced_dense)
    left = total - sum(sizes[i] for i in forced)
    if left < len(sizes) - len(forced):
        raise ConfigError(
            f"`dense` tensors use up the budget: `sparsity` (={sparsity}) leaves {left} alive elements for the "
            f"{len(sizes) - len(forced)} other tensors; lower the sparsity or keep fewer tensors dense"
        )
    epsilon, dense = 0.0, set(forced) if any(dead) else set(range(len(sizes)))
    while sparse := [i for i in range(len(sizes)) if i not in dense]:
        budget = sum(sizes[i] - dead[i] for i in sparse) - sum(dead[i] for i in dense)
        epsilon = budget / sum(p[i] * sizes[i] for i in sparse)
        largest = max(p[i] for i in sparse)
        if epsilon * largest <= 1.0:
            break
        dense |= {i for i in sparse if p[i] == largest}
    densities = tuple(1.0 if i in dense else epsilon * p[i] for i in range(len(sizes)))
    shares = [d * n for d, n in zip(densities, sizes, strict=True)]
    alive = at_least_one(round_to_total(shares, total, sizes), forced)
    return ERKSolution(epsilon if sparse else 0.0, tuple(sorted(dense)), densities, tuple(alive))


def round_to_total(shares: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """Largest-remainder rounding of `shares` to integers of sum `total`, none above its cap; ties to the lower index.

    Raises:
        ConfigError: the caps do not hold the total.
    """
    if not 0 <= total <= sum(caps):
        raise ConfigError(f"`total` (={total}) must be from 0 to the sum of the caps (={sum(caps)})")
    counts = [min(math.floor(share), cap) for share, cap in zip(shares, caps, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - shares[i], i))
    missing = total - sum(counts)
    while missing > 0:
        room = [i for i in by_remainder if counts[i] < caps[i]][:missing]
        for i in room:
            counts[i] += 1
        missing -= len(room)
    while missing < 0:
        spare = [i for i in reversed(by_remainder) if counts[i] > 0][:-missing]
        for i in spare:
            counts[i] -= 1
        missing += len(spare)
    return counts


def at_least_one(counts: Sequence[int], locked: Collection[int] = ()) -> list[int]:
    """Every 0 becomes 1, paid by the largest count that is not locked (the first of equals).

    Raises:
        ConfigError: the counts that are not locked are too few for their number.
    """
    result = list(counts)
    payers = [i for i in range(len(result)) if i not in locked]
    if sum(result[i] for i in payers) < len(payers):
        raise ConfigError(
            f"{sum(result[i] for i in payers)} alive elements are too few for {len(payers)} tensors; lower the sparsity"
        )
    for index in payers:
        if result[index] == 0:
            result[max(payers, key=result.__getitem__)] -= 1
            result[index] = 1
    return result


def share_out(shares: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """Integers of sum `total` in proportion to `shares`, none above its cap.

    What is capped leaves the pool, and the rest is rounded anew in proportion (by largest remainder, ties to the lower
    index) until nothing is. A pool whose shares are all 0 is shared out equally.

    Args:
        shares: At least 0.
        total: Sum of the result.
        caps: Largest values.

    Raises:
        ConfigError: the caps do not hold the total.
    """
    if not 0 <= total <= sum(caps):
        raise ConfigError(f"`total` (={total}) must be from 0 to the sum of the caps (={sum(caps)})")
    counts, pool = [0] * len(shares), list(range(len(shares)))
    while pool:
        left, weight = total - sum(counts), sum(shares[i] for i in pool)
        wanted = [left * shares[i] / weight if weight else left / len(pool) for i in pool]
        rounded = dict(zip(pool, round_to_total(wanted, left, [left] * len(pool)), strict=True))
        full = [i for i in pool if rounded[i] > caps[i]]
        for i in full or pool:
            counts[i] = min(rounded[i], caps[i])
        pool = [i for i in pool if i not in full] if full else []
    return counts
