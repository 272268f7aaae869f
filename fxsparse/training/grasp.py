"""GraSP: keep the gradient flow at initialisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.training.calibration import Calibration
from fxsparse.training.pruning import Pruning
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class GraSP(Pruning):
    """Keeps the largest w (H g): what the pruned gradient norm would miss most (Wang et al., arXiv 2002.07376).

    H and g are the Hessian and the gradient of the mean loss over all batches, which are read twice. Use with `prune`
    on a fresh model; it needs batches, a loss, and operations with a second derivative.

    Attributes:
        temperature: The model's outputs (logits) are divided by it, as published by 200.
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigError(f"`temperature` (={self.temperature}) must be positive")

    def scores(self, calibration: Calibration, states: Sequence[WeightState]) -> Mapping[str, Tensor]:
        """W (H g), float64, signed."""
        product = calibration.curvature_product(calibration.gradients(self.temperature), self.temperature)
        return {state.name: state.weight.double() * product[state.name] for state in states}
