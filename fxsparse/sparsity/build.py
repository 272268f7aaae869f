"""Masks of a whole model from scores or from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.distribution import Distribution, Global, Target, WeightSpec
from fxsparse.sparsity.n_by_m import GroupUnits
from fxsparse.sparsity.random import generator, random_scores
from fxsparse.sparsity.top_k import segment_top_k
from fxsparse.sparsity.units import Pooling


def build_masks(
    weights: Sequence[WeightSpec],
    distribution: Distribution,
    sparsity: float,
    scores: Mapping[str, Tensor],
    pooling: Pooling = Pooling.RMS,
) -> dict[str, Tensor]:
    """The masks of the best units of every weight.

    Args:
        weights: In the model's order.
        distribution: How the sparsity is shared.
        sparsity: Global dead fraction in [0, 1).
        scores: Saliency of every weight, of its shape.
        pooling: How scores of a shared position combine; a saliency's `pooling`.

    Raises:
        ConfigError: scores are missing or misshapen, or a pattern does not fit.
        DataError: a score is NaN; the message names the weight.
    """
    for weight in weights:
        if weight.name not in scores:
            raise ConfigError(f"`scores` of weight `{weight.name}` are missing; give one tensor for each weight")
        if scores[weight.name].shape != weight.shape:
            raise ConfigError(
                f"`scores` of weight `{weight.name}` have shape (={tuple(scores[weight.name].shape)}), not "
                f"(={tuple(weight.shape)})"
            )
    targets = distribution.targets(weights, sparsity, scores)
    return {weight.name: _scored(weight, scores[weight.name], targets[weight.name], pooling) for weight in weights}


def random_masks(
    weights: Sequence[WeightSpec], distribution: Distribution, sparsity: float, seed: int
) -> dict[str, Tensor]:
    """Uniformly random masks of exact counts on the CPU; the same seed gives the same masks on any machine.

    Units are drawn, not elements: k positions per group, whole blocks, whole slices.

    Raises:
        ConfigError: a pattern does not fit a weight or its target.
    """
    scores = None
    if isinstance(distribution, Global) and sparsity:
        scores = {weight.name: random_scores(weight.shape, _source(seed, i)) for i, weight in enumerate(weights)}
    targets = distribution.targets(weights, sparsity, scores)
    return {weight.name: _random(weight, targets[weight.name], seed, i) for i, weight in enumerate(weights)}


def _scored(weight: WeightSpec, scores: Tensor, target: Target, pooling: Pooling) -> Tensor:
    try:
        return weight.pattern.mask(scores, target, weight.layout, pooling)
    except (ConfigError, DataError) as error:
        raise type(error)(f"weight `{weight.name}`: {error}") from error


def _random(weight: WeightSpec, target: Target, seed: int, index: int) -> Tensor:
    units = weight.pattern.units(weight.shape, weight.layout)
    if units.is_dense(target):
        return torch.ones(weight.shape, dtype=torch.bool)
    if isinstance(units, GroupUnits):  # counts may depend on the draw
        return weight.pattern.mask(random_scores(weight.shape, _source(seed, index)), target, weight.layout)
    drawn = random_scores((units.segments, units.width), _source(seed, index))
    return units.spread(segment_top_k(drawn, units.counts(target), units.valid))


def _source(seed: int, index: int) -> torch.Generator:
    return generator(seed, index, 0, "initial_mask")
