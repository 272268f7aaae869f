"""SNIP: connection sensitivity at initialisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.sparsity.saliency import Taylor
from fxsparse.training.calibration import Calibration
from fxsparse.training.pruning import Pruning
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class SNIP(Pruning):
    """Keeps the largest |w g|, g the mean gradient of the batches (Lee et al., arXiv 1810.02340).

    Use with `prune` on a fresh model; it needs batches and a loss.
    """

    def scores(self, calibration: Calibration, states: Sequence[WeightState]) -> Mapping[str, Tensor]:
        """|w g| / sum |w g|, float64."""
        gradients = calibration.gradients()
        found = {state.name: Taylor().score(state.weight.double(), gradients[state.name]) for state in states}
        total = torch.stack([each.sum().cpu() for each in found.values()]).sum()
        return {name: each / total.to(each.device) if bool(total) else each for name, each in found.items()}
