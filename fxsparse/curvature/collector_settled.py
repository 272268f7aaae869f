"""When the largest groups of a running Fisher have settled."""

from __future__ import annotations

from torch import Tensor

from fxsparse.errors import ConfigError


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
        if top < 1 or not 0 < overlap <= 1 or patience < 1:
            raise ConfigError(f"`top` (={top}), `overlap` (={overlap}) and `patience` (={patience}) must be positive")
        self.top, self.overlap, self.patience = top, overlap, patience
        self._before: set[int] = set()
        self._looks = 0

    def look(self, values: Tensor) -> bool:
        """Whether they have settled with these values, flat."""
        best = set(values.topk(min(self.top, values.numel())).indices.tolist())
        same = self._before and len(best & self._before) >= self.overlap * len(best)
        self._before, self._looks = best, self._looks + 1 if same else 0
        return self._looks >= self.patience
