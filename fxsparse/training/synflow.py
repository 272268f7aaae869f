"""SynFlow: iterative pruning at initialisation without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.training.calibration import Calibration
from fxsparse.training.iterative import Iterative
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class SynFlow(Iterative):
    """Keeps the largest |w dR/dw|, R the sum of the outputs of the network of |parameters| for inputs of ones.

    In 100 rounds, so that no layer is cut off (Tanaka et al., arXiv 2006.05467). Scores come from a float64 copy, see
    `Flow`; of the batches only the first one's shape is read.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train:
            raise ConfigError("`train` (=True) is not for SynFlow: one input of ones has no batch statistics")

    def scores(self, calibration: Calibration, states: Sequence[WeightState]) -> Mapping[str, Tensor]:
        """|w dR/dw| under the states' masks, float64."""
        return calibration.flow.scores({state.name: state.mask for state in states})
