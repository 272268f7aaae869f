"""Segments and units: the form in which every pattern is a top-k in each segment."""

from __future__ import annotations

import abc
import enum
import math
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target, keep_count
from fxsparse.sparsity.layout import Layout
from fxsparse.sparsity.top_k import order_scores


class Pooling(enum.Enum):
    """How element scores become the score of a shared position."""

    RMS = "rms"  # root mean square, for magnitudes: |w|, |gradient|, |momentum|
    MEAN = "mean"  # plain mean, for additive scores: Taylor, Fisher, OBD, SNIP
    SUM = "sum"


@dataclass(frozen=True)
class Units(abc.ABC):
    """A weight seen as `segments` rows of `width` units that live or die as wholes.

    Dynamic methods work on [segments, width] matrices only: pool scores, choose in each row, spread the choice.

    Attributes:
        shape: Shape of the weight.
        segments: Number of rows S.
        width: Units per row U.
    """

    shape: tuple[int, ...]
    segments: int
    width: int

    @property
    def numel(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def valid(self) -> Bool[Tensor, "segments width"] | None:
        """Which units exist (CPU); None when all do."""
        return None

    @abc.abstractmethod
    def pool(
        self, scores: Shaped[Tensor, "*shape"], pooling: Pooling = Pooling.RMS
    ) -> Shaped[Tensor, "segments width"]:
        """Score of every unit.

        Raises:
            DataError: a score is NaN.
        """

    @abc.abstractmethod
    def spread(self, chosen: Bool[Tensor, "segments width"]) -> Bool[Tensor, "*shape"]:
        """The mask in which exactly the chosen units are alive."""

    @abc.abstractmethod
    def collect(self, mask: Bool[Tensor, "*shape"]) -> Bool[Tensor, "segments width"]:
        """The units alive in a mask that holds the pattern; inverse of `spread`."""

    def counts(self, target: float | Target) -> Int64[Tensor, " segments"]:
        """Units that each segment keeps (CPU).

        Raises:
            ConfigError: the pattern cannot have this target.
        """
        return torch.full((self.segments,), keep_count(self.width, self.target(target).sparsity), dtype=torch.int64)

    def alive_elements(self, target: float | Target) -> int:
        """Elements alive at the target; where units differ in size (border blocks), the largest possible number."""
        return int(self.counts(target).sum()) * (self.numel // (self.segments * self.width))

    def is_dense(self, target: Target) -> bool:
        """Whether the target keeps every element."""
        return target.alive == self.numel

    def target(self, target: float | Target) -> Target:
        """A sparsity as the target of this weight; a target as it is."""
        made = target if isinstance(target, Target) else Target.of(self.numel, target)
        if made.alive > self.numel:
            raise ConfigError(f"`alive` (={made.alive}) must be at most the {self.numel} elements of the weight")
        return made


@dataclass(frozen=True)
class ElementUnits(Units):
    """One segment; every element is a unit."""

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Self:
        """The units of a weight of any non-empty shape."""
        return cls(shape, 1, math.prod(shape))

    def pool(self, scores: Tensor, pooling: Pooling = Pooling.RMS) -> Tensor:
        """Scores themselves, shape [1, numel]."""
        return order_scores(scores).reshape(1, -1)

    def spread(self, chosen: Tensor) -> Tensor:
        """[1, numel] -> shape."""
        return chosen.reshape(self.shape)

    def collect(self, mask: Tensor) -> Tensor:
        """Shape -> [1, numel]."""
        return mask.reshape(1, -1)

    def counts(self, target: float | Target) -> Tensor:
        """Exactly `target.alive` elements."""
        return torch.tensor([self.target(target).alive])


@dataclass(frozen=True)
class SliceUnits(Units):
    """One segment; every slice along `axis` is a unit, scored by the sum of its elements."""

    axis: int = 0

    @staticmethod
    def of(shape: tuple[int, ...], axis: int) -> SliceUnits:
        """The slices of a weight along `axis`."""
        return SliceUnits(shape, 1, shape[axis], axis)

    def pool(self, scores: Tensor, pooling: Pooling = Pooling.RMS) -> Tensor:
        """Sum over all other axes in float64, whatever the `pooling`."""
        slices = order_scores(scores).double().movedim(self.axis, 0).reshape(self.width, -1)
        return slices.contiguous().sum(1)[None]  # one memory layout, one rounding

    def spread(self, chosen: Tensor) -> Tensor:
        """[1, slices] -> shape."""
        ones = [self.width if axis == self.axis else 1 for axis in range(len(self.shape))]
        return chosen.reshape(ones).expand(self.shape).contiguous()

    def collect(self, mask: Tensor) -> Tensor:
        """Shape -> [1, slices], read at the first element of each slice."""
        return mask.movedim(self.axis, 0).reshape(self.width, -1)[:, 0][None]


@dataclass(frozen=True)
class BlockUnits(Units):
    """One segment; blocks over axes 0 and 1 are units, border blocks included, scored by the mean of their elements."""

    height: int = 1
    breadth: int = 1

    @staticmethod
    def of(shape: tuple[int, ...], height: int, breadth: int) -> BlockUnits:
        """The blocks of a weight of at least two axes."""
        blocks = math.ceil(shape[0] / height) * math.ceil(shape[1] / breadth)
        return BlockUnits(shape, 1, blocks, height, breadth)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along axis 0 and along axis 1."""
        return math.ceil(self.shape[0] / self.height), math.ceil(self.shape[1] / self.breadth)

    @property
    def sizes(self) -> Int64[Tensor, "1 width"]:
        """Elements of every block (CPU)."""
        down, across = self.grid
        heights = torch.full((down,), self.height)
        breadths = torch.full((across,), self.breadth)
        heights[-1] -= down * self.height - self.shape[0]
        breadths[-1] -= across * self.breadth - self.shape[1]
        return (heights[:, None] * breadths).reshape(1, -1) * math.prod(self.shape[2:])

    def pool(self, scores: Tensor, pooling: Pooling = Pooling.RMS) -> Tensor:
        """Mean in float64 of the scores that exist in a block, whatever the `pooling`."""
        rows, columns = self.shape[:2]
        down, across = self.grid
        flat = order_scores(scores).double().contiguous().reshape(rows, columns, -1).sum(2)
        padded = torch.nn.functional.pad(flat, (0, across * self.breadth - columns, 0, down * self.height - rows))
        sums = padded.reshape(down, self.height, across, self.breadth).sum((1, 3)).reshape(1, -1)
        return sums / self.sizes.to(sums.device)

    def spread(self, chosen: Tensor) -> Tensor:
        """[1, blocks] -> shape."""
        rows, columns = self.shape[:2]
        matrix = chosen.reshape(self.grid).repeat_interleave(self.height, 0).repeat_interleave(self.breadth, 1)
        matrix = matrix[:rows, :columns].reshape(rows, columns, *(1 for _ in self.shape[2:]))
        return matrix.expand(self.shape).contiguous()

    def collect(self, mask: Tensor) -> Tensor:
        """Shape -> [1, blocks], read at the first element of each block."""
        rows, columns = self.shape[:2]
        return mask.reshape(rows, columns, -1)[:: self.height, :: self.breadth, 0].reshape(1, -1)

    def alive_elements(self, target: float | Target) -> int:
        """Exact when all blocks are whole; else the size of the largest blocks that could be kept."""
        return int(self.sizes[0].sort(descending=True).values[: int(self.counts(target))].sum())


@dataclass(frozen=True)
class PartUnits(Units):
    """The segments of every part of a weight (of each expert, of q, k and v), part after part."""

    layout: Layout
    inner: Units

    @staticmethod
    def of(shape: tuple[int, ...], layout: Layout, inner: Units) -> PartUnits:
        """The units of a weight whose parts have the units `inner` each."""
        return PartUnits(shape, layout.parts(shape) * inner.segments, inner.width, layout, inner)

    @property
    def valid(self) -> Tensor | None:
        """As in every part."""
        found = self.inner.valid
        return None if found is None else found.repeat(self._parts, 1)

    def pool(self, scores: Tensor, pooling: Pooling = Pooling.RMS) -> Tensor:
        """The parts' own scores."""
        return torch.cat([self.inner.pool(part, pooling) for part in self.layout.to_parts(scores)])

    def spread(self, chosen: Tensor) -> Tensor:
        """[segments, width] -> shape."""
        parts = [self.inner.spread(part) for part in chosen.chunk(self._parts)]
        return self.layout.from_parts(torch.stack(parts), self.shape)

    def collect(self, mask: Tensor) -> Tensor:
        """Shape -> [segments, width]."""
        return torch.cat([self.inner.collect(part) for part in self.layout.to_parts(mask)])

    def counts(self, target: float | Target) -> Tensor:
        """The same in every part."""
        return self.inner.counts(self._inner_target(target)).repeat(self._parts)

    def alive_elements(self, target: float | Target) -> int:
        """The parts' sum."""
        return self._parts * self.inner.alive_elements(self._inner_target(target))

    @property
    def _parts(self) -> int:
        return self.segments // self.inner.segments

    def _inner_target(self, target: float | Target) -> Target:
        whole = self.target(target)
        return Target.dense(self.inner.numel) if self.is_dense(whole) else Target.of(self.inner.numel, whole.sparsity)
