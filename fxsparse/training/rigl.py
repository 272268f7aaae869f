"""RigL: drop the smallest weights, grow where the gradient is largest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from fxsparse.sparsity.saliency import Gradient
from fxsparse.sparsity.schedule import DropKind
from fxsparse.training.drop_grow import DropGrow
from fxsparse.training.state import WeightState
from fxsparse.training.updater import resolved_end


@dataclass(frozen=True)
class RigL(DropGrow):
    """RigL (Evci et al., arXiv 1911.11134): grows by |G|, the gradient of the whole batch.

    Attributes:
        decay: How the fraction falls; cosine in the paper.
        end_fraction: `end` as a share of the whole training, where `end` is None.
        replaces_step: Whether an update step leaves out the optimizer step, as the paper's code does.
    """

    decay: DropKind = DropKind.COSINE
    end_fraction: float = 0.75
    replaces_step: bool = True

    @property
    def needs_gradient(self) -> bool:
        """Always."""
        return True

    def timed(self, total_steps: int | None) -> Self:
        """`end` is a share of the training.

        Raises:
            ConfigError: neither `end` nor the length of the training is known.
        """
        return replace(self, end=resolved_end(self, self.end, self.end_fraction, total_steps))

    def grow_scores(self, state: WeightState) -> Tensor:
        """|G|."""
        return state.scores(Gradient())
