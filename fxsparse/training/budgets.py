"""Budgets that move between weights: what all of them drop is shared out anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxsparse.sparsity.counts import fraction_count
from fxsparse.sparsity.erk import share_out
from fxsparse.training.state import WeightState

_NEARLY_DENSE = 0.2


@dataclass(frozen=True)
class Move:
    """Elements of one weight.

    Attributes:
        dropped: How many it drops.
        alive: How many are alive afterwards.
    """

    dropped: int
    alive: int


def moves(states: Sequence[WeightState], wants: Sequence[float], fraction: float) -> dict[str, Move]:
    """What each weight drops and keeps when the sum of all drops is shared in proportion to `wants`.

    A weight of sparsity s drops n(f, A) and never its last one; where s < .2 and its share exceeds 1 / L, f is at most
    s (arXiv 1907.04840). Shares are exact: largest remainders, none above a weight's room, Sum |M| stays.

    Args:
        states: The weights.
        wants: How much each asks for, at least 0.
        fraction: Drop fraction f in [0, 1].
    """
    total = sum(wants)
    shares = [each / total if total else 1 / len(wants) for each in wants]
    alive = [int(state.mask.sum()) for state in states]
    sizes = [state.mask.numel() for state in states]
    dropped = []
    for share, count, size in zip(shares, alive, sizes, strict=True):
        sparsity = 1 - count / size
        rich = sparsity < _NEARLY_DENSE and share > 1 / len(states)
        dropped.append(min(fraction_count(min(fraction, sparsity) if rich else fraction, count), max(0, count - 1)))
    room = [size - count + k for size, count, k in zip(sizes, alive, dropped, strict=True)]
    grown = share_out(shares, sum(dropped), room)
    return {s.name: Move(k, n - k + new) for s, n, k, new in zip(states, alive, dropped, grown, strict=True)}
