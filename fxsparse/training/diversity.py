"""Diversity of shared supports: groups of rows that do not all choose the same positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.shared_support import SupportUnits
from fxsparse.sparsity.units import Units

_FLOOR = 1e-6  # of the mean over all positions: scores below it are rounding errors, and say nothing about groups


@dataclass(frozen=True)
class Diversity:
    """Let groups of a `SharedSupport` weight differ in what they read, at mask updates.

    Scores that are summed over a group mostly tell how large an input is, which is alike for all groups: they choose
    the same positions, and what no group reads is lost to the layer (with unstructured masks each row adds its own).
    Two remedies, each of which a 0 turns off:

    - A position grows by its score over the mean score of all groups there, to the power `relative`: by what this group
      wants more than others do.
    - A group keeps a position that no other group reads as if its score were 1 + `sole` times as large.

    Groups are compared within their part of the weight (an expert; q, k or v) and their group of a grouped
    convolution; where there is one only, nothing changes, nor does it for other patterns.

    Attributes:
        relative: Power of the mean, in [0, 1].
        sole: How much more the last reader of a position counts, at least 0 and finite.

    Raises:
        ConfigError: a value out of range.
    """

    relative: float = 1.0
    sole: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.relative <= 1:
            raise ConfigError(f"`relative` (={self.relative}) must be in [0, 1]")
        if not (self.sole >= 0 and math.isfinite(self.sole)):
            raise ConfigError(f"`sole` (={self.sole}) must be at least 0 and finite")

    def drop(
        self, units: Units, alive: Bool[Tensor, "segments width"], scores: Shaped[Tensor, "segments width"]
    ) -> Shaped[Tensor, "segments width"]:
        """Scores by which alive positions stay; a new tensor, or `scores` where nothing changes."""
        cohorts = _cohorts(units)
        if cohorts is None or not self.sole:
            return scores
        readers = alive.reshape(cohorts, -1, alive.shape[1])
        sole = (readers & (readers.sum(1, keepdim=True) == 1)).reshape(alive.shape)
        return torch.where(sole, scores + self.sole * scores.abs(), scores)

    def grow(self, units: Units, scores: Shaped[Tensor, "segments width"]) -> Shaped[Tensor, "segments width"]:
        """Scores by which dead positions come alive; a new tensor, or `scores` where nothing changes."""
        cohorts = _cohorts(units)
        if cohorts is None or not self.relative:
            return scores
        wide = scores.double()
        mean = wide.abs().reshape(cohorts, -1, scores.shape[1]).mean(1, keepdim=True)
        mean = mean.clamp(min=_FLOOR * float(mean.mean()) + torch.finfo(torch.float64).tiny)
        mean = mean.expand(-1, len(scores) // cohorts, -1).reshape(scores.shape)
        return (wide / mean**self.relative).float()  # rounded: positions that one group alone wants are all alike


def _cohorts(units: Units) -> int | None:
    """How many runs of equally many groups read the same inputs; None where there is nothing to compare."""
    if not isinstance(units, SupportUnits):
        return None
    parts, grouped = units.layout.parts(units.shape), units.layout.groups
    rows = units.layout.matrix_shape(units.shape)[0] // (parts * grouped)
    cohorts = parts if rows % units.group and grouped > 1 else parts * grouped
    return cohorts if units.segments > cohorts else None
