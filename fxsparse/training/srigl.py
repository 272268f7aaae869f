"""SRigL: RigL with the same number of inputs for every unit, and units that are ablated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction
from fxsparse.sparsity.distribution import Global, Target
from fxsparse.sparsity.fan_in import ConstantFanIn, RowUnits
from fxsparse.sparsity.n_by_m import NByM
from fxsparse.sparsity.pattern import Pattern
from fxsparse.training.ablation import ablate
from fxsparse.training.rigl import RigL
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class SRigL(RigL):
    """Structured RigL (Lasby et al., arXiv 2305.02299): constant fan-in, or N:M without ablation.

    The units (rows) that few salient weights reach are ablated at each update, the others share their budget; ablated
    units can come back. Without ablation this is RigL's exchange within the pattern.

    Attributes:
        pattern: `ConstantFanIn()` or an exact `NByM`.
        gamma: Rows with fewer than gamma k salient weights are ablated, in [0, 1]; .3 for convolutional networks, .95
            for vision transformers in the paper.
        ablation: Whether rows are ablated at all.
        keep_rows: Names of weights whose rows are never ablated; those of the model's last weight never are.
    """

    pattern: Pattern | None = ConstantFanIn()
    gamma: float = 0.3
    ablation: bool = True
    keep_rows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.gamma, "gamma")
        if isinstance(self.distribution, Global) and self.ablation:
            raise ConfigError(f"`distribution` (={self.distribution}) leaves SRigL no fixed budget; use ERK()")

    def check(self, pattern: Pattern) -> None:
        """Constant fan-in and N:M are what the method is about."""
        super().check(pattern)
        if not isinstance(pattern, ConstantFanIn | NByM):
            raise ConfigError(f"SRigL needs as many weights in each row or group: use ConstantFanIn(), not {pattern}")

    def exchanged(self, state: WeightState, target: Target | None = None, dropped: int | None = None) -> Tensor:
        """RigL's exchange, or with ablation."""
        units, alive, fraction = state.units, state.alive, self.drop_fraction(state.step)
        whole = not self.ablation or state.last or state.name in self.keep_rows
        if whole or not isinstance(units, RowUnits) or state.target is None or not fraction or bool(alive.all()):
            return super().exchanged(state, target, dropped)
        drop, grow = self.drop_scores(state), self.grow_scores(state)
        return units.spread(ablate(units, alive, drop, grow, fraction, state.target.alive, self.gamma))
