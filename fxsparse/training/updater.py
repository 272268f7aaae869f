"""The contract of sparse-training methods: mask values over time."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight
from fxsparse.sparsity.counts import check_sparsity
from fxsparse.sparsity.distribution import ERK, Distribution, Target
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.saliency import Magnitude, Random, Saliency
from fxsparse.training.diversity import Diversity
from fxsparse.training.exchange import exchange
from fxsparse.training.grown import GrownValue, Zero
from fxsparse.training.regroup import Regroup
from fxsparse.training.state import WeightState

if TYPE_CHECKING:
    from fxsparse.training.handle import Handle

NEVER = 2**62  # a step that no training reaches


class NonFinite(enum.Enum):
    """What becomes of a step in which a gradient that a method reads is NaN or infinite."""

    SKIP = "skip"
    """Neither weights nor masks change, with a warning; the step does not count, so the mask update waits."""
    RAISE = "raise"
    """DataError before anything has changed; the message names the weights."""


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
    overrides the hooks in which it differs: `update_due`, `drop_fraction`, `drop`, `grow`, `targets`, or the scores.

    Attributes:
        sparsity: Dead fraction in [0, 1) of the masked weights.
        pattern: Legal masks; None = the pattern that each weight carries.
        distribution: How the sparsity is shared among the weights.
        seed: Seed of all draws; global random state is never touched.
        initial: A saliency to draw new masks by, or what becomes of those there are.
        non_finite: What becomes of a step whose gradient is NaN or infinite where the method reads it. Weights that are
            not finite at a mask update always raise a DataError.
        regroup: How the rows of `SharedSupport` weights are put into groups anew at mask updates; None = never.
        diversity: What keeps the groups of `SharedSupport` weights from reading the same inputs; None = nothing.

    Raises:
        ConfigError: the sparsity is outside [0, 1), or an option of the wrong kind.
    """

    sparsity: float = 0.9
    pattern: Pattern | None = None
    distribution: Distribution = field(default_factory=ERK)
    seed: int = 0
    initial: Saliency | Initial = Initial.AUTO
    non_finite: NonFinite = field(default=NonFinite.SKIP, kw_only=True)
    regroup: Regroup | None = field(default=None, kw_only=True)
    diversity: Diversity | None = field(default=None, kw_only=True)

    any_start: ClassVar[bool] = False
    """Whether a sparse model of any sparsity may be the start."""
    grows: ClassVar[bool] = True
    """Whether dead weights can come alive; else a model sparser than the target is refused."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if not isinstance(self.pattern, Pattern | None):
            raise ConfigError(f"`pattern` (={self.pattern!r}) must be a Pattern such as NByM(2, 4), or None")
        if not isinstance(self.distribution, Distribution):
            raise ConfigError(f"`distribution` (={self.distribution!r}) must be a Distribution such as Uniform()")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"`seed` (={self.seed!r}) must be an integer")
        if not isinstance(self.non_finite, NonFinite):
            raise ConfigError(f"`non_finite` (={self.non_finite!r}) must be NonFinite.SKIP or NonFinite.RAISE")
        if not isinstance(self.regroup, Regroup | None):
            raise ConfigError(f"`regroup` (={self.regroup!r}) must be a Regroup(), or None")
        if not isinstance(self.diversity, Diversity | None):
            raise ConfigError(f"`diversity` (={self.diversity!r}) must be a Diversity(), or None")

    @property
    def drop(self) -> Saliency:
        """By what alive weights are kept."""
        return Magnitude()

    @property
    def grow(self) -> Saliency | None:
        """By what dead weights come alive, the highest first; None = at random."""
        return None

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
        by = (self.drop, self.grow, self.grown)
        return any(each is not None and each.needs_gradient for each in by)

    def handle(self, model: nn.Module, optimizer: Optimizer, total_steps: int | None) -> Handle:
        """What `attach` returns; a method with phases of its own has its own kind of handle."""
        from fxsparse.training.handle import Handle  # the handle drives methods, so it stands above them

        return Handle(model, optimizer, self, total_steps)

    @property
    def needs_whole_weights(self) -> bool:
        """Whether weights that are spread over ranks are refused."""
        return False

    def install(self, weight: MaskedWeight) -> None:
        """Put the buffers that the method's handle keeps in the model beside one weight; most have none."""

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

    def watches(self, step: int) -> bool:
        """Whether G is collected on the way to this step; `remember` sees it then."""
        return self.needs_gradient and self.update_due(step)

    def remember(self, state: WeightState) -> Mapping[str, Tensor]:
        """What to keep of one weight after a step that was watched: tensors that later states carry as `memory`."""
        return state.memory

    def check_memory(
        self, step: int, memory: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]
    ) -> None:
        """Raise ConfigError where a saved state brings other tensors than `remember` keeps.

        Args:
            step: Completed optimizer steps.
            memory: What the state has, by weight.
            shapes: The shape of every masked weight.
        """

    def drop_fraction(self, step: int) -> float:
        """Fraction of the alive units that is exchanged."""
        return 0.0

    def drop_counts(self, states: Sequence[WeightState]) -> Mapping[str, int]:
        """Units to drop in a weight (in each group of a `SharedSupport`), where it is not the fraction's count."""
        return {}

    def targets(self, states: Sequence[WeightState]) -> Mapping[str, Target]:
        """What weights must keep after the update; weights that are not named conserve their count."""
        return {}

    def drop_scores(self, state: WeightState) -> Shaped[Tensor, "segments width"]:
        """Scores by which alive units stay, the lowest are dropped."""
        return state.scores(self.drop)

    def grow_scores(self, state: WeightState) -> Shaped[Tensor, "segments width"]:
        """Scores by which units grow, the highest first."""
        return state.draws("grow") if self.grow is None else state.scores(self.grow)

    def ranked_to_drop(self, state: WeightState) -> Shaped[Tensor, "segments width"]:
        """`drop_scores`, as `diversity` changes them."""
        scores = self.drop_scores(state)
        return scores if self.diversity is None else self.diversity.drop(state.units, state.alive, scores)

    def ranked_to_grow(self, state: WeightState) -> Shaped[Tensor, "segments width"]:
        """`grow_scores`, as `diversity` changes them."""
        scores = self.grow_scores(state)
        return scores if self.diversity is None else self.diversity.grow(state.units, scores)

    def update(self, states: Sequence[WeightState]) -> dict[str, Bool[Tensor, "*shape"]]:
        """The new mask of every weight; `states` are in the model's order, rows regrouped.

        Raises:
            ConfigError: a weight cannot reach its target.
            DataError: a score is NaN; the message names the weight.
        """
        targets, drops = self.targets(states), self.drop_counts(states)
        masks = {}
        for state in states:
            try:
                masks[state.name] = self.exchanged(state, targets.get(state.name), drops.get(state.name))
            except (ConfigError, DataError) as error:
                raise type(error)(f"mask update of `{state.name}` at step {state.step}: {error}") from error
        return masks

    def regrouped(self, state: WeightState) -> WeightState:
        """The weight with its rows in new groups where `regroup` says so."""
        due = self.regroup is not None and self.regroup.due(state.update)
        return self.regroup.applied(state, self.drop) if self.regroup is not None and due else state

    def exchanged(
        self, state: WeightState, target: Target | None = None, dropped: int | None = None
    ) -> Bool[Tensor, "*shape"]:
        """The new mask of one weight: one exchange, towards the target where there is one.

        Args:
            state: The weight.
            target: What it must have afterwards; as much as before by default.
            dropped: Units that are dropped; the drop fraction's count by default.
        """
        fraction = self.drop_fraction(state.step)
        idle = dropped == 0 if dropped is not None else fraction == 0.0
        if target is None and (idle or bool(state.mask.all())):
            return state.mask.clone()
        chosen = exchange(
            state.units,
            state.alive,
            self.ranked_to_drop(state),
            self.ranked_to_grow(state),
            fraction,
            dropped=dropped,
            target=None if target is None else state.units.counts(target),
            regrow_dropped=self.regrow_dropped,
        )
        return state.units.spread(chosen)


def resolved_step(method: Method, share: float, total_steps: int | None, instead: str = "end") -> int:
    """The step that is a share of the whole training.

    Args:
        method: Whose schedule it is.
        share: Share in [0, 1].
        total_steps: Length of the training.
        instead: The field that says the step outright.

    Raises:
        ConfigError: the length is not known.
    """
    if total_steps is None:
        name = type(method).__name__
        raise ConfigError(f"`total_steps` (=None) must be given to attach with {name}, or `{instead}` to {name}(...)")
    return int(share * total_steps + 1e-6)
