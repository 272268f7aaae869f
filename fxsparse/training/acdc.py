"""AC/DC: dense and compressed phases in turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self

from fxsparse.errors import ConfigError
from fxsparse.sparsity.distribution import Distribution, Global
from fxsparse.sparsity.schedule import UpdateSteps
from fxsparse.training.scheduled import Scheduled
from fxsparse.training.updater import resolved_end


@dataclass(frozen=True)
class ACDC(Scheduled):
    """Alternating compressed and decompressed training (Peste et al., arXiv 2106.12379).

    The first phase is dense, the last compressed. Each compressed phase starts from the largest |w| of all weights
    together; when it ends all dead weights come alive at 0, with fresh optimizer state.

    Attributes:
        distribution: How the sparsity is shared; one ranking over all weights in the paper.
        every: Steps of a phase.
        start: Steps of the first, dense phase; None = `every`.
        end: First step of the last compressed phase; None = `end_fraction` of the training.
        end_fraction: `end` as a share of the whole training, where `end` is None.
    """

    distribution: Distribution = field(default_factory=Global)
    every: int = 100
    start: int | None = None
    end: int | None = None
    end_fraction: float = 0.75

    def timed(self, total_steps: int | None) -> Self:
        """`start` and `end` in steps.

        Raises:
            ConfigError: neither `end` nor the length of the training is known, or there is no first dense phase.
        """
        end = resolved_end(self, self.end, self.end_fraction, total_steps)
        start = min(self.every, end) if self.start is None else self.start
        if start < 1:
            raise ConfigError(f"`start` (={start}) must be at least 1: the first phase is dense")
        UpdateSteps(self.every, start, end)
        return replace(self, start=start, end=end)

    def sparsities(self) -> Iterable[float]:
        """Dense, and the final one."""
        return (0.0, self.sparsity)

    def sparsity_at(self, step: int) -> float:
        """0 in dense phases, `sparsity` in compressed ones."""
        if self.start is None or self.end is None:
            raise ConfigError("`end` (=None) has no steps yet; call timed(total_steps) first, as attach does")
        compressed = step >= self.end or (step >= self.start and (step - self.start) // self.every % 2 == 0)
        return self.sparsity if compressed else 0.0

    def update_due(self, step: int) -> bool:
        """Where a phase begins."""
        return step > 0 and self.sparsity_at(step) != self.sparsity_at(step - 1)
