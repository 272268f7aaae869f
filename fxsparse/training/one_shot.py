"""One-shot pruning by a saliency: magnitude, Wanda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.distribution import Distribution, Target, Uniform
from fxsparse.sparsity.pattern import Unstructured
from fxsparse.sparsity.saliency import Magnitude, Saliency
from fxsparse.sparsity.units import Pooling
from fxsparse.training.calibration import Calibration
from fxsparse.training.pruning import Pruning
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class OneShot(Pruning):
    """Prunes a trained model by a saliency: `Magnitude()` needs no data, `Wanda()` inputs, others a loss too.

    Attributes:
        distribution: How the sparsity is shared; uniform by default.
        saliency: The scores.
        per_row: Whether each row of an unstructured weight keeps K(F, s) of its own, as published for Wanda (None: for
            saliencies of inputs).
    """

    distribution: Distribution = field(default_factory=Uniform)
    saliency: Saliency = Magnitude()
    per_row: bool | None = None

    @property
    def pooling(self) -> Pooling:
        """The saliency's."""
        return self.saliency.pooling

    def scores(self, calibration: Calibration, states: Sequence[WeightState]) -> Mapping[str, Tensor]:
        """The saliency's."""
        return {each.name: each.element_scores(self.saliency) for each in calibration.given(states, self.saliency)}

    def chosen(self, state: WeightState, scores: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        """Row by row where asked for."""
        per_row = self.saliency.needs_inputs if self.per_row is None else self.per_row
        if not per_row or not isinstance(state.pattern, Unstructured) or state.weight.ndim < 2:
            return super().chosen(state, scores, target)
        return self.chosen_by_row(state, scores, target), None

    def initial_saliency(self) -> Saliency:
        """The saliency, where it needs no data: attach then prunes a dense model itself."""
        if self.saliency.needs_gradient or self.saliency.needs_inputs:
            return super().initial_saliency()
        if self.per_row or self.regroup is not None:
            raise ConfigError("`per_row` and `regroup` of OneShot are prune's: call prune(model, method) before attach")
        return self.saliency
