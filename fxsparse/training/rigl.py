"""RigL: drop the smallest weights, grow where the gradient is largest."""

from __future__ import annotations

from dataclasses import dataclass

from fxsparse.sparsity.saliency import Gradient, Saliency
from fxsparse.sparsity.schedule import DropKind
from fxsparse.training.drop_grow import DropGrow


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
    def grow(self) -> Saliency:
        """|G|."""
        return Gradient()
