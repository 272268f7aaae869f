"""The contract of sparse-training methods: mask values over time."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from jaxtyping import Bool, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.counts import check_sparsity
from fxsparse.sparsity.distribution import ERK, Distribution, Target
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.saliency import Magnitude, Random, Saliency
from fxsparse.training.exchange import exchange
from fxsparse.training.grown import GrownValue, Zero
from fxsparse.training.state import WeightState

NEVER = 2**62  # a step that no training reaches


class Initial(enum.Enum):
    """What becomes of the masks that the model has when a method is attached."""

    AUTO = "auto"
    """A dense model gets random masks; a sparse one keeps its own, which must have the method's sparsity."""
    KEEP = "keep"
    """The model keeps its masks, whatever their sparsity."""


@dataclass(frozen=True)
class Method:
    """A sparse-training method: when masks change, which weights are dropped, which are grown.

    A method is a frozen description; what changes over time is in the `Handle` that `attach` returns. A new method
    overrides the hooks in which it differs: `update_due`, `drop_fraction`, `drop_scores`, `grow_scores`, `targets`.

    Attributes:
        sparsity: Dead fraction in [0, 1) of the masked weights.
        pattern: Legal masks; None = the pattern that each weight carries.
        distribution: How the sparsity is shared among the weights.
        seed: Seed of all draws; global random state is never touched.
        initial: A saliency to draw new masks by, or what becomes of those there are.

    Raises:
        ConfigError: the sparsity is outside [0, 1), or an option of the wrong kind.
    """

    sparsity: float = 0.9
    pattern: Pattern | None = None
    distribution: Distribution = field(default_factory=ERK)
    seed: int = 0
    initial: Saliency | Initial = Initial.AUTO

    any_start: ClassVar[bool] = False
    """Whether a sparse model of any sparsity may be the start."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if not isinstance(self.pattern, Pattern | None):
            raise ConfigError(f"`pattern` (={self.pattern!r}) must be a Pattern such as NByM(2, 4), or None")
        if not isinstance(self.distribution, Distribution):
            raise ConfigError(f"`distribution` (={self.distribution!r}) must be a Distribution such as Uniform()")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"`seed` (={self.seed!r}) must be an integer")

    @property
    def drop(self) -> Saliency:
        """By what alive weights are kept."""
        return Magnitude()

    @property
    def regrow_dropped(self) -> bool:
        """Whether a unit may be dropped and grown in the same update."""
        return True

    @property
    def grown(self) -> GrownValue:
        """The first value of a grown weight."""
        return Zero()

    @property
    def replaces_step(self) -> bool:
        """Whether the optimizer step of an update step is left out."""
        return False

    @property
    def needs_gradient(self) -> bool:
        """Whether an update reads the gradient of dead weights."""
        return self.drop.needs_gradient or self.grown.needs_gradient

    def timed(self, total_steps: int | None) -> Self:
        """The method with every step number known.

        Args:
            total_steps: Length of the training in optimizer steps, or None where it is not known.

        Raises:
            ConfigError: the method needs the length and it is not given.
        """
        return self

    def check(self, pattern: Pattern) -> None:
        """Raise ConfigError where the method's definition excludes a pattern; the message says why."""

    def initial_saliency(self) -> Saliency:
        """What a dense model's first masks are drawn by."""
        return Random(self.seed)

    def sparsity_at(self, step: int) -> float:
        """Sparsity after this many completed optimizer steps."""
        return self.sparsity

    def update_due(self, step: int) -> bool:
        """Whether masks change after this many completed optimizer steps."""
        return False

    def drop_fraction(self, step: int) -> float:
        """Fraction of the alive units that is exchanged."""
        return 0.0

    def drop_count(self, state: WeightState) -> int | None:
        """Units to drop in this weight, where it is not the fraction's count."""
        return None

    def targets(self, states: Sequence[WeightState]) -> Mapping[str, Target]:
        """What weights must keep after the update; weights that are not named conserve their count."""
        return {}

    def drop_scores(self, state: WeightState) -> Shaped[Tensor, "segments width"]:
        """Scores by which alive units stay, the lowest are dropped."""
        return state.scores(self.drop)

    def grow_scores(self, state: WeightState) -> Shaped[Tensor, "segments width"]:
        """Scores by which units grow, the highest first; random by default."""
        return state.draws("grow")

    def update(self, states: Sequence[WeightState]) -> dict[str, Bool[Tensor, "*shape"]]:
        """The new mask of every weight; `states` are in the model's order.

        Raises:
            ConfigError: a weight cannot reach its target.
            DataError: a score is NaN; the message names the weight.
        """
        targets = self.targets(states)
        masks = {}
        for state in states:
            try:
                masks[state.name] = self.exchanged(state, targets.get(state.name))
            except (ConfigError, DataError) as error:
                raise type(error)(f"mask update of `{state.name}` at step {state.step}: {error}") from error
        return masks

    def exchanged(self, state: WeightState, target: Target | None) -> Bool[Tensor, "*shape"]:
        """The new mask of one weight: one exchange of the drop fraction, towards the target where there is one."""
        fraction = self.drop_fraction(state.step)
        if target is None and (fraction == 0.0 or bool(state.mask.all())):
            return state.mask.clone()
        chosen = exchange(
            state.units,
            state.alive,
            self.drop_scores(state),
            self.grow_scores(state),
            fraction,
            dropped=self.drop_count(state),
            target=None if target is None else state.units.counts(target),
            regrow_dropped=self.regrow_dropped,
        )
        return state.units.spread(chosen)


def resolved_end(method: Method, end: int | None, share: float, total_steps: int | None) -> int:
    """The last step of a schedule: `end`, else a share of the whole training.

    Raises:
        ConfigError: neither is known.
    """
    if end is not None:
        return end
    if total_steps is None:
        name = type(method).__name__
        raise ConfigError(f"`total_steps` (=None) must be given to attach with {name}, or `end` to {name}(...)")
    return int(share * total_steps + 1e-6)
