"""Pruning at once: masks from data, before the training (at initialisation) or after it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import masked_weights
from fxsparse.sparsity.counts import keep_count
from fxsparse.sparsity.distribution import Distribution, Global, Target
from fxsparse.sparsity.fan_in import ConstantFanIn
from fxsparse.sparsity.saliency import Saliency
from fxsparse.sparsity.shared_support import SupportUnits
from fxsparse.sparsity.top_k import segment_top_k
from fxsparse.sparsity.units import Pooling
from fxsparse.training.calibration import Calibration, Loss
from fxsparse.training.distributed import check_equal_masks, check_same_model, process_group, unwrap
from fxsparse.training.gathered import Gathered
from fxsparse.training.initial import pattern_of, start_from
from fxsparse.training.regroup import new_row_order
from fxsparse.training.state import WeightState
from fxsparse.training.updater import Method

Masks = dict[str, tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Pruning(Method):
    """Base: a mask that `prune` sets once from scores; attached, it stays as it is.

    Present masks are applied, and dead weights stay dead; under `regroup` a row may take over its new group's
    positions, at value 0.

    Attributes:
        distribution: How the sparsity is shared; one ranking of all weights by default.
        train: Score in train mode; eval mode by default.
    """

    distribution: Distribution = field(default_factory=Global)
    train: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diversity is not None:
            raise ConfigError(
                f"`diversity` (={self.diversity}) must be None in {type(self).__name__}, which updates no masks; "
                "give it to a method that does, such as RigL"
            )

    @property
    def pooling(self) -> Pooling:
        """How element scores become the score of a shared position."""
        return Pooling.MEAN

    @abc.abstractmethod
    def scores(self, calibration: Calibration, states: Sequence[WeightState]) -> Mapping[str, Shaped[Tensor, "*shape"]]:
        """Element scores of every weight, higher = keep; signs are allowed."""

    def masks(self, calibration: Calibration, states: Sequence[WeightState]) -> Masks:
        """The new mask of every weight, with its new row order where rows are regrouped; nothing is changed."""
        return self.best(states, self.scores(calibration, states), self.sparsity)

    def best(self, states: Sequence[WeightState], scores: Mapping[str, Tensor], sparsity: float) -> Masks:
        """The best alive units by these element scores at a global sparsity.

        Raises:
            ConfigError: a pattern or the distribution excludes the sparsity.
            DataError: a score of an alive weight is not finite; the message names the weight.
        """
        ranked = {}
        for state in states:
            own = scores[state.name]
            if bad := int((~own[state.mask].isfinite()).sum()):
                raise DataError(f"{type(self).__name__} scores of `{state.name}` hold NaN or Inf (={bad} values)")
            signed = bool((own[state.mask] < 0).any())  # dead weights come last, and count nothing in a norm
            ranked[state.name] = torch.where(state.mask, own.double(), -torch.inf if signed else -1e-300)
        targets = self.distribution.targets([state.spec for state in states], sparsity, ranked)
        return {state.name: self.chosen(state, ranked[state.name], targets[state.name]) for state in states}

    def chosen(
        self, state: WeightState, scores: Tensor, target: Target
    ) -> tuple[Bool[Tensor, "*shape"], Tensor | None]:
        """The mask of one weight, and a new row order or None."""
        if getattr(state.pattern, "exact", True) is False:
            return state.pattern.mask(scores, target, state.layout) & state.mask, None
        order = None
        if self.regroup is not None and isinstance(state.units, SupportUnits) and target.alive < scores.numel():
            alive = torch.where(state.mask, scores, 0.0)
            order = new_row_order(state.units, alive, int(state.units.counts(target)[0]), self.pooling)
            if order is not None:
                state = dataclasses.replace(state, row_order=order)
                kept = state.alive if bool(state.mask.all()) else state.units.pool(state.mask.double()) > 0
                return self._spread(state, scores, target, kept), order
        return self._spread(state, scores, target, state.alive), None

    def chosen_by_row(self, state: WeightState, scores: Tensor, target: Target) -> Bool[Tensor, "*shape"]:
        """The mask of one weight in which each row keeps K(F, s) of its own, of those that are alive."""
        rows = ConstantFanIn().units(tuple(state.weight.shape), state.layout)
        alive = rows.collect(state.mask)
        counts = torch.full_like(alive.sum(1), keep_count(rows.width, target.sparsity))
        return rows.spread(segment_top_k(rows.pool(scores), torch.minimum(counts, alive.sum(1)), alive))

    def _spread(self, state: WeightState, scores: Tensor, target: Target, alive: Tensor) -> Tensor:
        counts = torch.minimum(state.units.counts(target).to(alive.device), alive.sum(1))
        return state.units.spread(segment_top_k(state.units.pool(scores, self.pooling), counts, alive))

    def initial_saliency(self) -> Saliency:
        """Raises: a dense model must be pruned on data first."""
        name = type(self).__name__
        raise ConfigError(f"{name} scores weights on data: call prune(model, {name}(...), batches, loss) before attach")


def prune(
    model: nn.Module, method: Pruning, batches: Iterable[Any] = (), loss: Loss | None = None
) -> dict[str, Bool[Tensor, "*shape"]]:
    """Set a model's masks once, by scores from data; train on with any method, such as `Static(initial=Initial.KEEP)`.

    Gradients, other parameters, buffers, train/eval flags, `requires_grad` and random state are as before afterwards;
    dead weights are zero. Where processes run together, all of them prune this model, each on its own batches: scores
    are of all samples of all ranks. What `fully_shard` spread is whole on every rank while it is scored.

    Args:
        model: A model with masks, as `fxsparse.transform` returns it.
        method: `SNIP`, `GraSP`, `SynFlow`, or `OneShot` with a saliency (magnitude, Wanda).
        batches: Calibration data where the method needs it: `(inputs, targets)` pairs, or inputs alone for methods
            without a loss; inputs are a tensor, a tuple of positional or a mapping of keyword arguments.
        loss: (outputs, targets) -> mean loss over the batch's samples, where the method needs it.

    Returns:
        The new masks by parameter name.

    Raises:
        ConfigError: no masks, data, pattern or sparsity that the method or a weight excludes, or ranks with different
            models or methods. Nothing has changed.
        DataError: scores are not finite, or the masks differ between ranks. Nothing has changed.

    >>> from fxsparse.nn import Linear
    >>> from fxsparse.training import OneShot
    >>> model = Linear(4, 2)
    >>> int(prune(model, OneShot(0.5))["weight"].sum())
    4
    """
    if not isinstance(method, Pruning):
        raise ConfigError(f"`method` (={method!r}) must be SNIP, GraSP, SynFlow or OneShot; others are for attach")
    inner = unwrap(model)
    gathered, weights, group = Gathered.of(inner), masked_weights(inner), process_group(model)
    if not weights:
        raise ConfigError(f"`model` (={type(model).__name__}) has no masks; call fxsparse.transform on it first")
    check_same_model(weights, method, None, group)
    patterns = {name: pattern_of(method, masked) for name, masked in weights.items()}
    with gathered.whole():
        states = [
            WeightState(
                name=name,
                index=index,
                step=0,
                update=0,
                seed=method.seed,
                weight=masked.weight.detach(),
                mask=masked.mask,
                pattern=patterns[name],
                layout=masked.spec.layout,
                row_order=masked.row_order,
                last=index == len(weights) - 1,
            )
            for index, (name, masked) in enumerate(weights.items())
        ]
        with Calibration(model, weights, batches, loss, train=method.train) as calibration:
            found = method.masks(calibration, states)
    masks = {name: mask for name, (mask, _) in found.items()}
    check_equal_masks(masks, 0, group)
    start_from(weights, masks, patterns, {name: order for name, (_, order) in found.items()})
    return masks
