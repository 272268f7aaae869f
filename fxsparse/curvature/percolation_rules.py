"""Which groups are perturbed, how much, and in which direction."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from jaxtyping import Float64, Int64
from torch import Generator, Tensor

from fxsparse.curvature.percolation_groups import GroupTable
from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.top_k import top_k

E = TypeVar("E", bound=enum.Enum)
_GUARD = 1e-6


class Pick(enum.Enum):
    """Which groups carry the energy."""

    TOPK = "topk"
    """Those of the largest Fisher."""
    SAMPLE = "sample"
    """Drawn without replacement, p_g proportional to F_g^(1/T) (Gumbel-top-k)."""
    RANDOM = "random"
    """Drawn uniformly."""
    BOTTOMK = "bottomk"
    """Those of the smallest Fisher."""


class Energy(enum.Enum):
    """How the squared budget is shared."""

    EQUAL = "equal"
    """The same for every group."""
    SIZE = "size"
    """In proportion to the number of entries."""


class Direction(enum.Enum):
    """Along what a group moves."""

    GAUSSIAN = "gaussian"
    """A random direction."""
    GRADIENT = "gradient"
    """Up the loss's gradient."""
    SHRINK = "shrink"
    """Towards zero."""


def member(kind: type[E], value: E | str, name: str) -> E:
    """The member itself, or the one of that value; raises ConfigError where there is none."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(each.value) for each in kind)
        raise ConfigError(f"`{name}` (={value!r}) must be one of {known}") from None


def concentrated(concentration: float, count: int) -> int:
    """The number of groups k = max(1, ceil(C G - 1e-6))."""
    return max(1, math.ceil(concentration * count - _GUARD))


def sampling_probabilities(fisher: Float64[Tensor, " groups"], temperature: float) -> Float64[Tensor, " groups"]:
    """p_g proportional to F_g^(1/T): the first draw of `Pick.SAMPLE`."""
    return torch.softmax(fisher.double().log() / temperature, 0)


def picked(
    pick: Pick, scores: Float64[Tensor, " groups"], k: int, temperature: float, source: Generator
) -> Int64[Tensor, " k"]:
    """The numbers of the k groups, ascending; equal scores by number."""
    if pick is Pick.SAMPLE:
        uniform = torch.rand(len(scores), generator=source, dtype=torch.float64).clamp_min(1e-300)
        scores = scores.log() / temperature - (-uniform.log()).log()
    elif pick is Pick.RANDOM:
        scores = torch.rand(len(scores), generator=source, dtype=torch.float64)
    elif pick is Pick.BOTTOMK:
        scores = -scores
    return top_k(scores, k).nonzero()[:, 0]


def group_energies(energy: Energy, sizes: Int64[Tensor, " k"], total: float) -> Float64[Tensor, " k"]:
    """|delta_g|^2 of each chosen group; their sum is the total."""
    shares = torch.ones(len(sizes), dtype=torch.float64) if energy is Energy.EQUAL else sizes.double()
    return total * shares / shares.sum()


def perturbation(
    direction: Direction,
    table: GroupTable,
    weights: Mapping[str, Tensor],
    chosen: Int64[Tensor, " k"],
    squares: Float64[Tensor, " k"],
    source: Generator,
    gradient: Mapping[str, Tensor] | None,
) -> dict[str, Float64[Tensor, "*shape"]]:
    """Delta by name: in each chosen group of exactly its energy, zeros elsewhere.

    Raises:
        ConfigError: no gradient where it is the direction.
        DataError: a chosen group has no direction: nothing alive, zero weights or a zero gradient.
    """
    place = torch.full((table.count + 1,), -1)
    place[chosen] = torch.arange(len(chosen))
    slots = {name: place[torch.where(index < 0, table.count, index)] for name, index in table.ids.items()}
    raw = {name: _raw(direction, name, weight, source, gradient) for name, weight in weights.items()}
    norms = torch.zeros(len(chosen) + 1, dtype=torch.float64)
    for name, slot in slots.items():
        norms.index_add_(0, torch.where(slot < 0, len(chosen), slot).reshape(-1), raw[name].square().reshape(-1))
    if not bool((norms[:-1] > 0).all()):
        number = int(chosen[int((norms[:-1] <= 0).nonzero()[0])])
        raise DataError(f"group {number} cannot be perturbed along {direction.value}: it has nothing alive, or zeros")
    scales = torch.cat([(squares / norms[:-1]).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return {name: raw[name] * scales[torch.where(slot < 0, len(chosen), slot)] for name, slot in slots.items()}


def _raw(
    direction: Direction, name: str, weight: Tensor, source: Generator, gradient: Mapping[str, Tensor] | None
) -> Float64[Tensor, "*shape"]:
    if direction is Direction.GAUSSIAN:
        return torch.randn(weight.shape, generator=source, dtype=torch.float64)
    if direction is Direction.SHRINK:
        return -weight.double()
    if gradient is None or name not in gradient or gradient[name].shape != weight.shape:
        raise ConfigError(f"`gradient` must have an entry for `{name}` of shape {tuple(weight.shape)}")
    return gradient[name].detach().cpu().double()
