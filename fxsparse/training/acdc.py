"""AC/DC: dense and compressed phases in turn."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxsparse.errors import ConfigError
from fxsparse.sparsity.distribution import Distribution, Global
from fxsparse.sparsity.schedule import AlternatingSparsity, Sparsities
from fxsparse.training.scheduled import Scheduled


@dataclass(frozen=True)
class ACDC(Scheduled):
    """Alternating compressed and decompressed training (Peste et al., arXiv 2106.12379).

    The first phase is dense, the last compressed. Each compressed phase starts from the largest |w| of all weights
    together; when it ends all dead weights come alive at 0, with fresh optimizer state. With a `schedule` whose sparse
    phases are less sparse than others, but not dense, `grow` says which come alive.

    Attributes:
        distribution: How the sparsity is shared; one ranking over all weights in the paper.
        every: Steps of a phase.
        start: Steps of the first, dense phase; None = `every`.
    """

    distribution: Distribution = field(default_factory=Global)
    start: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grow is not None and self.schedule is None:
            raise ConfigError(
                f"`grow` (={self.grow}) chooses nothing where all dead weights come alive: give a `schedule` whose "
                "other phases are not dense, such as CustomSparsity"
            )

    def planned(self, end: int) -> Sparsities:
        """`sparsity` and 0 in turn."""
        start = min(self.every, end) if self.start is None else self.start
        return AlternatingSparsity(self.sparsity, self.every, start, end)

    def update_due(self, step: int) -> bool:
        """Where a phase begins."""
        return step > 0 and self.sparsity_at(step) != self.sparsity_at(step - 1)
