"""When the largest groups of a running Fisher have settled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fxsparse.curvature.collector_ranks import agreed
from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count, check_fraction

_END = object()


class Settled:
    """Watches which values are the largest ones, look by look.

    Args:
        top: How many.
        overlap: Share of them that must be the same as at the look before, in (0, 1].
        patience: For how many looks in a row.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, top: int, overlap: float, patience: int) -> None:
        check_count(top, "top", 1)
        check_count(patience, "patience", 1)
        if not 0 < check_fraction(overlap, "overlap"):
            raise ConfigError(f"`overlap` (={overlap}) must be positive, at most 1")
        self.top, self.overlap, self.patience = top, overlap, patience
        self._before: set[int] = set()
        self._looks = 0

    def look(self, values: Tensor) -> bool:
        """Whether they have settled with these values, flat.

        Raises:
            ConfigError: there are fewer than `top`.
        """
        if self.top > values.numel():
            raise ConfigError(f"`top` (={self.top}) must be at most the number of groups, {values.numel()}")
        best = set(values.topk(self.top).indices.tolist())
        same = self._before and len(best & self._before) >= self.overlap * len(best)
        self._before, self._looks = best, self._looks + 1 if same else 0
        return self._looks >= self.patience


def until_settled(
    batches: Iterable[Any], update: Callable[[Any], None], pooled: Callable[[], Tensor | None], settled: Settled
) -> tuple[int, bool]:
    """Update until all ranks have settled, or one of them has no batch left.

    Args:
        batches: What this rank updates with.
        update: Takes one in.
        pooled: The values to look at, or None where there are none yet.
        settled: Looks at them.

    Returns:
        How many batches were used, and whether all ranks have settled.

    Raises:
        DataError: another rank could not take in its batch.
    """
    left, used = iter(batches), 0
    while True:
        batch = next(left, _END)
        if not agreed(batch is not _END):
            return used, False
        try:
            update(batch)
            values = pooled()
            done = values is not None and settled.look(values)
        except Exception:
            agreed(None)
            raise
        used += 1
        if agreed(done):
            return used, True
