"""Which weights a round prunes: the smallest magnitudes, exact counts, ties by index.

Source: Frankle & Carbin, ICLR 2019 (arXiv 1803.03635). Selection is a top-k, never a quantile threshold: a threshold
prunes one weight too many a round and whole groups of ties at once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import top_k


class Scope(enum.Enum):
    """Over what the weights are ranked."""

    GLOBAL = "global"
    """One ranking over all prunable weights."""
    LAYERWISE = "layerwise"
    """A ranking inside each weight tensor."""


def magnitudes(name: str, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """|w| in float32.

    Raises:
        DataError: the weight holds NaN or an infinity.
    """
    weight = weight.detach()
    if bad := int((~torch.isfinite(weight)).sum()):
        raise DataError(f"weight `{name}` holds NaN or Inf (={bad} values); its training diverged, lower the rate")
    return weight.abs().to(torch.float32)


def prune_layerwise(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], alive: Mapping[str, int]
) -> dict[str, Bool[Tensor, "*shape"]]:
    """Keep the `alive[name]` largest magnitudes of each weight, among those alive in `masks`.

    Raises:
        ConfigError: a count above the present one.
        DataError: a weight that is not finite.
    """
    return {name: top_k(magnitudes(name, weights[name]), alive[name], masks[name]) for name in masks}


def prune_global(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], alive: int, min_alive: int = 1
) -> dict[str, Bool[Tensor, "*shape"]]:
    """Keep the `alive` largest magnitudes of all weights together, among those alive in `masks`.

    Args:
        weights: the trained weights by name.
        masks: the present masks; their order is the order of the tensors among ties.
        alive: weights to keep in all.
        min_alive: the best so many of each weight are kept first (0: a pure ranking).

    Raises:
        ConfigError: more to keep than are alive, or fewer than the minima.
        DataError: a weight that is not finite.
    """
    scores = {name: magnitudes(name, weights[name]) for name in masks}
    ranked = torch.cat([scores[name].reshape(-1) for name in masks])
    candidates = torch.cat([mask.reshape(-1) for mask in masks.values()])
    forced = torch.cat(
        [top_k(scores[n], min(min_alive, int(mask.sum())), mask).reshape(-1) for n, mask in masks.items()]
    )
    if (least := int(forced.sum())) > alive:
        raise ConfigError(f"`alive` (={alive}) is less than the {least} weights that `min_alive` (={min_alive}) keeps")
    kept = forced | top_k(ranked, alive - least, candidates & ~forced)
    sizes = [mask.numel() for mask in masks.values()]
    parts = torch.split(kept, sizes)
    return {name: part.reshape(masks[name].shape) for name, part in zip(masks, parts, strict=True)}
